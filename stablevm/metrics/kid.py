"""The kernel Inception distance (KID), called a kernel distance for features of other networks."""

from collections.abc import Callable
from typing import Any

from stablevm.metrics.kernel_distance import kernel_distance
from stablevm.metrics.metric import FeatureSets, Metric


def _distance(name: str) -> Callable[[FeatureSets], dict[str, Any]]:
    def values(sets: FeatureSets) -> dict[str, Any]:
        if "pool" not in sets.reference:
            return {}
        distance, deviation = kernel_distance(sets.reference["pool"], sets.samples["pool"], device=sets.device)
        return {name: distance, f"{name}_deviation": deviation}

    return values


# Computed for the whole set only: it is slow, and being unbiased it does not depend on the number of samples.
KID = Metric(
    "kid", "KID", "kernel distance to {images}, unbiased", "lower", "kernel", _distance("kid"), published=True,
    whole_set=True, decimals=5,
)  # fmt: skip
KERNEL_DISTANCE = Metric(
    "kernel_distance", "kernel distance", "to {images}, cubic kernel, unbiased; not KID", "lower", "kernel",
    _distance("kernel_distance"), published=False, whole_set=True, decimals=5,
)  # fmt: skip
