"""Kernel Inception distance (Bińkowski et al., 2018, "Demystifying MMD GANs"), unbiased for any number of images."""

import torch
from torch import Tensor

from stablevm.metrics.statistics import check_count, check_sets
from stablevm.support import rng
from stablevm.support.errors import UserError

SUBSETS, SUBSET_SIZE = 100, 1000  # as in the paper


def kernel_distance(
    reference: Tensor,
    samples: Tensor,
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = 0,
    device: torch.device | None = None,
) -> tuple[float, float]:
    """Squared maximum mean discrepancy between features (n, width) and (m, width): its mean and deviation over subsets.

    The kernel is (x.y / width + 1)^3, and the estimate is the unbiased one (equation 4), which can be negative. Random
    subsets of `subset_size` rows, or of the size of the smaller set, are drawn without replacement from each set, with
    `seed`. The standard deviation (divisor `subsets`) shows how much the value of one subset varies. Computed in
    float64. UserError for fewer than 2 images or different widths.
    """
    check_sets(reference, samples)
    for name, features in (("reference", reference), ("samples", samples)):
        check_count(name, len(features), 2, "a kernel distance needs")
    if subsets < 1 or subset_size < 2:
        raise UserError(f"subsets {subsets} of {subset_size}: expected at least 1, of at least 2 images")
    size = min(subset_size, len(reference), len(samples))
    device = device or reference.device
    generator = rng.generator("kernel distance", seed)
    values = []
    for _ in range(subsets):
        drawn = [torch.randperm(len(each), generator=generator)[:size] for each in (reference, samples)]
        real, fake = (
            each[rows.to(each.device)].detach().to(device, torch.float64)
            for each, rows in zip((reference, samples), drawn, strict=True)
        )
        values.append(_discrepancy(real, fake))
        if size == len(reference) == len(samples):
            break  # every subset is the whole set
    found = torch.stack(values).cpu()
    return float(found.mean()), float(found.std(correction=0))


def _discrepancy(a: Tensor, b: Tensor) -> Tensor:
    """The unbiased estimate from equally many rows of each set, float64."""
    count = len(a)
    within = (_kernel(each, each) for each in (a, b))
    pairs = sum((kernel.sum() - kernel.diagonal().sum()) / (count * (count - 1)) for kernel in within)
    return pairs - 2 * _kernel(a, b).mean()


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1).pow_(3)
