"""metrics.kernel_distance against its formula, torch-fidelity and its known properties."""

import numpy as np
import pytest
import torch
from torch import Tensor

from stablevm.metrics.kernel_distance import kernel_distance
from stablevm.support.errors import UserError
from tests.helpers.features import normal


def by_pairs(a: Tensor, b: Tensor) -> float:
    """Equation 4 of Bińkowski et al., one pair at a time."""

    def kernel(x: Tensor, y: Tensor) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    def within(rows: Tensor) -> float:
        values = [kernel(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]
        return sum(values) / (len(rows) * (len(rows) - 1))

    return within(a) + within(b) - 2 * sum(kernel(x, y) for x in a for y in b) / (len(a) * len(b))


def test_one_subset_of_everything_is_the_formula() -> None:
    a, b = normal(20, 4, 1).double(), normal(20, 4, 2, shift=0.3).double()
    assert kernel_distance(a, b) == (pytest.approx(by_pairs(a, b), rel=1e-9), 0)


def test_it_agrees_with_torch_fidelity() -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = normal(300, 64, 3).abs(), 1.1 * normal(300, 64, 4).abs()
    peer = kid_features_to_metric(
        b, a, kid_subsets=1, kid_subset_size=300, kid_kernel="poly", kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1, rng_seed=0, verbose=False,
    )  # fmt: skip
    ours, _ = kernel_distance(a, b)
    assert ours == pytest.approx(peer["kernel_inception_distance_mean"], rel=1e-5)


def test_it_is_unbiased_where_sets_are_small() -> None:
    """Draws of one distribution are at distance 0 on average; 40 pairs of sets, z below 4."""
    stream = torch.Generator().manual_seed(5)
    values = np.array([kernel_distance(*torch.randn(2, 30, 8, generator=stream))[0] for _ in range(40)])
    assert abs(values.mean()) < 4 * values.std(ddof=1) / len(values) ** 0.5
    assert values.min() < 0 < values.max()


def test_subsets_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    a, b = normal(60, 8, 6), normal(50, 8, 7, shift=0.1)
    state = torch.random.get_rng_state()
    first = kernel_distance(a, b, subsets=5, subset_size=20)
    assert kernel_distance(a, b, subsets=5, subset_size=20) == first
    assert kernel_distance(a, b, subsets=5, subset_size=20, seed=1) != first
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first[1] > 0
    whole, _ = kernel_distance(a[:50], b)
    assert kernel_distance(a[:50], b, subsets=200, subset_size=20)[0] == pytest.approx(whole, rel=0.2)


def test_what_it_refuses() -> None:
    a = normal(20, 4, 1)
    for given, message in (((a, a[:1]), "samples: 1 images"), ((a, a[:, :3]), "4 and 3 wide")):
        with pytest.raises(UserError, match=message):
            kernel_distance(*given)
    with pytest.raises(UserError, match="NaN"):
        kernel_distance(a, a * torch.nan)
    with pytest.raises(UserError, match="at least 1, of at least 2"):
        kernel_distance(a, a, subset_size=1)
