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
    seconds_per_step: float | None = None  # processor seconds since the point before; None as above

    def write(self, folder: Path) -> None:
        write_json(path_of(folder, self.arm, self.seed, self.step), asdict(self))


def name_of(arm: str, seed: int, step: int) -> str:
    """The name of a point's files."""
    return f"{arm}-seed{seed}-{step:07d}"


def path_of(folder: Path, arm: str, seed: int, step: int) -> Path:
    """The file of a result."""
    return folder / FOLDER / f"{name_of(arm, seed, step)}.json"


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
        return _difference(self.values(self.arms[0], step, metric), self.values(arm, step, metric))

    def step_seconds(self, arm: str) -> float | None:
        """Processor seconds of a step: the least of all seeds and points, which other work disturbed least."""
        found = [each.seconds_per_step for (name, *_), each in self._results.items() if name == arm]
        return min((each for each in found if each is not None), default=None)

    def equal_time(self) -> "EqualTime | None":
        """The arms after the processor time that the quickest one needs for all its steps; None before one is timed."""
        seconds = {arm: self.step_seconds(arm) for arm in self.arms}
        timed = {arm: each for arm, each in seconds.items() if each is not None}
        if not timed or len(self.steps) < 2:
            return None
        return EqualTime(timed, budget=min(timed.values()) * self.steps[-1])

    def values_after(self, arm: str, steps: float, metric: str) -> dict[int, float]:
        """The values by seed after any number of steps between the first and the last point.

        Between two points the logarithm of the metric is a line over the logarithm of the step. Only seeds that have
        both points are in it.
        """
        later = next((step for step in self.steps if step >= steps), self.steps[-1])
        earlier = max((step for step in self.steps if step < later), default=later)
        high, low = self.values(arm, later, metric), self.values(arm, earlier, metric)
        share = math.log(steps / earlier) / math.log(later / earlier) if later > earlier else 1.0
        return {seed: low[seed] ** (1 - share) * high[seed] ** share for seed in sorted(high.keys() & low.keys())}

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
                gain = self.gain(arm, step, distance) if arm != self.arms[0] else None
                seconds = self.seconds(arm, step)
                spent = "" if seconds is None else f"{seconds:,.0f}"
                yield _row([arm, str(first.count), *numbers, *_gain_cells(gain), spent])

    def equal_time_table(self) -> Iterator[str]:
        """The lines of a table of the distance at equal time; none before an arm is timed at two points."""
        equal, metric = self.equal_time(), next(iter(METRICS))
        if equal is None:
            return
        yield f"\nAt equal processor time, {equal.budget:,.0f} s (the distance between points is interpolated):\n"
        titles = ["arm", "seconds per step", "steps", METRICS[metric], f"below {self.arms[0]}", "standard errors"]
        yield from (_row(titles), _row(["---"] * len(titles)))
        first = self._after(equal, self.arms[0], metric)
        for arm, seconds in equal.step_seconds.items():
            values = self._after(equal, arm, metric)
            if values:
                gain = _difference(first, values) if arm != self.arms[0] else None
                steps = f"{equal.steps(arm):,.0f}"
                mean = Estimate.of(list(values.values())).text(2)
                yield _row([arm, f"{seconds:.3f}", steps, mean, *_gain_cells(gain)])

    def _after(self, equal: "EqualTime", arm: str, metric: str) -> dict[int, float]:
        """The values by seed at equal time; none for an arm that is not timed, or that reaches no point by then."""
        if arm not in equal.step_seconds or equal.steps(arm) < self.steps[0]:
            return {}
        return self.values_after(arm, equal.steps(arm), metric)

    def curves(self) -> Mapping[str, list[tuple[int, Estimate]]]:
        """The distance of each arm over the steps."""
        metric = next(iter(METRICS))
        found = {arm: [(step, self.estimate(arm, step, metric)) for step in self.steps] for arm in self.arms}
        return {arm: [(step, each) for step, each in points if each is not None] for arm, points in found.items()}


@dataclass(frozen=True)
class EqualTime:
    """A time that each timed arm has for its training."""

    step_seconds: dict[str, float]  # by arm
    budget: float  # processor seconds

    def steps(self, arm: str) -> float:
        """The steps that an arm makes in this time."""
        return self.budget / self.step_seconds[arm]


def _difference(first: Mapping[int, float], other: Mapping[int, float]) -> Estimate | None:
    """How much lower the second values are, seed by seed; None without a common seed."""
    common = sorted(first.keys() & other.keys())
    return Estimate.of([first[seed] - other[seed] for seed in common]) if common else None


def _gain_cells(gain: Estimate | None) -> tuple[str, str]:
    if gain is None:
        return "", ""
    return gain.text(2), f"{gain.mean / gain.error:.1f}" if gain.error else ""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
