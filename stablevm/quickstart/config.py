"""The options of `stablevm quickstart`. Free of torch, so that `--help` stays quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stablevm.support.options import require, writable


@dataclass(frozen=True)
class QuickstartConfig:
    """Prepare digits, train, sample, evaluate and report, in minutes on a CPU. To resume after an interruption, run the
    same command again."""

    output_dir: Path = Path("quickstart")
    """Folder for everything: data, extractor, run, samples, report.html and summary.json."""
    seed: int = 0
    """Seed of the extractor, the training and the samples; 0 or more."""
    loss_type: Literal["stablevm", "si"] = "stablevm"
    """stablevm: targets averaged over references. si: plain flow matching, for comparison."""
    steps: int = 2000
    """Training steps, 1 or more."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        numbers = [("steps", self.steps >= 1, "at least 1"), ("seed", self.seed >= 0, "0 or more")]
        require(self, [*numbers, writable("output_dir", self.output_dir)])
