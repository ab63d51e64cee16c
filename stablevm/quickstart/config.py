"""The options of `stablevm quickstart`. Free of torch, so that `--help` stays quick."""

from dataclasses import dataclass
from pathlib import Path

from stablevm.choices import LossName
from stablevm.support.options import require, writable
from stablevm.support.ranges import Count, Natural


@dataclass(frozen=True)
class QuickstartConfig:
    """Prepare digits, train with StableVM and with flow matching, sample, evaluate and report, in minutes on a CPU. To
    resume after an interruption, run the same command again."""

    output_dir: Path = Path("quickstart")
    """Folder for everything: data, extractor, run, samples, report.html and summary.json."""
    seed: Natural = 0
    """Seed of the extractor, the training and the samples; 0 or more."""
    loss_type: LossName = "stablevm"
    """stablevm: targets averaged over references. si: plain flow matching."""
    compare: bool = True
    """Train the other of the two with the same steps and seed as well, and show both; --no-compare takes about 60 %
    of the time."""
    steps: Count = 1000
    """Training steps, of each of the two; 1 or more."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        require(self, [writable("output_dir", self.output_dir)])
