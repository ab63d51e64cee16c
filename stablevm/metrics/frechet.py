"""The Fréchet distance between features, called FID and sFID only for the features of the published Inception."""

from collections.abc import Callable
from typing import Any

from stablevm.metrics.metric import FeatureSets, Metric
from stablevm.metrics.statistics import frechet_distance, moments_of


def _distance(name: str, kind: str) -> Callable[[FeatureSets], dict[str, Any]]:
    """A function that computes the distance for features of one kind: "pool", or "spatial", which keep positions."""

    def values(sets: FeatureSets) -> dict[str, Any]:
        if kind not in sets.moments:
            return {}
        return {name: frechet_distance(moments_of(sets.samples[kind]), sets.moments[kind])}

    return values


FID = Metric("fid", "FID", "to {statistics}", "lower", "frechet", _distance("fid", "pool"), published=True,
             decimals=2)  # fmt: skip
FRECHET = Metric(
    "frechet_distance", "Fréchet distance", "to {statistics}; not FID", "lower", "frechet",
    _distance("frechet_distance", "pool"), published=False, decimals=2,
)  # fmt: skip
SFID = Metric(
    "sfid", "sFID", "the same, of 2,023 spatial features; to {statistics}", "lower", "spatial",
    _distance("sfid", "spatial"), published=True, decimals=2,
)  # fmt: skip
SPATIAL_FRECHET = Metric(
    "spatial_frechet_distance", "spatial Fréchet distance", "to {statistics}; not sFID", "lower", "spatial",
    _distance("spatial_frechet_distance", "spatial"), published=False, decimals=2,
)  # fmt: skip
