"""Bounds on the squared distances between all pairs of rows in two blocks of features.

`|a|^2 + |b|^2 - 2ab` takes one matrix product for many distances, but suffers from cancellation: equal rows would lie
apart, and the distances of near copies would be noise. So the product is used only for bounds, by the known bound on
its rounding error (Higham, 2002, section 3.1), which is relative to the norms about the centre. Where many rows lie so
close together that the bounds are useless, the product is computed again with one of them as the centre, where the
norms are as small as the distances.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stablevm.metrics.statistics import check_sets
from stablevm.support.precision import full_precision

BLOCK_ROWS = 4096  # a block of products is 64 MiB
PAIRS_AT_ONCE = {"cpu": 32}  # compared by differences in float64, 512 elsewhere; on a CPU this fits its cache
VAGUE = 256  # a bound is vague if its error may exceed the squared distance divided by this
FEW_PAIRS = 2  # per row and column of a block: up to so many vague pairs are computed by differences
MAX_DEPTH = 8  # of crowds within crowds; each is 60 times smaller, so float32 can resolve four


@dataclass(frozen=True)
class Points:
    """Rows of features and the factors of their products: float32, all on one device."""

    rows: Tensor  # (n, width)
    factors: Tensor  # (n, width + 2): the rows relative to a common centre, then 1 and `low`
    low: Tensor  # (n,) squared norms about that centre, minus what rounding may add to a squared distance
    spread: Tensor  # (n,) a squared distance is at most its lower bound plus both spreads

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: slice | Tensor) -> "Points":
        return Points(self.rows[chosen], self.factors[chosen], self.low[chosen], self.spread[chosen])

    def blocks(self) -> Iterator[tuple[int, "Points"]]:
        for start in range(0, len(self), BLOCK_ROWS):
            yield start, self[start : start + BLOCK_ROWS]


def points(*sets: Tensor, device: torch.device | None = None) -> list[Points]:
    """Prepare sets (n, width) for comparison with one another; UserError if not finite or not equally wide."""
    check_sets(*sets)
    device = device or sets[0].device
    rows = [features.detach().to(device, torch.float32) for features in sets]
    centre = mean_of(rows[0])
    return [about(centre, each) for each in rows]


def mean_of(rows: Tensor) -> Tensor:
    """The mean (width,) of rows (n, width), float32, rounded once, since rows may be as close as float32 allows."""
    return rows.mean(0, dtype=torch.float64).float()


def about(centre: Tensor, rows: Tensor) -> Points:
    """Prepare rows (n, width) relative to a centre (width,); the bounds are tightest for rows near it."""
    count, width = rows.shape
    kind = torch.finfo(torch.float32)
    # The error of a sum of n + 4 products is at most (n + 4) u times the sum of their absolute values, which is at most
    # twice the norms. The rest covers centring and the rounding of stored values. Products that underflow are lost.
    relative = (2 * (width + 4) + 16) * kind.eps / 2
    factors = torch.ones(count, width + 2, dtype=torch.float32, device=rows.device)
    torch.sub(rows, centre, out=factors[:, :width])
    norms = torch.cat([block.double().square().sum(1) for block in factors[:, :width].split(BLOCK_ROWS)])
    lost = 4 * (width + 4) * kind.tiny * (norms > 0)  # a copy of the centre is exact
    factors[:, -1] = norms * (1 - relative) - lost
    spread = (norms * 2 * relative * (1 + relative) + 2 * lost).float()
    return Points(rows, factors, factors[:, -1].clone(), spread)


@dataclass(frozen=True)
class Bounds:
    """Bounds on the squared distances between all pairs of two blocks: (len(a), len(b))."""

    a: Points
    b: Points
    lower: Tensor
    sharpened: Tensor | None  # upper bounds; None where they are `lower` plus both spreads

    @property
    def mirrored(self) -> "Bounds":
        return Bounds(self.b, self.a, self.lower.T, None if self.sharpened is None else self.sharpened.T)

    def any_surely_within(self, squared: Tensor) -> Tensor:
        """For each row of `a`, whether the bounds prove that it lies within `squared` (len(b),) of a row of `b`."""
        if self.sharpened is not None:
            return (self.sharpened <= _rounded_down(squared)).any(1)
        # one spread for all rows of `a`: a sum for each pair would cost another matrix
        return (self.lower <= _rounded_down(squared - self.b.spread.double() - self.a.spread.max().double())).any(1)

    def pairs_within(self, squared: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The pairs that may lie within `squared`, (len(b),) or (len(a), 1); only for these `rows` of `a` if given."""
        lower = self.lower if rows is None else self.lower[rows]
        up = lower.new_tensor(torch.inf)
        found, columns = (lower <= squared.float().nextafter(up)).nonzero().T
        return found if rows is None else rows[found], columns

    def upper(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The upper bounds of the pairs (rows[i], columns[i])."""
        if self.sharpened is not None:
            return self.sharpened[rows, columns]
        return _widened(self.lower[rows, columns] + self.a.spread[rows], self.b.spread[columns])


def bounds_between(a: Points, b: Points, *, same: bool = False) -> Bounds:
    """Bounds for all pairs of two blocks; if they are the `same` block, a row is infinitely far from itself."""
    lower = _lower_bounds(a, b)
    if same:
        lower.fill_diagonal_(torch.inf)
    if float(lower.amin()) >= VAGUE * float(a.spread.max() + b.spread.max()):
        return Bounds(a, b, lower, None)
    vague = _vague(lower, a, b)
    if not vague.any():
        return Bounds(a, b, lower, None)
    upper = _widened(lower + a.spread[:, None], b.spread)
    _sharpen(lower, upper, vague, a, b, depth=0)
    return Bounds(a, b, lower, upper)


def _rounded_down(values: Tensor) -> Tensor:
    """The largest float32 not above each of the float64 values."""
    nearest = values.float()
    below = nearest.nextafter(nearest.new_tensor(-torch.inf))
    return torch.where(nearest.double() > values, below, nearest)


def _lower_bounds(a: Points, b: Points) -> Tensor:
    """Lower bounds (len(a), len(b)) on all squared distances: |a|^2 - 2ab + |b|^2 minus what rounding may add.

    One product computes the whole sum, in float32 whatever the global switches say.
    """
    left = torch.cat([-2 * a.factors[:, :-2], a.low[:, None], torch.ones_like(a.low)[:, None]], 1)
    with full_precision(left.device):
        return left @ b.factors.T


def _widened(bounds: Tensor, spread: Tensor) -> Tensor:
    """Add a spread to `bounds` in place, with a margin for the rounding of the sum, so that they are upper bounds."""
    return bounds.add_(spread).mul_(1 + 4 * torch.finfo(torch.float32).eps)


def _vague(lower: Tensor, a: Points, b: Points) -> Tensor:
    return lower < (VAGUE * a.spread)[:, None] + VAGUE * b.spread


def _sharpen(lower: Tensor, upper: Tensor, vague: Tensor, a: Points, b: Points, depth: int) -> None:
    """Tighten the bounds of the `vague` pairs: crowds by products relative to one of their rows, others by differences.

    lower, upper, vague: (len(a), len(b)), all changed in place.
    """
    few, counts = FEW_PAIRS * (len(a) + len(b)), vague.sum(1)
    while depth < MAX_DEPTH and int(counts.sum()) > few:
        pivot = int(counts.argmax())
        columns = vague[pivot].nonzero().flatten()
        rows = (2 * vague[:, columns].sum(1) > len(columns)).nonzero().flatten()
        _sharpen_crowd(lower, upper, vague, a, b, rows, columns, pivot, depth)
        counts[rows] = vague[rows].sum(1)
    rows, columns = vague.nonzero().T
    exact = squared_distances(a, b, rows, columns).float()
    down, up = (exact.new_tensor(sign * torch.inf) for sign in (-1, 1))
    lower[rows, columns], upper[rows, columns] = exact.nextafter(down), exact.nextafter(up)


def _sharpen_crowd(
    lower: Tensor, upper: Tensor, vague: Tensor, a: Points, b: Points,
    rows: Tensor, columns: Tensor, pivot: int, depth: int,
) -> None:  # fmt: skip
    """Tighten the bounds of these rows and columns, which lie near `a.rows[pivot]`, until none of them is vague."""
    near, others = (about(a.rows[pivot], each) for each in (a.rows[rows], b.rows[columns]))
    local_lower = _lower_bounds(near, others)
    local_upper = _widened(local_lower + near.spread[:, None], others.spread)
    crowd = (rows[:, None], columns)
    open_pairs = vague[crowd] & _vague(local_lower, near, others)
    if open_pairs.any():
        _sharpen(local_lower, local_upper, open_pairs, near, others, depth + 1)
    before = upper[crowd]
    lower[crowd] = torch.maximum(lower[crowd], local_lower)
    # Infinite bounds, of a row and itself, stay infinite.
    upper[crowd] = torch.where(before.isinf(), before, torch.minimum(before, local_upper))
    vague[crowd] = False


def squared_distances(a: Points, b: Points, rows: Tensor, columns: Tensor) -> Tensor:
    """The squared distances (pairs,) of the pairs (rows[i], columns[i]), from differences in float64.

    The value of a pair does not depend on the other pairs or their order, so a point on the edge of a ball is inside.
    """
    blocks, at_once = [], PAIRS_AT_ONCE.get(a.rows.device.type, 512)
    for some_rows, some_columns in zip(rows.split(at_once), columns.split(at_once), strict=True):
        difference = a.rows[some_rows].double() - b.rows[some_columns].double()
        blocks.append(torch.linalg.vecdot(difference, difference))
    return torch.cat(blocks) if blocks else torch.zeros(0, dtype=torch.float64, device=a.rows.device)
