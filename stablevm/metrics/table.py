"""The list of metrics, in the order of the table; tables, plots, reports and training all follow it."""

from collections.abc import Iterable
from typing import Any

from stablevm.metrics.density_coverage import COVERAGE, DENSITY
from stablevm.metrics.frechet import FID, FRECHET, SFID, SPATIAL_FRECHET
from stablevm.metrics.kid import KERNEL_DISTANCE, KID
from stablevm.metrics.memorisation import MEMORISATION
from stablevm.metrics.metric import FeatureSets, Metric, Values
from stablevm.metrics.precision_recall import PRECISION, RECALL
from stablevm.metrics.score import INCEPTION_SCORE, OTHER_SCORE

METRICS: list[Metric] = [
    FID,
    FRECHET,
    SFID,
    SPATIAL_FRECHET,
    INCEPTION_SCORE,
    OTHER_SCORE,
    KID,
    KERNEL_DISTANCE,
    PRECISION,
    RECALL,
    DENSITY,
    COVERAGE,
    MEMORISATION,
]


def results_of(sets: FeatureSets, *, subset: bool = False) -> dict[str, Any]:
    """The results by name, with what they were computed from; for a subset only the metrics that depend on its size."""
    values: dict[str, Any] = {"extractor": sets.extractor}
    for metric in METRICS:
        if metric.published in (None, sets.published) and not (subset and metric.whole_set):
            values |= metric.values(sets)
    return values


def further_results(sets: FeatureSets, known: Iterable[str]) -> dict[str, Any]:
    """The results of the metrics for features of any network whose names are not among `known`."""
    found: dict[str, Any] = {}
    for metric in METRICS:
        if metric.published is None and metric.name not in known:
            found |= metric.values(sets)
    return found


def metrics_in(values: Iterable[str]) -> list[Metric]:
    """The metrics whose names are among `values`, in the order of the table."""
    names = set(values)
    return [metric for metric in METRICS if metric.name in names]


def result_rows(values: Values, statistics: str, images: str) -> list[tuple[str, str, str]]:
    """The rows (title, value, meaning) of results; `statistics` and `images` name those of the reference."""
    return [metric.row(values, statistics, images) for metric in metrics_in(values)]


def panels_of(values: Iterable[str]) -> list[list[Metric]]:
    """The metrics among `values`, in groups that share a panel of a figure."""
    found: dict[str, list[Metric]] = {}
    for metric in metrics_in(values):
        found.setdefault(metric.panel, []).append(metric)
    return list(found.values())
