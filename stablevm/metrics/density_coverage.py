"""Density and coverage (Naeem et al., 2020): near how many reference images a sample is, and how many have one near."""

from typing import Any

from stablevm.metrics.metric import FeatureSets, Metric
from stablevm.metrics.neighbours import COVERAGE_K


def _density(sets: FeatureSets) -> dict[str, Any]:
    return {} if sets.neighbourhood is None else {"density": sets.neighbourhood.density}


def _coverage(sets: FeatureSets) -> dict[str, Any]:
    return {} if sets.neighbourhood is None else {"coverage": sets.neighbourhood.coverage}


DENSITY = Metric(
    "density", "density", f"of how many of {{images}} a sample is near, over k = {COVERAGE_K}; 1 for real ones, "
    "higher is denser", None, "density", _density,
)  # fmt: skip
COVERAGE = Metric(
    "coverage", "coverage", f"share of {{images}} with a sample near, k = {COVERAGE_K}; 0.97 for real ones", "higher",
    "coverage", _coverage,
)  # fmt: skip
