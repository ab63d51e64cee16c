"""One training run: its options together, their checks, and how they are kept beside it. Free of torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from stablevm.support.cards import card_of, read_object
from stablevm.support.errors import UserError
from stablevm.support.options import as_typed, idle_warnings, require, some_of, writable
from stablevm.training.options import (
    AlignmentOptions,
    CheckpointOptions,
    DataOptions,
    EvaluationOptions,
    HardwareOptions,
    MeanFlowOptions,
    NetworkOptions,
    ObjectiveOptions,
    OptimisationOptions,
    UnneededOptions,
)

CONFIG_FILE = "config.json"
# The published intervals, in steps, of checkpoints and of grids. A run of fewer than five of them has about ten of its
# own, which include the published steps.
CHECKPOINT_INTERVAL, PREVIEW_INTERVAL = 50_000, 10_000
FEWEST_INTERVALS, SHARES_OF_SHORT_RUNS = 5, 10
KEPT_BETWEEN = 2  # checkpoints of a short run that nobody asked for: one to resume from, and one if that is damaged
_REMEDY = "restore it, or start over under another --exp-name"
# What aligned runs of version 0.1 did, whose files do not know the option.
BEFORE = {"encoder_resize": "antialiased"}
TRACKERS = ("tensorboard", "wandb", "none")

# Options of StableVelocity's train.py that are taken so that its commands run, and why nothing hangs on them.
_NOT_NEEDED = {
    "logging_dir": "logs are in OUTPUT_DIR/EXP_NAME",
    "legacy": "stablevm import knows the names of early checkpoints",
    "bank_chunk_size": "references are processed in blocks that fit into memory, with the same result",
}

# May differ between a run and its continuation: they change neither the batches nor the network.
FREE_ON_RESUME = frozenset(
    {
        "resume", "resume_step", "exp_name", "output_dir", "report_to", "num_workers", "max_train_steps", "epochs",
        "data_dir",  # the data may have moved: `start.check_data` compares the content
        "checkpointing_steps", "checkpoints_kept", "keep_best", "max_bad_steps", "sampling_steps", "log_steps",
        "prefill_batch_size", "prefill_workers", "bank_on_gpu", "compile", "checkpoint_activations", "vae",
        "proj_stop_step",  # `start.changes` tells of it
        "features_dir",  # the tokens are those of the run's encoder and data, which is checked
        *_NOT_NEEDED, "eval_every", "eval_samples", "eval_reference", "eval_extractor", "eval_enc_type", "eval_weights",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    DataOptions,
    NetworkOptions,
    OptimisationOptions,
    ObjectiveOptions,
    MeanFlowOptions,
    AlignmentOptions,
    CheckpointOptions,
    EvaluationOptions,
    HardwareOptions,
    UnneededOptions,
):
    """Train a network into OUTPUT_DIR/EXP_NAME. To resume after an interruption, run the same command again."""

    GROUP: ClassVar[str] = "run"

    exp_name: str
    """Name of the run; logs, samples and checkpoints go to OUTPUT_DIR/EXP_NAME."""
    output_dir: Path = Path("exps")
    """Folder of all runs."""
    report_to: str = "tensorboard"
    """wandb, tensorboard, none; several separated by commas. Metrics always go to metrics.jsonl as well."""

    @property
    def folder(self) -> Path:
        return self.output_dir / self.exp_name

    @property
    def accumulation_steps(self) -> int:
        """Parts of a step."""
        return 1 if self.gradient_accumulation_steps is None else self.gradient_accumulation_steps

    @property
    def bank_is_fixed(self) -> bool:
        """Whether the bank holds all of the data, so that no step changes it and no checkpoint needs it."""
        return self.bank_capacity_per_class == "all"

    @property
    def meanflow_guided(self) -> bool:
        """Whether the targets of MeanFlow hold guidance."""
        return (self.meanflow_omega, self.meanflow_kappa) != (1.0, 0.0)

    @property
    def encoder_names(self) -> list[str]:
        return [name.strip() for name in self.enc_type.split(",")] if self.use_proj_loss else []

    @property
    def encoder_files(self) -> list[Path | None]:
        """One weights file per encoder; None where timm downloads them."""
        if self.encoder_weights is None:
            return [None] * len(self.encoder_names)
        return [Path(part.strip()) for part in self.encoder_weights.split(",")]

    @property
    def trackers(self) -> list[str]:
        names = [name.strip() for name in self.report_to.split(",")]
        return [name for name in names if name != "none"]

    @property
    def weighs_velocities(self) -> bool:
        """Whether errors of predicted data are weighed as errors of the velocity."""
        return self.prediction == "x" and self.loss_space == "v"

    def epoch_steps(self, samples: int) -> int:
        """Steps of all --epochs on a data set of `samples`."""
        return math.ceil(self.epochs * samples / self.batch_size)

    def total_steps(self, samples: int) -> int:
        """Steps until the first of --epochs and --max-train-steps ends, on a data set of `samples`."""
        return min(self.max_train_steps, self.epoch_steps(samples))

    def checkpoint_interval(self, total_steps: int) -> int:
        """Steps from one checkpoint to the next, in a run of `total_steps`."""
        return _interval(self.checkpointing_steps, CHECKPOINT_INTERVAL, total_steps, self.log_steps)

    def is_thinned(self, total_steps: int) -> bool:
        """Whether a run of `total_steps` removes checkpoints off the published interval, but for `KEPT_BETWEEN`."""
        is_short = self.checkpoint_interval(total_steps) < CHECKPOINT_INTERVAL
        return self.checkpointing_steps is None and is_short and self.checkpoints_kept == 0

    def preview_interval(self, total_steps: int) -> int:
        """Steps from one grid of samples to the next, in a run of `total_steps`; 0 without any."""
        return _interval(self.sampling_steps, PREVIEW_INTERVAL, total_steps, self.log_steps)

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        require(
            self,
            [
                ("exp_name", self.exp_name not in ("", "..") and Path(self.exp_name).name == self.exp_name,
                 "a folder's name"),
                writable("output_dir", self.output_dir),
                writable("exp_name", self.folder),
                ("report_to", set(self.trackers) <= set(TRACKERS), f"of {', '.join(TRACKERS)}, comma-separated"),
                ("contrastive_coeff", self.contrastive_coeff == 0 or self.batch_size > 1,
                 "0 with --batch-size 1: there is no other sample"),
                ("prediction", self.prediction == "v" or not self.meanflow,
                 "v with --meanflow, which learns velocities"),
                ("contrastive_coeff", self.contrastive_coeff == 0 or not self.meanflow, "0 with --meanflow"),
                ("cfg_prob", not self.meanflow or not self.meanflow_guided or self.cfg_prob > 0,
                 "more than 0 with --meanflow-omega, which needs the null class"),
                ("meanflow_guidance_high", self.meanflow_guidance_low <= self.meanflow_guidance_high,
                 f"at least --meanflow-guidance-low {self.meanflow_guidance_low:g}"),
                ("eval_reference", self.eval_every == 0 or self.eval_reference is not None,
                 "a reference to evaluate against with --eval-every"),
                ("keep_best", self.eval_every == 0 or self.keep_best is None,
                 "none with --eval-every, which keeps the checkpoint of the lowest distance"),
                ("keep_best", self.use_proj_loss or self.keep_best != "alignment_loss",
                 "a loss that is computed; add --use-proj-loss or give velocity_loss"),
                ("cls_token", self.use_proj_loss or not self.cls_token,
                 "--use-proj-loss, whose first encoder gives the token, with --proj-coeff 0 for no alignment"),
                ("cls_token", not (self.cls_token and self.meanflow), "no --meanflow with it"),
                ("loss_space", self.loss_space in (None, "v", self.prediction), "v, or --prediction x with it"),
                ("contrastive_coeff", self.contrastive_coeff == 0 or not self.weighs_velocities,
                 "0 with --loss-space v: the other sample's velocity is at another noisy sample"),
                ("weighting_mean", self.weighting_mean is None or self.weighting != "uniform",
                 "--weighting lognormal or logit_normal with it"),
                ("weighting_std", self.weighting_std is None or self.weighting != "uniform",
                 "--weighting lognormal or logit_normal with it"),
                ("features_dir", self.features_dir is None or len(self.encoder_names) <= 1, "only with one --enc-type"),
                ("features_dir", self.features_dir is None or not self.cls_token,
                 "none with --cls-token, which needs the encoder"),
                ("encoder_weights", len(self.encoder_files) == len(self.encoder_names) or not self.use_proj_loss,
                 f"one file for each of --enc-type {self.enc_type}"),
            ],
        )  # fmt: skip

    def warnings(self) -> list[str]:
        """One line for each option that was given and has no effect, at all or with the others."""
        idle: dict[str, str] = {} if self.init_from else {"init_weights": "no --init-from"}
        if self.eval_every == self.sampling_steps == 0:
            idle["vae"] = "--eval-every 0 and --sampling-steps 0"
        if self.eval_every == 0:
            idle_alone = ("eval_samples", "eval_reference", "eval_extractor", "eval_enc_type", "eval_weights")
            idle |= dict.fromkeys(idle_alone, "--eval-every 0")
        elif self.eval_extractor is not None:
            idle |= dict.fromkeys(("eval_enc_type", "eval_weights"), "--eval-extractor")
        if self.optimizer != "muon":
            idle["muon_momentum"] = f"--optimizer {self.optimizer}"
        if not self.cls_token:
            idle["cls_coeff"] = "--no-cls-token"
        if self.loss_type == "si":
            bank = ("bank_capacity_per_class", "prefill_bank_fully", "prefill_batch_size", "prefill_workers")
            idle |= dict.fromkeys((*bank, "bank_on_gpu", "bank_anchors", "references_from"), "--loss-type si")
        elif self.bank_is_fixed:
            idle["prefill_bank_fully"] = "--bank-capacity-per-class all"
        if not self.meanflow:
            meanflow = ("instants", "power", "omega", "kappa", "guidance_low", "guidance_high")
            idle |= {f"meanflow_{name}": "--no-meanflow" for name in meanflow}
        elif not self.meanflow_guided:
            idle |= dict.fromkeys(("meanflow_guidance_low", "meanflow_guidance_high"), "--meanflow-omega 1")
        if not self.use_proj_loss:
            projection = ("proj_coeff", "proj_weight_schedule", "proj_tau", "proj_k", "enc_type", "encoder_weights")
            more = ("encoder_depth", "encoder_resize", "features_dir", "use_irepa", "irepa_gamma", "proj_stop_step")
            idle |= dict.fromkeys((*projection, *more), "--no-use-proj-loss")
        if self.use_proj_loss and self.proj_weight_schedule != "sigmoid":
            idle["proj_k"] = f"--proj-weight-schedule {self.proj_weight_schedule}"
        if self.use_proj_loss and self.proj_weight_schedule == "constant":
            idle["proj_tau"] = "--proj-weight-schedule constant"
        if self.use_proj_loss and not self.use_irepa:
            idle["irepa_gamma"] = "--no-use-irepa"
        given = [(option, getattr(self, option)) for option in _NOT_NEEDED]
        not_needed = [
            f"{as_typed(option, value)} is not needed: {_NOT_NEEDED[option]}"
            for option, value in given
            if value is not None and value is not False
        ]
        return idle_warnings(self, idle) + not_needed

    def to_dict(self) -> dict[str, Any]:
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    @classmethod
    def read(cls, run: Path) -> "TrainConfig":
        """The options that the run in the folder `run` was started with.

        UserError for a damaged file, a field of another type, or one that this version does not know; `validate` knows
        the ranges.
        """
        path = run / CONFIG_FILE
        values = read_object(path, "run", remedy=_REMEDY)
        if values.get("use_proj_loss"):
            values = BEFORE | values
        return card_of(cls, values, f"run: {path}", finite=False, remedy=_REMEDY)

    @classmethod
    def resumed(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """With `resume`, the options of the run that is resumed, to stand in for those that are not given; else none.

        UserError, naming the runs that there are, where there is none of the name and no data are given for a new one.
        """
        if not given.get("resume") or "exp_name" not in given:
            return {}
        output_dir = given.get("output_dir", cls.output_dir)
        folder = output_dir / given["exp_name"]
        if (folder / CONFIG_FILE).exists():
            run = cls.read(folder)
            return {field.name: getattr(run, field.name) for field in fields(cls)} | {"resume_step": 0}
        if "data_dir" in given:
            return {}
        runs = sorted(path.parent.name for path in output_dir.glob(f"*/{CONFIG_FILE}"))
        there = f"the runs in {output_dir} are {some_of(runs)}" if runs else f"{output_dir} has no runs"
        raise UserError(f"--resume: {folder} is no run; {there}")

    @classmethod
    def of_run(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """What a run's own file says, as options: not from which step its last command resumed."""
        known = {name: value for name, value in values.items() if name not in ("resume", "resume_step")}
        return BEFORE | known if values.get("use_proj_loss") else known

    def check_continues(self, earlier: "TrainConfig") -> None:
        """UserError naming the first option that contradicts the run which this one continues."""
        free = FREE_ON_RESUME - ({"max_train_steps", "epochs"} if self.lr_schedule == "cosine" else set())
        mine, theirs = self.to_dict(), earlier.to_dict()
        for option, value in mine.items():
            if option not in free and value != theirs[option]:
                raise UserError(
                    f"{self.folder} holds a run with {as_typed(option, theirs[option])}, this command says "
                    f"{as_typed(option, value)}: give the run's, or another --exp-name"
                )


def _interval(given: int | None, published: int, total_steps: int, log_steps: int) -> int:
    """The steps that were given, or else the published ones where they fit into the run five times.

    A shorter run has a tenth of its steps. If it reaches a published step, it has the largest divisor of the published
    interval up to that tenth, so that a file is due at each published step too.
    """
    if given is not None:
        return given
    if total_steps >= FEWEST_INTERVALS * published:
        return published
    share = math.ceil(total_steps / SHARES_OF_SHORT_RUNS)
    steps = range(1, share + 1) if total_steps < published else _divisors(published, share)
    with_metrics = [each for each in steps if each % log_steps == 0]
    return max(with_metrics or steps)


def _divisors(number: int, limit: int) -> list[int]:
    """The divisors of `number` up to `limit`."""
    return [each for each in range(1, limit + 1) if number % each == 0]
