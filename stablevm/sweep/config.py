"""The options of `stablevm sweep`, and the combinations that they ask for. Free of torch."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from stablevm.choices import Precision, Weights
from stablevm.evaluation.config import EvaluationOptions, MetricOptions
from stablevm.sampling.config import GenerateConfig, HardwareOptions, ImageOptions
from stablevm.solvers.settings import SamplerOptions
from stablevm.support.errors import UserError
from stablevm.support.options import as_typed, require, writable
from stablevm.support.ranges import Time
from stablevm.training.average_config import WIDTH

WEIGHTS = ("ema", "model")  # values of `average` that are no widths
OF_LABELS = ("guidance_low", "guidance_high")  # axes without effect where there is no guidance by labels
MOST = 1000  # combinations
Value = float | str
Point = Mapping[str, Value]  # a combination: the value of each axis


@dataclass(frozen=True, kw_only=True)
class GridOptions:
    """Values separated by commas, of which all combinations are evaluated."""

    GROUP: ClassVar[str] = "grid"

    average: str = "ema"
    """Weights: ema and model, those of the checkpoint, or relative widths of averages after training, such as 0.05,0.1,
    which are made from the run's snapshots (stablevm average)."""
    cfg_scale: str = "1"
    """Guidance by labels: 1 is none."""
    guidance_low: str = "0"
    """Lowest times with it, in [0, 1]."""
    guidance_high: str = "1"
    """Highest times with it, in [0, 1]."""
    guide_scale: str = "1"
    """Guidance by the weaker network --guide-ckpt: 1 is none."""


AXES = tuple(field.name for field in fields(GridOptions))


@dataclass(frozen=True, kw_only=True)
class SweepConfig(GridOptions, ImageOptions, SamplerOptions, HardwareOptions, MetricOptions):
    """Evaluate samples of a checkpoint for all combinations of guidance and averages, into a table and a picture.

    Run again, it keeps what is finished, also with more values.
    """

    GROUP: ClassVar[str] = "run"

    ckpt: Path
    """Checkpoint folder; a run's folder, for its newest; or hf:OWNER/NAME[@REVISION], on the Hugging Face Hub."""
    output_dir: Path = Path("sweep")
    """Folder for sweep.txt, sweep.json, sweep.png and the results of each combination."""
    precision: Precision = "fp32"
    """Arithmetic of the network; the solver's is always 64 bits."""
    vae: str | None = None
    """Autoencoder: ema, mse, or the folder of one to decode with. Default: the one that the checkpoint records."""
    guide_ckpt: Path | None = None
    """Checkpoint folder, run's folder, or hf:OWNER/NAME[@REVISION] of a weaker network for guidance (see generate)."""
    guide_weights: Weights = "ema"
    """Which of its weights: ema, the moving average; model, those of the last step."""
    guide_low: Time = 0.0
    """Lowest time with guidance by it, in [0, 1]."""
    guide_high: Time = 1.0
    """Highest time with guidance by it, in [0, 1]."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range, alone or in a combination."""
        super().validate()
        require(self, [writable("output_dir", self.output_dir)])
        for axis in AXES:
            self.values(axis)
        if self.guide_ckpt is None and self.values("guide_scale") != (1.0,):
            raise UserError(f"{as_typed('guide_scale', self.guide_scale)}: expected --guide-ckpt with it")
        points = self.points()
        if len(points) > MOST:
            raise UserError(f"{len(points):,} combinations of the grid's values: expected at most {MOST:,}")
        for point in points:
            self.request(point, self.ckpt).validate()

    def values(self, axis: str) -> tuple[Value, ...]:
        """The values of an axis, ascending, words first; UserError for others than it takes, and for repeated ones."""
        text = getattr(self, axis)
        words = [word.strip() for word in text.split(",")]
        try:
            found = [word if axis == "average" and word in WEIGHTS else float(word) for word in words]
        except ValueError:
            also = f" or {' or '.join(WEIGHTS)}" if axis == "average" else ""
            raise UserError(f"{as_typed(axis, text)}: expected numbers{also}, separated by commas") from None
        if len(set(found)) < len(found):
            raise UserError(f"{as_typed(axis, text)}: expected different values")
        if axis == "average":
            for width in (each for each in found if isinstance(each, float) and each not in WIDTH):
                raise UserError(f"{as_typed(axis, width)}: expected a width {WIDTH.words}, or {' or '.join(WEIGHTS)}")
        return tuple(sorted(found, key=lambda value: (isinstance(value, float), value)))

    def points(self) -> list[dict[str, Value]]:
        """All combinations, those that share the weights one after another."""
        return [dict(zip(AXES, each, strict=True)) for each in itertools.product(*map(self.values, AXES))]

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes with several values."""
        return tuple(axis for axis in AXES if len(self.values(axis)) > 1)

    def request(self, point: Point, ckpt: Path) -> GenerateConfig:
        """The options of `generate` for a combination, with the weights in `ckpt`."""
        names = {field.name for field in fields(GenerateConfig)}
        shared = {field.name: getattr(self, field.name) for field in fields(self) if field.name in names - set(AXES)}
        numbers: dict[str, Any] = {axis: point[axis] for axis in AXES if axis != "average"}
        weights = point["average"] if point["average"] in WEIGHTS else "ema"
        return GenerateConfig(**{**shared, **numbers, "ckpt": ckpt, "weights": weights})

    def evaluation(self, output: Path) -> EvaluationOptions:
        """The options of `evaluate`, with the file for the results."""
        shared = {field.name: getattr(self, field.name) for field in fields(MetricOptions)}
        return EvaluationOptions(**shared, output=output)

    def warnings(self) -> list[str]:
        """One line for each option that was given and has no effect in any combination."""
        found = [self.request(point, self.ckpt).warnings() for point in self.points()]
        everywhere = [line for line in found[0] if all(line in lines for lines in found)]
        intervals = [axis for axis in OF_LABELS if axis in self.axes and self.values("cfg_scale") == (1.0,)]
        idle = [f"{as_typed(axis, getattr(self, axis))} has no effect with --cfg-scale 1" for axis in intervals]
        return [*super().warnings(), *everywhere, *idle]


def described(point: Point, axes: tuple[str, ...]) -> str:
    """A combination for people, by those of the axes that it has: "cfg-scale 1.5, average 0.05"."""
    words = [f"{axis.replace('_', '-')} {shown(point[axis])}" for axis in axes if axis in point]
    return ", ".join(words) or "the only combination"


def shown(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else value
