"""The results of a study: files for each arm, seed and point, and the comparison of arms with the first one."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stablevm.support.cards import read_card
from stablevm.support.files import write_json

FOLDER = "results"
METRICS = {  # names of metrics with their titles in the table; the first is plotted, and lower is better
    "frechet_test": "Fréchet distance",
    "precision": "precision",
    "recall": "recall",
    "coverage": "coverage",
    "accuracy": "accuracy",
}
_REMEDY = "remove it and run the study again"


@dataclass(frozen=True)
class Result:
    """The numbers of one arm, with one seed, after `step` steps."""

    arm: str
    seed: int
    step: int
    options: dict[str, Any]  # of training, by which the arms differ
    metrics: dict[str, Any]
    # Processor seconds of the training since its beginning; None where it was interrupted, so that they are not known.
    seconds: float | None = None
    study: dict[str, Any] = field(default_factory=dict)  # the options that all arms share

    def write(self, folder: Path) -> None:
        write_json(path_of(folder, self.arm, self.seed, self.step), asdict(self))


def path_of(folder: Path, arm: str, seed: int, step: int) -> Path:
    """The file of a result."""
    return folder / FOLDER / f"{arm}-seed{seed}-{step:07d}.json"


def read(path: Path) -> Result:
    """A result that was written before; UserError for a damaged file."""
    return read_card(path, Result, "result of a study", remedy=_REMEDY)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its standard error, which one seed does not have."""

    mean: float
    error: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), error, len(values))

    def text(self, decimals: int) -> str:
        error = f" ± {self.error:.{decimals}f}" if self.error is not None else ""
        return f"{self.mean:.{decimals}f}{error}"


class Comparison:
    """All results of a study, in the order of its arms."""

    def __init__(self, results: Sequence[Result], arms: Sequence[str]) -> None:
        self._results = {(each.arm, each.seed, each.step): each for each in results}
        self.arms = [arm for arm in arms if any(each.arm == arm for each in results)]
        self.steps = sorted({each.step for each in results})

    def values(self, arm: str, step: int, metric: str) -> dict[int, float]:
        """The values of a metric by seed."""
        found = ((seed, each) for (name, seed, at), each in sorted(self._results.items()) if (name, at) == (arm, step))
        return {seed: float(each.metrics[metric]) for seed, each in found}

    def estimate(self, arm: str, step: int, metric: str) -> Estimate | None:
        """The mean over seeds; None before the first seed is done."""
        values = list(self.values(arm, step, metric).values())
        return Estimate.of(values) if values else None

    def gain(self, arm: str, step: int, metric: str) -> Estimate | None:
        """How much lower than the first arm's the metric is, seed by seed; None without a common seed.

        With one seed, arms start from the same weights and see the same noise, so that differences vary less than the
        values do.
        """
        first, other = (self.values(name, step, metric) for name in (self.arms[0], arm))
        common = sorted(first.keys() & other.keys())
        return Estimate.of([first[seed] - other[seed] for seed in common]) if common else None

    def seconds(self, arm: str, step: int) -> float | None:
        """The mean processor seconds of training up to a point, over the seeds for which they are known."""
        found = [each.seconds for (name, _, at), each in self._results.items() if (name, at) == (arm, step)]
        known = [each for each in found if each is not None]
        return statistics.fmean(known) if known else None

    def table(self) -> Iterator[str]:
        """The lines of a table in Markdown, for each point."""
        distance = next(iter(METRICS))
        for step in self.steps:
            yield f"\nAfter {step:,} steps:\n"
            titles = [
                "arm",
                "seeds",
                *METRICS.values(),
                f"below {self.arms[0]}",
                "standard errors",
                "processor seconds",
            ]
            yield from (_row(titles), _row(["---"] * len(titles)))
            for arm in self.arms:
                means = {metric: self.estimate(arm, step, metric) for metric in METRICS}
                first = means[distance]
                if first is None:
                    continue
                numbers = [each.text(2 if metric == distance else 3) for metric, each in means.items() if each]
                seconds = self.seconds(arm, step)
                spent = "" if seconds is None else f"{seconds:,.0f}"
                yield _row([arm, str(first.count), *numbers, *self._gain_cells(arm, step, distance), spent])

    def _gain_cells(self, arm: str, step: int, metric: str) -> tuple[str, str]:
        gain = self.gain(arm, step, metric)
        if gain is None or arm == self.arms[0]:
            return "", ""
        return gain.text(2), f"{gain.mean / gain.error:.1f}" if gain.error else ""

    def curves(self) -> Mapping[str, list[tuple[int, Estimate]]]:
        """The distance of each arm over the steps."""
        metric = next(iter(METRICS))
        found = {arm: [(step, self.estimate(arm, step, metric)) for step in self.steps] for arm in self.arms}
        return {arm: [(step, each) for step, each in points if each is not None] for arm, points in found.items()}


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
