"""Density and coverage (Naeem et al., 2020): how many samples lie near each reference image, and near how many."""

from typing import Any

from stablevm.metrics.metric import FeatureSets, Metric
from stablevm.metrics.neighbours import COVERAGE_K


def _density(sets: FeatureSets) -> dict[str, Any]:
    return {} if sets.neighbourhood is None else {"density": sets.neighbourhood.density}


def _coverage(sets: FeatureSets) -> dict[str, Any]:
    return {} if sets.neighbourhood is None else {"coverage": sets.neighbourhood.coverage}


DENSITY = Metric(
    "density", "density", f"how many of {{images}} hold a sample, over k = {COVERAGE_K}; 1 for real ones, "
    "higher is denser", None, "density", _density,
)  # fmt: skip
COVERAGE = Metric(
    "coverage", "coverage", f"share of {{images}} that hold a sample, k = {COVERAGE_K}; 0.97 for real ones", "higher",
    "coverage", _coverage,
)  # fmt: skip
