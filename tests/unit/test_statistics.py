"""evaluation.statistics against scipy, brute force and cases with a known answer."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from stablevm.errors import UserError
from stablevm.evaluation.statistics import (
    FeatureStatistics,
    coverage,
    frechet_distance,
    nearest_distance,
    precision_recall,
)


def normal(rows: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    """Correlated features with unequal variances."""
    stream = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=stream) / width**0.5
    return torch.randn(rows, width, generator=stream) @ mix + shift


def frechet(a: Tensor, b: Tensor) -> float:
    return frechet_distance(FeatureStatistics.from_features(a), FeatureStatistics.from_features(b))


@pytest.mark.parametrize(("rows", "width"), [(300, 16), (500, 64)])
def test_frechet_distance_agrees_with_the_matrix_square_root(rows: int, width: int) -> None:
    a, b = normal(rows, width, 0), normal(rows + 50, width, 1, shift=0.3)
    S1, S2 = np.cov(a.double().T), np.cov(b.double().T)
    difference = a.double().mean(0).numpy() - b.double().mean(0).numpy()
    expected = difference @ difference + np.trace(S1 + S2 - 2 * sqrtm(S1 @ S2).real)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_shifted_copies_is_the_squared_shift() -> None:
    a = normal(200, 8, 2)
    assert frechet(a, a + 0.5) == pytest.approx(8 * 0.25, rel=1e-5)


@pytest.mark.parametrize("rows", [400, 10])  # 10 rows of 32 features: a singular covariance
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_identical_sets_are_at_distance_zero(rows: int, scale: float) -> None:
    a = scale * normal(rows, 32, 3)
    assert 0 <= frechet(a, a) < 1e-6
    assert 0 <= frechet(a, a.flip(0)) < 1e-6


def test_constant_features_have_a_distance() -> None:
    ones = torch.ones(5, 4)
    assert frechet(ones, ones) == 0
    assert frechet(ones, 3 * ones) == pytest.approx(16)


def test_distance_is_symmetric_for_singular_covariances() -> None:
    a, b = normal(12, 40, 4), normal(15, 40, 5)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-9)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_streaming_equals_one_pass(offset: float) -> None:
    features = normal(101, 6, 6).double() + offset
    streamed = FeatureStatistics(6)
    for block in features.split([1, 40, 0, 60]):
        streamed.update(block)
    assert streamed.count == 101
    torch.testing.assert_close(streamed.mean, features.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(streamed.covariance, torch.cov(features.T), rtol=1e-9, atol=1e-12)


def brute_force(reference: Tensor, samples: Tensor, k: int) -> tuple[float, float, float]:
    """Precision, recall, coverage by their definitions, one pair at a time."""

    def distance(a: Tensor, b: Tensor) -> float:
        return float((a - b).square().sum().sqrt())

    def radius(points: Tensor, i: int) -> float:
        return sorted(distance(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]

    def share(flags: list[bool]) -> float:
        return sum(flags) / len(flags)

    real_radii = [radius(reference, i) for i in range(len(reference))]
    fake_radii = [radius(samples, i) for i in range(len(samples))]
    inside = [[distance(r, s) <= size for s in samples] for r, size in zip(reference, real_radii, strict=True)]
    held = [[distance(r, s) <= size for r in reference] for s, size in zip(samples, fake_radii, strict=True)]
    precision = share([any(column) for column in zip(*inside, strict=True)])
    recall = share([any(column) for column in zip(*held, strict=True)])
    return precision, recall, share([any(row) for row in inside])


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_and_coverage_agree_with_brute_force(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stablevm.evaluation.statistics.BLOCK_ROWS", 7)  # several blocks, the last one short
    reference, samples = normal(40, 3, 7), 0.8 * normal(33, 3, 8, shift=0.2)
    precision, recall, covered = brute_force(reference, samples, k)
    assert 0 < precision < 1 and 0 < recall < 1 and 0 < covered < 1
    assert precision_recall(reference, samples, k) == (precision, recall)
    assert coverage(reference, samples, k) == covered


def test_identical_sets_are_precise_and_complete() -> None:
    a = normal(50, 4, 9)
    assert precision_recall(a, a) == (1, 1)
    assert coverage(a, a) == 1


def test_copies_lie_inside_balls_of_radius_zero() -> None:
    point = torch.full((6, 512), 0.1)
    assert precision_recall(point, point.clone()) == (1, 1)
    assert coverage(point, point.clone()) == 1


def test_mode_collapse_is_precise_but_recalls_nothing() -> None:
    reference = normal(500, 4, 10)
    collapsed = reference[:1] + 1e-3 * normal(500, 4, 11)
    precision, recall = precision_recall(reference, collapsed)
    assert precision > 0.99
    assert recall < 0.02
    assert coverage(reference, collapsed) < 0.1


def test_equal_distributions_are_covered_as_expected() -> None:
    """A ball is empty if its centre's k nearest of both sets are all real (Naeem et al., 2020); seeds 0 to 11."""
    n, k = 200, 5
    expected = 1 - math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    streams = [torch.Generator().manual_seed(seed) for seed in range(12)]
    values = np.array([coverage(*torch.randn(2, n, 4, generator=stream), k=k) for stream in streams])
    z = (values.mean() - expected) / (values.std(ddof=1) / len(values) ** 0.5)
    assert abs(z) < 4
    assert abs(values.mean() - expected) < 0.01


def test_nearest_distance() -> None:
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    queries = torch.tensor([[0.0, 1.0], [3.0, 4.0], [9.0, 12.0]])
    torch.testing.assert_close(nearest_distance(queries, points), torch.tensor([1.0, 0.0, 10.0]))


def test_bad_features_are_named() -> None:
    good = normal(20, 4, 12)
    broken = good.clone()
    broken[3, 1] = torch.nan
    broken[5, 0] = torch.inf
    with pytest.raises(UserError, match="2 of 20 rows of features hold NaN or infinity"):
        FeatureStatistics.from_features(broken)
    with pytest.raises(UserError, match="NaN"):
        precision_recall(good, broken)
    with pytest.raises(UserError, match="NaN"):
        coverage(broken, good)
    with pytest.raises(UserError, match="at least 2 samples, got 1"):
        frechet(good, good[:1])
    with pytest.raises(UserError, match="4 and 3 wide"):
        frechet(good, good[:, :3])
    with pytest.raises(UserError, match="4 and 3 wide"):
        precision_recall(good, good[:, :3])
    with pytest.raises(UserError, match="samples: 3 images, but 3 nearest neighbours need at least 4"):
        precision_recall(good, good[:3])
    with pytest.raises(UserError, match="3 wide, the ones before were 4 wide"):
        FeatureStatistics.from_features(good).update(good[:, :3])
    with pytest.raises(UserError, match=r"\(n, width\)"):
        FeatureStatistics.from_features(good[0])
