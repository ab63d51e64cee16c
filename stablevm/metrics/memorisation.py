"""Memorisation: the share of samples that are as near to a reference image as a copy would be."""

from typing import Any

from stablevm.metrics.metric import FeatureSets, Metric


def _memorisation(sets: FeatureSets) -> dict[str, Any]:
    return {} if sets.neighbourhood is None else {"memorisation": sets.neighbourhood.memorisation}


MEMORISATION = Metric(
    "memorisation",
    "memorisation",
    "share of samples nearer to a reference image than 99 of 100 reference images are to another; 0.01 for new images",
    None,
    "coverage",
    _memorisation,
)
