"""metrics.neighbours and ADM's arithmetic against brute force and cases with a known answer."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from stablevm.metrics import adm_distances
from stablevm.metrics.adm_distances import membership_adm
from stablevm.metrics.neighbours import (
    coverage,
    membership,
    memorised_share,
    nearest,
    nearest_distance,
    neighbourhood,
    precision_recall,
    radii,
)
from stablevm.metrics.points import Points, points, squared_distances
from stablevm.support.errors import UserError
from tests.helpers.features import normal


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
    monkeypatch.setattr("stablevm.metrics.points.BLOCK_ROWS", 7)  # several blocks, the last one short
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


def pairwise(a: Tensor, b: Tensor) -> Tensor:
    return (a.double()[:, None] - b.double()[None]).square().sum(-1)


def exact(reference: Tensor, samples: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The masks (samples,) and (reference,) of the points that lie inside, from all pairs in float64."""

    def squared_radii(points: Tensor) -> Tensor:
        distances = pairwise(points, points).fill_diagonal_(torch.inf)
        return distances.kthvalue(k, dim=1).values

    cross = pairwise(samples, reference)
    return (cross <= squared_radii(reference)).any(1), (cross <= squared_radii(samples)[:, None]).any(0)


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4])
def test_nothing_is_lost_to_cancellation(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tight clusters far from the common mean: |a|^2 + |b|^2 - 2ab in float32 has no digit of their distances left."""
    monkeypatch.setattr("stablevm.metrics.points.BLOCK_ROWS", 64)
    monkeypatch.setattr("stablevm.metrics.neighbours.PAIRS_MARKED", 50)
    centres = 30 * normal(4, 48, 1)
    reference = centres[torch.arange(150) % 4] + spread * normal(150, 48, 2)
    samples = centres[torch.arange(130) % 3] + 0.9 * spread * normal(130, 48, 3)
    found, (in_real, in_fake) = membership(reference, samples), exact(reference, samples, 3)
    assert 0 < in_real.double().mean() < 1 and 0 < in_fake.double().mean() < 1
    assert torch.equal(found.samples, in_real)
    assert torch.equal(found.reference, in_fake)
    index, distance = nearest(samples, reference)
    smallest = pairwise(samples, reference).min(1)
    assert torch.equal(index, smallest.indices)
    torch.testing.assert_close(distance, smallest.values.sqrt(), rtol=1e-12, atol=0)


def test_rows_of_many_copies_are_compared_with_all() -> None:
    """More copies at the wrong distance than there are spare candidates."""
    stream = torch.Generator().manual_seed(4)
    near = 1000 + torch.rand(40, 16, generator=stream) * 1e-3
    features = torch.cat([near, torch.zeros(5, 16)])
    distances = pairwise(features, features).fill_diagonal_(torch.inf)
    (prepared,) = points(features)
    torch.testing.assert_close(radii(prepared, 3), distances.kthvalue(3, dim=1).values, rtol=1e-12, atol=0)


def test_float16_rounds_the_edges_of_balls_inwards_and_says_so() -> None:
    """A sample at squared distance 16.2^2 = 262.44 from a centre whose ball ends at 262.4: both round to 262.5."""
    reference = torch.zeros(4, 2)
    reference[1:, 0] = torch.tensor([16.0, 16.1, 262.4**0.5])
    reference[1:, 0] *= -1
    samples = torch.tensor([[262.44**0.5, 0.0], [500.0, 0], [600.0, 0], [700.0, 0]])
    exactly, as_adm = membership(reference, samples), membership_adm(reference, samples)
    assert exactly.samples.tolist() == [False, False, False, False]
    assert as_adm.samples.tolist() == [True, False, False, False]


def test_float16_raises_precision_a_little() -> None:
    a, b = 4 * normal(1500, 64, 5).abs(), 4 * normal(1500, 64, 6).abs()
    exactly, as_adm = membership(a, b), membership_adm(a, b)
    assert 0 < as_adm.precision - exactly.precision < 0.02
    assert abs(as_adm.recall - exactly.recall) < 0.02


def test_float16_overflow_falls_back_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adm_distances, "BLOCK", 30)
    monkeypatch.setattr(adm_distances, "ROWS_AT_ONCE", 7)
    a, b = 200 * normal(50, 8, 7), 200 * normal(40, 8, 8)
    assert pairwise(a, b).max() > 65504
    found, (in_real, in_fake) = membership_adm(a, b), exact(a, b, 3)
    assert torch.equal(found.samples, in_real) and torch.equal(found.reference, in_fake)


def test_bad_features_are_named() -> None:
    good = normal(20, 4, 12)
    broken = good.clone()
    broken[3, 1] = torch.nan
    with pytest.raises(UserError, match="1 of 20 rows of features hold NaN"):
        precision_recall(good, broken)
    with pytest.raises(UserError, match="NaN"):
        coverage(broken, good)
    for compare in (precision_recall, membership_adm):
        with pytest.raises(UserError, match="4 and 3 wide"):
            compare(good, good[:, :3])
    with pytest.raises(UserError, match="samples: 3 images, but 3 nearest neighbours need at least 4"):
        precision_recall(good, good[:3])


def by_all_pairs(reference: Tensor, samples: Tensor) -> tuple[Tensor, ...]:
    """What a neighbourhood holds, each squared distance by differences in float64."""

    def squared(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([torch.linalg.vecdot(row - b.double(), row - b.double()) for row in a.double()])

    def squared_radii(points: Tensor, k: int) -> Tensor:
        return squared(points, points).fill_diagonal_(torch.inf).kthvalue(k, dim=1).values

    cross = squared(samples, reference)
    wide = cross <= squared_radii(reference, 5)
    return (
        (cross <= squared_radii(reference, 3)).any(1),
        (cross <= squared_radii(samples, 3)[:, None]).any(0),
        wide.sum(1),
        wide.any(0),
        cross.amin(1).sqrt(),
        squared_radii(reference, 1).sqrt(),
    )


def near_copies(kind: str, stream: torch.Generator, count: int = 130, width: int = 24) -> Tensor:
    """Sets in which |a|^2 + |b|^2 - 2ab in float32 has no digit of the distances left."""

    def noise(rows: int, size: float) -> Tensor:
        return size * torch.randn(rows, width, generator=stream)

    rows = torch.arange(count)
    centres = torch.randn(10, width, generator=torch.Generator().manual_seed(8))
    if kind == "distinct":
        return noise(count, 1)
    if kind == "collapsed":
        return centres[:1] + noise(count, 1e-3)
    if kind == "modes":
        return centres[rows % 7] + noise(count, 1e-4)
    if kind == "crowds in crowds":
        return centres[rows % 3] + 1e-2 * centres[rows % 5] + 1e-4 * centres[rows % 4] + noise(count, 1e-6)
    if kind == "duplicates":
        return centres[rows % 7]
    if kind == "last digit":
        up = torch.rand(count, width, generator=stream) > 0.5
        return torch.where(up, centres[0].nextafter(torch.tensor(9.0)), centres[0])
    assert kind == "equidistant"  # no k-th neighbour is nearer than the others
    return torch.eye(count)


KINDS = ("distinct", "collapsed", "modes", "crowds in crowds", "duplicates", "last digit", "equidistant")


@pytest.mark.parametrize("block", [48, 4096])
@pytest.mark.parametrize("kind", KINDS)
def test_near_copies_are_compared_exactly(kind: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stablevm.metrics.points.BLOCK_ROWS", block)
    stream = torch.Generator().manual_seed(3)
    samples = near_copies(kind, stream)
    for reference in (near_copies(kind, stream), near_copies("distinct", stream, width=samples.shape[1])):
        found = neighbourhood(reference, samples)
        computed = (found.samples, found.reference, found.holding, found.covered, found.to_reference,
                    found.within_reference)  # fmt: skip
        for ours, expected in zip(computed, by_all_pairs(reference, samples), strict=True):
            assert torch.equal(ours, expected)
        members = membership(reference, samples)
        assert torch.equal(members.samples, found.samples) and torch.equal(members.reference, found.reference)


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_near_copies_cost_no_comparison_one_by_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set of 400 has 160,000 pairs; differences are for some per row."""
    measured = []

    def counted(a: Points, b: Points, rows: Tensor, columns: Tensor) -> Tensor:
        measured.append(len(rows))
        return squared_distances(a, b, rows, columns)

    for module in ("neighbours", "points"):
        monkeypatch.setattr(f"stablevm.metrics.{module}.squared_distances", counted)
    stream = torch.Generator().manual_seed(3)
    samples = near_copies(kind, stream, count=400, width=128)
    membership(torch.randn(100, 128, generator=stream), samples)
    assert sum(measured) < 25 * 400


def test_density_and_coverage_by_their_definitions() -> None:
    reference, samples = normal(60, 3, 7), 0.8 * normal(50, 3, 8, shift=0.2)
    found = neighbourhood(reference, samples)
    *_, holding, covered, _, _ = by_all_pairs(reference, samples)
    assert found.density == pytest.approx(float(holding.sum()) / (5 * 50))
    assert found.coverage == coverage(reference, samples) == float(covered.double().mean())
    assert 0 < found.coverage < 1 and found.density > 0
    with pytest.raises(UserError, match="reference: 5 images, but 5 nearest neighbours need at least 6"):
        neighbourhood(reference[:5], samples)


def test_memorisation_finds_copies() -> None:
    """New draws of the same distribution get 0.01 (seeds 0 to 9, z below 4); a tenth of copies adds a tenth."""
    streams = [torch.Generator().manual_seed(seed) for seed in range(10)]
    found, copied = [], []
    for stream in streams:
        training, drawn = torch.randn(2, 1000, 6, generator=stream)
        found.append(neighbourhood(training, drawn).memorisation)
        drawn[:100] = training[:100] + 1e-6
        copied.append(neighbourhood(training, drawn).memorisation)
    values = np.array(found)
    assert abs(values.mean() - 0.01) < 4 * values.std(ddof=1) / len(values) ** 0.5
    assert np.mean(copied) == pytest.approx(0.1 + 0.9 * values.mean(), abs=0.003)


def test_memorised_share_by_its_definition() -> None:
    unseen = torch.arange(1.0, 201)  # the second smallest of 200 is the yardstick
    assert memorised_share(torch.tensor([0.0, 1.9, 2.0, 2.1]), unseen) == 0.75
    assert memorised_share(torch.tensor([0.0, 0.5]), torch.tensor([0.0])) == 0.5, "copies count where q is 0"
