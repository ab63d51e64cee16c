"""The options of `stablevm variance`. Free of torch, so that `--help` stays quick."""

from dataclasses import dataclass
from pathlib import Path

from stablevm.choices import PathName, TimeName
from stablevm.support.errors import UserError
from stablevm.support.options import distinct_indices, require, writable
from stablevm.support.ranges import Natural, Time


@dataclass(frozen=True)
class VarianceConfig:
    """Measure the variance of the training targets on a data set, and say whether StableVM can help, and with which
    options: --references-from, --proj-tau and the split point xi.

    It is the variance of the targets of CFM and StableVM about the exact velocity of each class's samples, over time,
    with the effective number of references. Writes variance.png and variance.json.
    """

    data_dir: Path
    """Prepared data set: a folder with dataset.json, or one whose folder train holds it."""
    output_dir: Path = Path("variance")
    """Folder for variance.png and variance.json."""
    path_type: PathName = "linear"
    """Path between data and noise."""
    references: int = 256
    """References of each sample, including itself: the bank's capacity per class. Smaller classes have fewer."""
    classes: str | None = None
    """Classes to measure: indices separated by commas, such as 3,5, or all. Default: 10 chosen by the seed."""
    references_from: Time = 0.0
    """Time in [0, 1] below which StableVM uses no references, as in training."""
    weighting: TimeName = "uniform"
    """Distribution of training times, over which the advice averages."""
    horizontal_flips: bool = False
    """Count mirrored samples too; the data must have been encoded with --flip."""
    rows: int = 100
    """Samples of each class at each time, 2 or more."""
    times: int = 20
    """Number of times, evenly spaced up to 1; 2 or more."""
    seed: Natural = 0
    """Seed of classes, samples, references and noise; 0 or more. Latents are sampled as for the bank of a training
    run with this seed."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        require(
            self,
            [
                ("references", self.references >= 2, "at least 2; with 1, StableVM is CFM"),
                ("rows", self.rows >= 2, "at least 2"),
                ("times", self.times >= 2, "at least 2"),
                writable("output_dir", self.output_dir),
            ],
        )
        self.class_indices()

    def class_indices(self) -> tuple[int, ...] | None:
        """The numbers in `classes`; None for "all" and for the default. UserError if they are not distinct numbers."""
        if self.classes is None or self.classes == "all":
            return None
        indices = distinct_indices(self.classes)
        if indices is None:
            raise UserError(f"--classes {self.classes}: expected all, or distinct class indices from 0, such as 3,5")
        return indices
