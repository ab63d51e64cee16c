"""Gaussian mixtures for the statistical tests."""

import torch

from stablevm.toy.mixture import GaussianMixture


def make_mixture(components: int, dimension: int, seed: int, dtype=torch.float32) -> GaussianMixture:
    """A mixture with well-separated scales, small enough for statistics."""
    stream = torch.Generator().manual_seed(seed)
    weights = torch.rand(components, generator=stream, dtype=dtype) + 0.1
    means = torch.rand(components, dimension, generator=stream, dtype=dtype) * 2 - 1
    variances = torch.rand(components, dimension, generator=stream, dtype=dtype) * 0.09 + 0.01
    return GaussianMixture(weights / weights.sum(), means, variances)
