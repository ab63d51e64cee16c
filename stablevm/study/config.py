"""The options of `stablevm study`, and the arms that it knows by name. Free of torch, so that `--help` stays quick."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from stablevm.choices import TimeName
from stablevm.support.errors import UserError
from stablevm.support.options import distinct_indices, require, some_of, writable
from stablevm.support.ranges import Count, Decay, Positive
from stablevm.training.config import TrainConfig

Arms = dict[str, dict[str, Any]]  # options of training by the name of the arm
_ALIGNED = {"use_proj_loss": True, "proj_weight_schedule": "sigmoid"}
_WHOLE_CLASS = {"loss_type": "stablevm", "bank_capacity_per_class": "all", "bank_anchors": "batch"}


def _fifo(capacity: int) -> dict[str, Any]:
    return {"loss_type": "stablevm", "bank_capacity_per_class": capacity}


# The most telling ones first. A bank of 256 is the published one; the whole class takes longest, because each step
# weighs all of its samples. Bank anchors are the published ones, batch anchors are the fresh samples.
ARMS: Arms = {
    "cfm": {},
    "stablevm-fifo256": _fifo(256),
    "stablevm-va-repa": _fifo(256) | _ALIGNED,
    "va-repa": _ALIGNED,
    "stablevm-from-0.5": _fifo(256) | {"references_from": 0.5},
    "stablevm-class": _WHOLE_CLASS,
    "stablevm-fifo64": _fifo(64),
    "stablevm-fifo256-batch": _fifo(256) | {"bank_anchors": "batch"},
    "repa": {"use_proj_loss": True, "proj_weight_schedule": "constant"},
    "va-repa-hard": {"use_proj_loss": True, "proj_weight_schedule": "hard"},
}
FIRST = ",".join(list(ARMS)[:6])
# Options that are the study's own, or that have no effect on what is compared.
_OF_THE_STUDY = frozenset(
    {
        "exp_name", "output_dir", "data_dir", "seed", "max_train_steps", "epochs", "model", "batch_size", "resume",
        "learning_rate", "ema_decay", "resume_step", "checkpointing_steps", "checkpoints_kept", "lr_schedule",
    }
)  # fmt: skip
# Options of training that name a file or a folder, which a file of arms gives as text.
_PATHS = frozenset(field.name for field in fields(TrainConfig) if field.type in (Path, Path | None))


@dataclass(frozen=True)
class StudyConfig:
    """Train several arms on one data set and compare them at equal steps, with the spread over seeds.

    The arms differ in their targets or their alignment only. Each is trained with the same seeds, sampled without
    guidance and evaluated by one extractor at the same points of the training. Writes a JSON file for each arm, seed
    and point, a table, a figure, and a picture with images of each arm. To resume after an interruption, or to add
    arms, seeds or points, run it again.
    """

    data_dir: Path
    """Prepared data with the splits train and test."""
    extractor: Path
    """Folder of the extractor that evaluates (stablevm extractor), best trained on other images."""
    output_dir: Path = Path("study")
    """Folder for runs, results, study.md, study.png and samples.png."""
    arms: str = FIRST
    """Names of arms separated by commas: cfm, stablevm-fifo256, stablevm-va-repa, va-repa, stablevm-from-0.5,
    stablevm-class, stablevm-fifo64, stablevm-fifo256-batch, repa, va-repa-hard; or a TOML file with a table of train's
    options for each arm. The others are compared with the first."""
    seeds: Count = 3
    """Seeds 0, 1, ...: all arms with the first, then all with the second."""
    points: str = "500,1000,2000"
    """Steps at which the moving average is evaluated, separated by commas; training ends with the last."""
    model: str = "SiT-XS/4"
    """Network, as in train."""
    batch_size: Count = 32
    """Samples per step."""
    learning_rate: Positive = 1e-3
    """Constant rate of AdamW, after a rise over the first 100 steps."""
    ema_decay: Decay = 0.995
    """Decay of the moving average of weights."""
    weighting: TimeName = "logit_normal"
    """Distribution of training times."""
    enc_type: str = "extractor"
    """Encoder of the arms with alignment."""
    encoder_weights: str | None = None
    """File of the encoder's weights. Default: with extractor, those of --extractor, which then evaluates its own
    features; better are those of another seed, or of stablevm encoder, which learns without labels."""
    features_dir: Path | None = None
    """Folder of the encoder's tokens (stablevm prepare features), which are read instead of running the encoder."""
    encoder_depth: Count = 2
    """Block, from 1, whose tokens are aligned."""
    num_fid_samples: Count = 2000
    """Images that are evaluated at each point."""
    num_steps: Count = 20
    """Steps of Euler's method for each image."""
    per_proc_batch_size: Count = 250
    """Images that are made at a time."""

    @property
    def steps(self) -> list[int]:
        """The points in order."""
        found = distinct_indices(self.points)
        if not found or min(found) < 1:
            raise UserError(f"--points {self.points}: expected different steps from 1, such as 500,1000")
        return sorted(found)

    @property
    def fixed(self) -> dict[str, Any]:
        """What must not change while a study is resumed: all options but those that only add to it."""
        free = {"output_dir", "arms", "seeds", "points", "per_proc_batch_size"}
        return in_json({field.name: getattr(self, field.name) for field in fields(self) if field.name not in free})

    def arms_by_name(self) -> Arms:
        """The options of each arm; UserError for unknown arms, or options that are not train's or the study's own."""
        if self.arms.endswith(".toml"):
            return _arms_in(Path(self.arms))
        names = [name.strip() for name in self.arms.split(",")]
        unknown = [name for name in names if name not in ARMS]
        if unknown or len(set(names)) != len(names):
            raise UserError(f"--arms {self.arms}: expected different ones of {', '.join(ARMS)}, or a file in .toml")
        return {name: ARMS[name] for name in names}

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        require(
            self,
            [
                writable("output_dir", self.output_dir),
                ("num_fid_samples", self.num_fid_samples >= 10, "at least 10"),
            ],
        )
        _ = self.steps, self.arms_by_name()


def in_json(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a JSON file holds them, with paths as text."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}


def _arms_in(path: Path) -> Arms:
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--arms {path}: can't be read ({error})") from None
    known = {field.name for field in fields(TrainConfig)} - _OF_THE_STUDY
    arms: Arms = {}
    for name, options in found.items():
        if not isinstance(options, Mapping) or Path(name).name != name:
            raise UserError(f"--arms {path}: {name}: expected a table of options with the name of a file")
        arms[name] = {option.replace("-", "_"): value for option, value in options.items()}
        arms[name] |= {option: Path(value) for option, value in arms[name].items() if option in _PATHS}
        wrong = [option for option in arms[name] if option not in known]
        if wrong:
            raise UserError(f"--arms {path}: {name}: {some_of(wrong)}: expected options of train that arms may have")
    if not arms:
        raise UserError(f"--arms {path}: holds no arm; give a table of options for each")
    return arms
