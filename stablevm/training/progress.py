"""What a run has measured and not yet reported, so that an interruption loses no part of a row or a mean."""

from dataclasses import dataclass, field


@dataclass
class Sums:
    """Over the taken steps since the last row of metrics, of all processes."""

    steps: int = 0  # skipped ones too
    taken: int = 0
    scalars: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # by phase
    by_time: list[list[float]] = field(default_factory=list)  # see `journal.sums_by_time`

    def add(self, other: "Sums") -> None:
        """Take in the sums over later steps."""
        self.steps += other.steps
        self.taken += other.taken
        for mine, theirs in ((self.scalars, other.scalars), (self.seconds, other.seconds)):
            for name, value in theirs.items():
                mine[name] = mine.get(name, 0.0) + value
        before = self.by_time or [[0.0] * len(row) for row in other.by_time]
        rows = zip(before, other.by_time, strict=True)
        self.by_time = [[one + two for one, two in zip(first, second, strict=True)] for first, second in rows]


@dataclass(frozen=True)
class Progress:
    """Stands in each checkpoint. Those of version 0.1 hold none, which is as if nothing had been open."""

    row: Sums = field(default_factory=Sums)  # of the coming row
    sums: dict[str, float] = field(default_factory=dict)  # of the coming means by which checkpoints are compared
    taken: int = 0  # steps in these sums
    means: dict[str, float] = field(default_factory=dict)  # by which this checkpoint is; empty for one off the interval
    bad_steps: list[int] = field(default_factory=list)  # in a row, up to this checkpoint
