"""metrics.statistics against scipy, formulas and cases with a known answer."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from stablevm.metrics import statistics
from stablevm.metrics.statistics import (
    FeatureStatistics,
    Moments,
    check_covariance,
    frechet_distance,
    inception_score,
    moments_of,
)
from stablevm.support.errors import UserError
from tests.helpers.features import normal


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


def test_merged_statistics_are_those_of_all_rows() -> None:
    features = normal(90, 6, 7, shift=100.0)
    whole, parts = FeatureStatistics.from_features(features), FeatureStatistics(6)
    for block in features.split([50, 30, 10]):
        parts.merge(FeatureStatistics.from_features(block))
    parts.merge(FeatureStatistics(6))
    assert parts.count == 90
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.covariance, whole.covariance, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 2.0])
def test_quick_and_careful_ways_agree(decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spectra from flat to steep, as Inception's are; the careful way has neither Cholesky's factor nor squares."""
    spectrum = torch.arange(1, 129).double() ** -decay
    a, b = normal(500, 128, 8).double() * spectrum, 1.1 * normal(400, 128, 9).double() * spectrum
    quick = frechet(a, b)
    monkeypatch.setattr(statistics, "WELL_CONDITIONED", 2.0)
    monkeypatch.setattr(statistics, "QUICK_ERROR", -1.0)
    assert quick == pytest.approx(frechet(a, b), rel=1e-7)


def test_singular_covariances_agree_with_the_matrix_square_root() -> None:
    """Fewer samples than features; the roots of rounding errors bound how near scipy's root comes."""
    a, b = normal(20, 32, 10).double(), normal(25, 32, 11).double()
    S1, S2 = np.cov(a.T), np.cov(b.T)
    difference = (a.mean(0) - b.mean(0)).numpy()
    expected = difference @ difference + np.trace(S1 + S2 - 2 * sqrtm(S1 @ S2).real)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("rows", "other_rows"), [(20, 25), (20, 200), (200, 200)])
def test_few_rows_need_no_covariance(rows: int, other_rows: int) -> None:
    a, b = normal(rows, 32, 10), normal(other_rows, 32, 11)
    assert frechet_distance(moments_of(a), moments_of(b)) == pytest.approx(frechet(a, b), rel=1e-7)
    assert frechet_distance(moments_of(a), moments_of(a)) < 1e-9
    with pytest.raises(UserError, match="at least 2 samples"):
        moments_of(a[:1])


def test_known_moments_give_the_closed_form() -> None:
    """Covariances that commute: the sum over dimensions of (mean difference)^2 + (s1 - s2)^2."""
    s1, s2 = torch.tensor([1.0, 2.0, 0.0]).double(), torch.tensor([3.0, 0.5, 1.0]).double()
    a, b = Moments(torch.zeros(3).double(), s1.square().diag()), Moments(torch.ones(3).double(), s2.square().diag())
    assert frechet_distance(a, b) == pytest.approx(3 + float((s1 - s2).square().sum()), rel=1e-12)


def test_inception_score_is_the_mean_over_chunks_in_file_order() -> None:
    logits = 3 * normal(250, 7, 13)
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)

    def score(rows: np.ndarray) -> float:
        return float(np.exp(np.mean(np.sum(rows * (np.log(rows) - np.log(rows.mean(0))), 1))))

    with pytest.warns(UserWarning, match="the last chunk of the inception score has 50 of 100 images") as told:
        mean, chunks = inception_score(logits, chunk=100)
    for number in (mean, (chunks[0] + chunks[1]) / 2):
        assert f"{number:.6g} over" in str(told[0].message)
    assert inception_score(logits[:200], chunk=100) == (pytest.approx(np.mean(chunks[:2])), chunks[:2])
    assert inception_score(logits[:50], chunk=100)[0] > 1, "one chunk alone is not short of others"
    assert chunks == pytest.approx([score(p[:100]), score(p[100:200]), score(p[200:])], rel=1e-9)
    assert mean == pytest.approx(np.mean(chunks), rel=1e-12)


def test_inception_score_has_its_known_extremes() -> None:
    sure = 1000 * torch.eye(10).repeat(20, 1)  # the softmax underflows to exact zeros
    assert inception_score(sure)[0] == pytest.approx(10)
    assert inception_score(torch.ones(50, 10))[0] == pytest.approx(1)
    by_class = sure[sure.argmax(1).argsort()]
    assert inception_score(by_class, chunk=20)[0] == pytest.approx(1), "the order of the file matters"


def test_bad_features_are_named() -> None:
    good = normal(20, 4, 12)
    broken = good.clone()
    broken[3, 1] = torch.nan
    broken[5, 0] = torch.inf
    with pytest.raises(UserError, match="2 of 20 rows of features hold NaN or infinity"):
        FeatureStatistics.from_features(broken)
    with pytest.raises(UserError, match="NaN"):
        inception_score(broken)
    with pytest.raises(UserError, match="at least 2 samples, got 1"):
        frechet(good, good[:1])
    with pytest.raises(UserError, match="4 and 3 wide"):
        frechet(good, good[:, :3])
    with pytest.raises(UserError, match="3 wide, the ones before were 4 wide"):
        FeatureStatistics.from_features(good).update(good[:, :3])
    with pytest.raises(UserError, match=r"\(n, width\)"):
        FeatureStatistics.from_features(good[0])
    with pytest.raises(UserError, match="at least 1 image"):
        inception_score(good[:0])


def test_a_matrix_that_is_no_covariance_is_refused() -> None:
    covariance = torch.cov(normal(100, 12, 14).double().T)
    assert torch.equal(check_covariance(covariance, "x"), covariance)
    in_float32 = covariance.float().double()
    assert torch.equal(check_covariance(in_float32, "x"), in_float32)
    singular = torch.cov(normal(5, 12, 14).double().T)
    torch.testing.assert_close(check_covariance(singular.float().double(), "x"), singular, rtol=1e-5, atol=1e-6)
    assert torch.equal(check_covariance(0 * covariance, "x"), 0 * covariance)
    for matrix, message in (
        (covariance.tril(), "x is not symmetric"),
        (covariance + 1e-4 * normal(12, 12, 15), "x is not symmetric"),
        (-covariance, "x has negative eigenvalues"),
        (covariance - 0.5 * covariance.diagonal().mean() * torch.eye(12), "x has negative eigenvalues"),
    ):
        with pytest.raises(UserError, match=message):
            check_covariance(matrix, "x")
