"""The options of `stablevm average`, and the widths of averages of power-function profile. Free of torch."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from stablevm.support.options import require, writable
from stablevm.support.ranges import Natural, Range

# The relative width of a uniform average over all steps; a power function with a positive exponent is narrower.
WIDEST = math.sqrt(1 / 12)
WIDTH = Range(f"above 0 and below {WIDEST:.3f}", 0, WIDEST, without_low=True, without_high=True)


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """Make a moving average of any width from the snapshots of a run that was trained with --average-every.

    The result is a checkpoint folder for generate and evaluate, with the average as its EMA weights.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    width: Annotated[float, WIDTH]
    """Relative width of the average, as in EDM2: the standard deviation of its profile over the steps so far, such as
    0.05; above 0 and below 0.289."""
    step: Natural | None = None
    """Step at which the average ends: one with snapshots. Default: the last."""
    output: Path | None = None
    """Folder for the result. Default: RUN/averages/STEP-width-WIDTH."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        require(self, [writable("output", self.output)])
