"""How the numbers depend on the number of samples: from disjoint random subsets, whose spread gives error bars."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from stablevm.metrics.metric import FeatureSets
from stablevm.metrics.table import metrics_in, results_of
from stablevm.support import rng

SUBSETS = (8, 4, 2)  # numbers of subsets that the samples are cut into
MIN_SUBSET = 8  # images; fewer have next to no neighbours and no covariance to speak of


@dataclass(frozen=True)
class Point:
    """A number from `samples` images: mean over the subsets, and their standard deviation (None of a single one)."""

    samples: int
    mean: float
    deviation: float | None


def metric_curves(
    comparison: FeatureSets, whole: Mapping[str, Any], progress: Callable[[], object] = lambda: None
) -> dict[str, list[Point]]:
    """Points of each number by its name in the results, smallest subsets first; `whole` are the results of all samples.

    `progress` is called after each subset.
    """
    count = len(comparison.samples["pool"])
    order = torch.randperm(count, generator=rng.generator("evaluation", "subsets"))
    names = [metric.name for metric in metrics_in(whole) if not metric.whole_set]
    found: dict[str, list[Point]] = {name: [] for name in names}
    for parts in SUBSETS:
        size = count // parts
        if size < MIN_SUBSET:
            continue
        results = []
        for part in range(parts):
            rows = order[part * size : (part + 1) * size]
            samples = {kind: features[rows] for kind, features in comparison.samples.items()}
            part_of = replace(comparison, samples=samples, stored=comparison.moments)
            results.append(results_of(part_of, subset=True))
            progress()
        for name in names:
            values = torch.tensor([each[name] for each in results], dtype=torch.float64)
            found[name].append(Point(size, float(values.mean()), float(values.std())))
    for name in names:
        found[name].append(Point(count, whole[name], None))
    return found
