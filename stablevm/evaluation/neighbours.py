"""Sets of features compared by distances: precision and recall, coverage, nearest neighbours. Blocked, and exact.

`|a|^2 + |b|^2 - 2ab` needs one matrix product for many distances at once, but it cancels: equal rows would lie apart,
and the radii of near copies would be noise. So the product only sorts out. Its rounding error has a bound (Higham,
2002, section 3.1): what the bound decides is decided, and the few pairs that it leaves open are settled by differences
in float64. The result is that of comparing all pairs one by one, with points on the edge of a ball inside.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stablevm.errors import UserError
from stablevm.evaluation.statistics import check_features
from stablevm.precision import full_precision

PRECISION_RECALL_K = 3  # Kynkäänniemi et al., 2019, "Improved precision and recall metric"
COVERAGE_K = 5  # Naeem et al., 2020, "Reliable fidelity and diversity metrics": equal sets then get 1 - 2^-5 = 0.97
BLOCK_ROWS = 4096  # a block of products is 64 MiB
PAIRS_AT_ONCE = 512  # settled by differences: 8 MiB of float64 where features are 2,048 wide
SPARE_CANDIDATES = 5  # beyond the k nearest by the bounds: enough to prove nearly every row


@dataclass(frozen=True)
class Points:
    """Rows to compare, as they are and prepared for the products: float32, all on one device."""

    rows: Tensor  # (n, width)
    factors: Tensor  # (n, width + 2): the rows about a common mean, 1, and `low`
    low: Tensor  # (n,) squared norms about that mean, less what rounding may add to a squared distance
    spread: Tensor  # (n,) a squared distance is at most both spreads above its lower bound

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self) -> Iterator[tuple[int, "Points"]]:
        for start in range(0, len(self), BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            yield start, Points(self.rows[part], self.factors[part], self.low[part], self.spread[part])


def points(*sets: Tensor, device: torch.device | None = None) -> list[Points]:
    """The sets (n, width) prepared for comparison with one another; UserError if not finite or not equally wide."""
    for features in sets:
        check_features(features)
        if features.shape[1] != sets[0].shape[1]:
            raise UserError(
                f"features are {sets[0].shape[1]} and {features.shape[1]} wide: take both from the same extractor"
            )
    device = device or sets[0].device
    rows = [features.detach().to(device, torch.float32) for features in sets]
    centre = rows[0].mean(0)
    return [_prepared(each, centre) for each in rows]


def _prepared(rows: Tensor, centre: Tensor) -> Points:
    count, width = rows.shape
    # A sum of n + 4 products is off by (n + 4) u of its terms' sizes, which add up to twice the norms; the rest is for
    # centring and for rounding what is stored.
    relative = (2 * (width + 4) + 16) * torch.finfo(torch.float32).eps / 2
    factors = torch.ones(count, width + 2, device=rows.device)
    torch.sub(rows, centre, out=factors[:, :width])
    norms = torch.cat([block.double().square().sum(1) for block in factors[:, :width].split(BLOCK_ROWS)])
    factors[:, -1] = norms * (1 - relative)
    spread = (norms * 2 * relative * (1 + relative)).float()
    return Points(rows, factors, factors[:, -1].clone(), spread)


@dataclass(frozen=True)
class Membership:
    """Who lies in a ball of the other set: (samples,) and (references,) bool; their means are precision and recall."""

    samples: Tensor
    reference: Tensor

    @property
    def precision(self) -> float:
        return float(self.samples.double().mean())

    @property
    def recall(self) -> float:
        return float(self.reference.double().mean())


def membership(
    reference: Tensor, samples: Tensor, k: int = PRECISION_RECALL_K, device: torch.device | None = None
) -> Membership:
    """Which samples lie inside the reference's manifold, and which of the reference inside the samples'.

    A set's manifold is the union of the closed balls around its points that reach the k-th nearest neighbour, itself
    excluded (Kynkäänniemi et al., 2019, equations 1 and 2).
    """
    check_counts(reference, samples, k)
    real, fake = points(reference, samples, device=device)
    in_real, in_fake = _inside(real, radii(real, k), fake, radii(fake, k))
    return Membership(samples=in_real.cpu(), reference=in_fake.cpu())


def precision_recall(reference: Tensor, samples: Tensor, k: int = PRECISION_RECALL_K) -> tuple[float, float]:
    """Share of samples inside the reference's manifold, and of the reference inside the samples' (both in [0, 1])."""
    found = membership(reference, samples, k)
    return found.precision, found.recall


def coverage(reference: Tensor, samples: Tensor, k: int = COVERAGE_K) -> float:
    """Share of the reference's k-nearest-neighbour balls that hold a sample (Naeem et al., 2020)."""
    check_counts(reference, samples, k)
    real, fake = points(reference, samples)
    _, squared = _nearest(real, fake)
    return float((squared <= radii(real, k)).double().mean())


def nearest(queries: Tensor, among: Tensor, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Of each query (n, width), the nearest of `among` (m, width): its position (n,) and its distance, float64 (n,)."""
    indices, squared = _nearest(*points(queries, among, device=device))
    return indices.cpu(), squared.sqrt().cpu()


def nearest_distance(queries: Tensor, among: Tensor) -> Tensor:
    """Euclidean distance of each query (n, width) to the nearest of `among` (m, width): float32 (n,)."""
    return nearest(queries, among)[1].float()


def radii(among: Points, k: int) -> Tensor:
    """Squared distance of each point to its k-th nearest neighbour, itself excluded by position: float64 (n,)."""
    kept = min(k + SPARE_CANDIDATES, len(among) - 1)
    bounds = torch.full((len(among), kept), torch.inf, device=among.rows.device)
    indices = torch.zeros((len(among), kept), dtype=torch.int64, device=among.rows.device)
    for start, block in among.blocks():
        for other_start, other in among.blocks():
            if other_start < start:  # a block and its mirror image come from one product
                continue
            lower = _lower_bounds(block, other)
            if start == other_start:
                lower.fill_diagonal_(torch.inf)
            _keep_smallest(bounds[start : start + len(block)], indices[start : start + len(block)], lower, other_start)
            if start != other_start:
                mine = slice(other_start, other_start + len(other))
                _keep_smallest(bounds[mine], indices[mine], lower.T.contiguous(), start)
    return _settled(among, among, bounds, indices, k, exclude_self=True)[1]


def check_counts(reference: Tensor, samples: Tensor, k: int) -> None:
    """UserError where a set has too few rows for k nearest neighbours."""
    for name, features in (("reference", reference), ("samples", samples)):
        check_features(features)
        if len(features) <= k:
            raise UserError(f"{name}: {len(features)} images, but {k} nearest neighbours need at least {k + 1}")


def _nearest(queries: Points, among: Points) -> tuple[Tensor, Tensor]:
    """Position and squared distance of the nearest of `among`, (n,) each."""
    kept = min(1 + SPARE_CANDIDATES, len(among))
    bounds = torch.full((len(queries), kept), torch.inf, device=among.rows.device)
    indices = torch.zeros((len(queries), kept), dtype=torch.int64, device=among.rows.device)
    for start, block in queries.blocks():
        mine = slice(start, start + len(block))
        for other_start, other in among.blocks():
            _keep_smallest(bounds[mine], indices[mine], _lower_bounds(block, other), other_start)
    return _settled(queries, among, bounds, indices, 1, exclude_self=False)


def _lower_bounds(a: Points, b: Points) -> Tensor:
    """|a|^2 - 2ab + |b|^2 of all pairs (len(a), len(b)), less what rounding may add: no squared distance is below it.

    One product gives the whole sum; float32 whatever the global switches say.
    """
    left = torch.cat([-2 * a.factors[:, :-2], a.low[:, None], torch.ones_like(a.low)[:, None]], 1)
    with full_precision(left.device):
        return left @ b.factors.T


def _keep_smallest(bounds: Tensor, indices: Tensor, lower: Tensor, start: int) -> None:
    """Let `bounds` and `indices` (n, kept) be the smallest of them and of a block whose columns begin at `start`."""
    values, columns = lower.topk(min(bounds.shape[1], lower.shape[1]), dim=1, largest=False, sorted=False)
    values, indices_of_both = torch.cat([bounds, values], 1), torch.cat([indices, columns + start], 1)
    best, chosen = values.topk(bounds.shape[1], dim=1, largest=False)
    bounds.copy_(best)
    indices.copy_(indices_of_both.gather(1, chosen))


def _settled(
    queries: Points, among: Points, bounds: Tensor, indices: Tensor, k: int, *, exclude_self: bool
) -> tuple[Tensor, Tensor]:
    """The k-th nearest of each query, position and squared distance (n,), from the nearest by lower bounds (n, kept).

    Only candidates whose bounds leave it open whether they are the k-th are measured. A row is proven when the k-th
    distance is at most the largest bound kept: everything else is at least as far. The others, of many near copies, are
    compared with all.
    """
    upper = (bounds + queries.spread[:, None] + among.spread[indices]) * (1 + torch.finfo(torch.float32).eps)
    kth_lower, kth_upper = (each.kthvalue(k, dim=1, keepdim=True).values for each in (bounds, upper))
    squared = torch.where(upper < kth_lower, -torch.inf, torch.inf).double()
    rows, columns = ((upper >= kth_lower) & (bounds <= kth_upper)).nonzero().T
    squared[rows, columns] = _squared_distances(queries, among, rows, indices[rows, columns])
    kth, place = squared.kthvalue(k, dim=1)
    position = indices.gather(1, place[:, None])[:, 0]
    complete = indices.shape[1] == len(among) - exclude_self
    for row in (~(complete | (kth <= bounds.amax(1)) | (kth == 0))).nonzero().flatten().tolist():
        every = torch.arange(len(among), device=indices.device)
        distances = _squared_distances(queries, among, torch.full_like(every, row), every)
        if exclude_self:
            distances[row] = torch.inf
        kth[row], position[row] = distances.kthvalue(k)
    return position, kth


def _inside(a: Points, a_radii: Tensor, b: Points, b_radii: Tensor) -> tuple[Tensor, Tensor]:
    """Of each b, whether it lies in a ball around an a; of each a, whether in a ball around a b. Radii are squared."""
    b_in, a_in = (torch.zeros(len(each), dtype=torch.bool, device=each.rows.device) for each in (b, a))
    for start, block in a.blocks():
        for other_start, other in b.blocks():
            mine, theirs = slice(start, start + len(block)), slice(other_start, other_start + len(other))
            lower = _lower_bounds(block, other)
            _mark(a_in[mine], lower, block, other, b_radii[theirs])
            _mark(b_in[theirs], lower.T, other, block, a_radii[mine])
    return b_in, a_in


def _mark(inside: Tensor, lower: Tensor, queries: Points, balls: Points, squared_radii: Tensor) -> None:
    """Set `inside` for the queries (rows of `lower`) that lie in one of the balls (columns)."""
    down, up = (torch.tensor(sign * torch.inf, device=lower.device) for sign in (-1, 1))
    surely = squared_radii - balls.spread.double() - queries.spread.max().double()
    inside |= (lower <= surely.float().nextafter(down)).any(1)
    undecided = (~inside).nonzero().flatten()
    open_pairs = lower[undecided] <= squared_radii.float().nextafter(up)
    for part in open_pairs.nonzero().split(PAIRS_AT_ONCE):
        rows, columns = undecided[part[:, 0]], part[:, 1]
        waiting = ~inside[rows]
        rows, columns = rows[waiting], columns[waiting]
        hits = _squared_distances(queries, balls, rows, columns) <= squared_radii[columns]
        inside[rows[hits]] = True


def _squared_distances(a: Points, b: Points, rows: Tensor, columns: Tensor) -> Tensor:
    """Of the pairs (rows[i], columns[i]), by differences in float64: (pairs,).

    One pair has one value in whatever company and order it is computed, so that a point on the edge of a ball is in it.
    """
    blocks = []
    for some_rows, some_columns in zip(rows.split(PAIRS_AT_ONCE), columns.split(PAIRS_AT_ONCE), strict=True):
        difference = a.rows[some_rows].double() - b.rows[some_columns].double()
        blocks.append(torch.linalg.vecdot(difference, difference))
    return torch.cat(blocks) if blocks else torch.zeros(0, dtype=torch.float64, device=a.rows.device)
