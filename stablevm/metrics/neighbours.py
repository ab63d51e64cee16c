"""Precision and recall, density and coverage, and nearest neighbours, from distances between two sets of features.

The computation runs in blocks and is exact: bounds on the distances (points.py) decide most pairs, and the few that
remain are compared by differences in float64. The result is the same as comparing all pairs one by one. A point on the
edge of a ball counts as inside.
"""

import math
from collections.abc import Sequence, Sized
from dataclasses import dataclass

import torch
from torch import Tensor

from stablevm.metrics.points import (
    BLOCK_ROWS,
    Bounds,
    Points,
    about,
    bounds_between,
    mean_of,
    points,
    squared_distances,
)
from stablevm.metrics.statistics import check_count

PRECISION_RECALL_K = 3  # Kynkäänniemi et al., 2019, "Improved precision and recall metric"
COVERAGE_K = 5  # Naeem et al., 2020, "Reliable fidelity and diversity metrics": equal sets then get 1 - 2^-5 = 0.97
SPARE_CANDIDATES = 5  # kept beyond the k nearest by the bounds: enough to prove nearly every row
PAIRS_MARKED = 512  # pairs measured at once; afterwards the pairs of rows found to be inside are skipped
ROWS_COMPARED_WITH_ALL = BLOCK_ROWS // 8  # rows at once, because all their candidates are listed before measuring
MEMORISED_SHARE = 0.01  # share of real images that count as copies of another; it sets the threshold of memorisation


@dataclass(frozen=True)
class Membership:
    """Masks of the samples (n,) and the reference images (m,) that lie in a ball of the other set.

    Their means are precision and recall.
    """

    samples: Tensor
    reference: Tensor

    @property
    def precision(self) -> float:
        return float(self.samples.double().mean())

    @property
    def recall(self) -> float:
        return float(self.reference.double().mean())


@dataclass(frozen=True)
class Neighbourhood(Membership):
    """Membership with `PRECISION_RECALL_K` neighbours, and the other metrics of the same distances."""

    holding: Tensor  # (samples,) number of the reference's balls of `COVERAGE_K` neighbours that hold the sample
    covered: Tensor  # (references,) whether the image's ball of `COVERAGE_K` neighbours holds a sample
    to_reference: Tensor  # (samples,) distance to the nearest reference image, float64
    within_reference: Tensor  # (references,) distance to the nearest other reference image, float64

    @property
    def density(self) -> float:
        """In how many of the reference's balls a sample lies, on average, over k (Naeem et al., 2020, equation 4)."""
        return float(self.holding.double().mean()) / COVERAGE_K

    @property
    def coverage(self) -> float:
        """The share of the reference's balls that hold a sample (Naeem et al., 2020, equation 5)."""
        return float(self.covered.double().mean())

    @property
    def memorisation(self) -> float:
        """`memorised_share` of the samples, relative to the distances between the reference images."""
        return memorised_share(self.to_reference, self.within_reference)


def memorised_share(samples: Tensor, unseen: Tensor) -> float:
    """The share of samples that are nearer to a training image than 99 of 100 real images that were not trained on.

    samples (n,), unseen (m,): the distances of generated and of real images to the nearest training image. The real
    images are test images, or the training images themselves, each compared with the others.

    With q the ceil(m / 100)-th smallest of `unseen`, it is the share of `samples` that are at most q: about 0.01 for a
    generator of new images, 1 for one that copies. Lower is better, down to 0.01. Only copies of the images that the
    distances refer to are found.
    """
    rank = max(1, math.ceil(MEMORISED_SHARE * len(unseen)))
    return float((samples <= unseen.kthvalue(rank).values).double().mean())


def neighbourhood(reference: Tensor, samples: Tensor, device: torch.device | None = None) -> Neighbourhood:
    """All metrics of the distances between features (n, width) and (m, width).

    A closed ball around each point reaches to its k-th nearest neighbour in its own set, not counting itself. UserError
    for a reference with `COVERAGE_K` rows or fewer.
    """
    real, fake = points(reference, samples, device=device)
    check_counts(real, fake, PRECISION_RECALL_K)
    check_counts(real, real, COVERAGE_K)
    closest, real_radii, wide = radii_of(real, (1, PRECISION_RECALL_K, COVERAGE_K))
    found = _Crossing(real, fake, real_radii, radii(fake, PRECISION_RECALL_K), wide)
    to_reference = _settled(fake, real, found.bounds, found.indices, 1, exclude_self=False)[1]
    return Neighbourhood(
        samples=found.in_real.cpu(),
        reference=found.in_fake.cpu(),
        holding=found.holding.cpu(),
        covered=found.covered.cpu(),
        to_reference=to_reference.sqrt().cpu(),
        within_reference=closest.sqrt().cpu(),
    )


def membership(
    reference: Tensor, samples: Tensor, k: int = PRECISION_RECALL_K, device: torch.device | None = None
) -> Membership:
    """Which samples lie inside the reference's manifold, and which reference points inside that of the samples.

    The manifold of a set is the union of closed balls around its points, each of which reaches to the point's k-th
    nearest neighbour, not counting itself (Kynkäänniemi et al., 2019, equations 1 and 2).
    """
    real, fake = points(reference, samples, device=device)
    check_counts(real, fake, k)
    found = _Crossing(real, fake, radii(real, k), radii(fake, k))
    return Membership(samples=found.in_real.cpu(), reference=found.in_fake.cpu())


def precision_recall(reference: Tensor, samples: Tensor, k: int = PRECISION_RECALL_K) -> tuple[float, float]:
    """Precision and recall of samples (n, width) against a reference (m, width), both in [0, 1].

    Precision is the share of samples inside the reference's manifold, recall the share of the reference inside the
    manifold of the samples (Kynkäänniemi et al., 2019). A manifold is the union of balls that reach from each point to
    its k-th nearest neighbour. UserError for sets of k rows or fewer, or of different widths.
    """
    found = membership(reference, samples, k)
    return found.precision, found.recall


def coverage(reference: Tensor, samples: Tensor, k: int = COVERAGE_K) -> float:
    """Coverage (Naeem et al., 2020): the share of the reference's k-nearest-neighbour balls that hold a sample.

    reference, samples: features (m, width) and (n, width). UserError for sets of k rows or fewer, or of different
    widths.
    """
    real, fake = points(reference, samples)
    check_counts(real, fake, k)
    _, squared = _nearest(real, fake)
    return float((squared <= radii(real, k)).double().mean())


def nearest(queries: Tensor, among: Tensor, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The nearest row of `among` (m, width) to each query (n, width): its index (n,) and its distance (n,), float64."""
    indices, squared = _nearest(*points(queries, among, device=device))
    return indices.cpu(), squared.sqrt().cpu()


def nearest_distance(queries: Tensor, among: Tensor) -> Tensor:
    """The Euclidean distance of each query (n, width) to the nearest row of `among` (m, width): (n,), float32."""
    return nearest(queries, among)[1].float()


def radii(among: Points, k: int) -> Tensor:
    """The squared distance of each point to its k-th nearest neighbour, not counting itself: (n,), float64."""
    return radii_of(among, (k,))[0]


def radii_of(among: Points, ks: Sequence[int]) -> list[Tensor]:
    """`radii` for several k, with the bounds computed once."""
    among = about(mean_of(among.rows), among.rows)
    bounds, indices = _no_candidates(len(among), min(max(ks) + SPARE_CANDIDATES, len(among) - 1), among)
    for start, block in among.blocks():
        mine = slice(start, start + len(block))
        for other_start, other in among.blocks():
            if other_start < start:  # one product serves a block and its transpose
                continue
            lower = bounds_between(block, other, same=start == other_start).lower
            _keep_smallest(bounds[mine], indices[mine], lower, other_start)
            if start != other_start:
                theirs = slice(other_start, other_start + len(other))
                _keep_smallest(bounds[theirs], indices[theirs], lower.T.contiguous(), start)
    return [_settled(among, among, bounds, indices, k, exclude_self=True)[1] for k in ks]


def check_counts(reference: Sized, samples: Sized, k: int) -> None:
    """Raise UserError if a set has too few rows for k nearest neighbours."""
    for name, rows in (("reference", reference), ("samples", samples)):
        check_count(name, len(rows), k + 1, f"{k} nearest neighbours need")


def _nearest(queries: Points, among: Points) -> tuple[Tensor, Tensor]:
    """The index of the nearest row of `among` and the squared distance to it, (n,) each."""
    bounds, indices = _no_candidates(len(queries), min(1 + SPARE_CANDIDATES, len(among)), among)
    for start, block in queries.blocks():
        mine = slice(start, start + len(block))
        for other_start, other in among.blocks():
            _keep_smallest(bounds[mine], indices[mine], bounds_between(block, other).lower, other_start)
    return _settled(queries, among, bounds, indices, 1, exclude_self=False)


def _no_candidates(count: int, kept: int, among: Points) -> tuple[Tensor, Tensor]:
    """Lower bounds and indices, (count, kept) each, for `_keep_smallest` to fill."""
    bounds = torch.full((count, kept), torch.inf, dtype=torch.float32, device=among.rows.device)
    return bounds, torch.zeros((count, kept), dtype=torch.int64, device=among.rows.device)


def _keep_smallest(bounds: Tensor, indices: Tensor, lower: Tensor, start: int) -> None:
    """Update `bounds` and `indices` (n, kept) to the smallest of them and a block whose columns begin at `start`."""
    values, columns = lower.topk(min(bounds.shape[1], lower.shape[1]), dim=1, largest=False, sorted=False)
    values, indices_of_both = torch.cat([bounds, values], 1), torch.cat([indices, columns + start], 1)
    best, chosen = values.topk(bounds.shape[1], dim=1, largest=False)
    bounds.copy_(best)
    indices.copy_(indices_of_both.gather(1, chosen))


def _settled(
    queries: Points, among: Points, bounds: Tensor, indices: Tensor, k: int, *, exclude_self: bool
) -> tuple[Tensor, Tensor]:
    """The k-th nearest neighbour of each query, its index and squared distance (n,), from candidates (n, kept).

    Only candidates whose bounds do not decide whether they are the k-th are measured. A row is proven if the k-th
    distance is at most the largest bound kept, because all other points are at least that far away. Rows that are not
    proven are compared with all points.
    """
    upper = (bounds + queries.spread[:, None] + among.spread[indices]) * (1 + torch.finfo(torch.float32).eps)
    kth_lower, kth_upper = (each.kthvalue(k, dim=1, keepdim=True).values for each in (bounds, upper))
    squared = torch.where(upper < kth_lower, -torch.inf, torch.inf).double()
    rows, columns = ((upper >= kth_lower) & (bounds <= kth_upper)).nonzero().T
    squared[rows, columns] = squared_distances(queries, among, rows, indices[rows, columns])
    kth, place = squared.kthvalue(k, dim=1)
    position = indices.gather(1, place[:, None])[:, 0]
    complete = indices.shape[1] == len(among) - exclude_self
    unproven = (~(complete | (kth <= bounds.amax(1)) | (kth == 0))).nonzero().flatten()
    for rows in unproven.split(ROWS_COMPARED_WITH_ALL) if len(unproven) else ():
        position[rows], kth[rows] = _kth_of_all(queries, among, rows, kth[rows], k, exclude_self=exclude_self)
    return position, kth


def _kth_of_all(
    queries: Points, among: Points, rows: Tensor, at_most: Tensor, k: int, *, exclude_self: bool
) -> tuple[Tensor, Tensor]:
    """The k-th nearest of all points for these `rows` of the queries: its index and squared distance.

    at_most: upper bounds of the squared distances, the k-th of the candidates.
    """
    found_rows, found_columns = [], []
    for start, block in among.blocks():
        near = bounds_between(queries[rows], block)
        some, columns = near.pairs_within(at_most[:, None])
        found_rows.append(some)
        found_columns.append(columns + start)
    some, columns = torch.cat(found_rows), torch.cat(found_columns)
    if exclude_self:
        others = rows[some] != columns
        some, columns = some[others], columns[others]
    squared = squared_distances(queries, among, rows[some], columns)
    order = squared.argsort()
    order = order[some[order].argsort(stable=True)]  # row by row, the nearest first
    first = torch.searchsorted(some[order], torch.arange(len(rows), device=order.device))
    chosen = order[first + k - 1]
    return columns[chosen], squared[chosen]


class _Crossing:
    """The comparison of two sets in one pass over their blocks; all radii are squared.

    wide: the reference's radii for density and coverage; without them only precision and recall are computed.
    """

    def __init__(
        self, real: Points, fake: Points, real_radii: Tensor, fake_radii: Tensor, wide: Tensor | None = None
    ) -> None:
        device = real.rows.device
        self.in_real = torch.zeros(len(fake), dtype=torch.bool, device=device)  # in a ball around a real point
        self.in_fake = torch.zeros(len(real), dtype=torch.bool, device=device)
        self.holding = torch.zeros(len(fake), dtype=torch.int64, device=device)
        self.covered = torch.zeros(len(real), dtype=torch.bool, device=device)
        # for each fake point, the real ones that may be nearest
        self.bounds, self.indices = _no_candidates(len(fake), min(1 + SPARE_CANDIDATES, len(real)), real)
        for start, block in real.blocks():
            mine = slice(start, start + len(block))
            for other_start, other in fake.blocks():
                theirs = slice(other_start, other_start + len(other))
                near = bounds_between(block, other)
                _mark(self.in_fake[mine], near, fake_radii[theirs])
                near = near.mirrored
                _mark(self.in_real[theirs], near, real_radii[mine])
                if wide is not None:
                    _count(self.holding[theirs], self.covered[mine], near, wide[mine])
                    _keep_smallest(self.bounds[theirs], self.indices[theirs], near.lower.contiguous(), start)


def _mark(inside: Tensor, near: Bounds, squared_radii: Tensor) -> None:
    """Set `inside` for the rows of `near.a` that lie in a ball around a row of `near.b`."""
    inside |= near.any_surely_within(squared_radii)
    rows, columns = near.pairs_within(squared_radii, rows=(~inside).nonzero().flatten())
    for some, balls in zip(rows.split(PAIRS_MARKED), columns.split(PAIRS_MARKED), strict=True):
        waiting = ~inside[some]
        some, balls = some[waiting], balls[waiting]
        hits = squared_distances(near.a, near.b, some, balls) <= squared_radii[balls]
        inside[some[hits]] = True


def _count(holding: Tensor, covered: Tensor, near: Bounds, squared_radii: Tensor) -> None:
    """Add to `holding` the number of balls that hold each row of `near.a`; set `covered` for balls that hold one."""
    rows, balls = near.pairs_within(squared_radii)
    inside = near.upper(rows, balls) <= squared_radii[balls]
    undecided = (~inside).nonzero().flatten()
    squared = squared_distances(near.a, near.b, rows[undecided], balls[undecided])
    inside[undecided] = squared <= squared_radii[balls[undecided]]
    holding.index_add_(0, rows[inside], torch.ones_like(rows[inside]))
    covered[balls[inside]] = True
