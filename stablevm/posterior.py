"""The posterior mean `m(x_t) = E[x0 | x_t]` over reference samples, computed like attention.

With `x_t = alpha x0 + sigma noise`, where x0 (the *anchor*) is one of the references, and `lam = alpha / sigma`,

    logit_k = -0.5 lam^2 |x0 - b_k|^2 - lam noise.(x0 - b_k),    m = sum_k softmax(logit)_k b_k

This is the anchored form of the self-normalised estimator of Xu et al. (2023, "Stable Target Field", equation 6), which
StableVM (Yang et al., 2026) uses too. The anchor's own logit is 0, so it needs no entry among the references: it always
takes part exactly once, and `references` holds the others.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stablevm.interpolant import Interpolant
from stablevm.support.precision import full_precision
from stablevm.support.shapes import ShownByShape

# Logits are in base 2, as exp2 takes less than half the time of exp on some CPUs.
LOG2_E = math.log2(math.e)
# Logits this far below the largest get weight 0: 2^-62 is 2e-19, and the square of any smaller weight is subnormal in
# float32, which is slow on a CPU.
LEAST_EXPONENT = -62.0


@dataclass(frozen=True)
class _Limits:
    """How many values of references, and how many logits, are held in memory at once."""

    values: int
    logits: int


# Small enough for a CPU's cache; large enough to fill a GPU with few kernels (256 MiB of float32 values).
_CPU, _ACCELERATOR = _Limits(values=2**21, logits=2**18), _Limits(values=2**26, logits=2**22)
# Groups of a bank are computed together up to this many values of references and, padded, this many rows each: with
# fewer, calling the operations takes longer than the operations.
_TOGETHER_VALUES, _TOGETHER_ROWS = 2**18, 8
# Below this many values of a reference, passes over the logits take longer than products.
_WIDE = 128


@dataclass(frozen=True, repr=False)
class Posterior(ShownByShape):
    """Result of `posterior`: `offset` is x0 - m (B, *shape), `ess` (B,) the effective sample size 1 / sum_k w_k^2."""

    offset: Tensor
    ess: Tensor


@torch.no_grad()
def posterior(
    path: Interpolant,
    anchors: Tensor,
    noise: Tensor,
    t: Tensor,
    references: Tensor,
    *,
    groups: Tensor | None = None,
    keep: Tensor | None = None,
    omit: Tensor | None = None,
) -> Posterior:
    """Compute the posterior mean of each row over its anchor and its references, as the offset from the anchor.

    anchors, noise: (B, *shape), the x0 and the noise that made x_t; t: (B,) times in [0, 1].
    references: float32, or float16 from storage, in one of three arrangements:
        (n, *shape)                  one set for all rows;
        (B, n, *shape)               one set per row;
        (G, n, *shape) with groups   a bank of G sets; row i uses set groups[i] (int64).
    keep: (B, n) bool, False where a reference takes no part in a row (an empty slot, a copy of the anchor); or float,
        the log of the ratio of each reference's prior probability to the anchor's, -inf where it takes no part.
    omit: in place of keep, (B,) int64, the position in its set of the only reference that takes no part in a row, such
        as the anchor itself; a position outside the set omits none. This is faster than a mask.

    All arithmetic is float32 or wider, with full-precision products even under autocast and TF32. Where each row has
    references of its own, differences are taken before products; products with shared references are float64. So
    references that nearly coincide are still told apart. Where sigma = 0 (t = 0), x_t equals its anchor: the offset is
    0 and the effective sample size is 1.
    """
    if keep is not None and omit is not None:
        raise ValueError("expected keep or omit, not both")
    keep = omit if keep is None else keep
    flat = references.flatten(references.ndim - anchors.ndim + 1)
    x0, eps, lam = _flat_rows(path, anchors, noise, t)
    with full_precision(anchors.device):
        if flat.ndim == 2:
            mask, room = None if keep is None else keep[None], _Workspace(anchors.device)
            offset, ess = _attend(x0[None], eps[None], lam[None], flat[None], mask, room)
            offset, ess = offset[0], ess[0]
        elif groups is None:
            offset, ess = _per_row(x0, eps, lam, flat, None, keep)
        elif anchors.device.type == "cpu":
            offset, ess = _per_group(x0, eps, lam, flat, groups, keep)
        else:  # to find the groups, the host would have to wait for the GPU
            offset, ess = _per_row(x0, eps, lam, flat, groups, keep)
    return _posterior(anchors, lam, offset, ess)


@torch.no_grad()
def posterior_over_blocks(
    path: Interpolant, anchors: Tensor, noise: Tensor, t: Tensor, blocks: Iterable[tuple[Tensor, Tensor | None]]
) -> Posterior:
    """Like `posterior`, over one set for all rows that is read in blocks, one in memory at a time.

    blocks: pairs of references (n, *shape) and keep (B, n) or omit (B,), as in `posterior`, or None.
    """
    x0, eps, lam = _flat_rows(path, anchors, noise, t)
    with full_precision(anchors.device):
        weighing = _Weighing(x0[None], eps[None], lam[None], _Workspace(anchors.device))
        for references, keep in blocks:
            weighing.add(references.reshape(1, len(references), -1), None if keep is None else keep[None])
        offset, ess = weighing.result()
    return _posterior(anchors, lam, offset[0], ess[0])


def _flat_rows(path: Interpolant, anchors: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors and noise as (B, d) float32, and lam = alpha / sigma as (B,) float64, infinite at t = 0."""
    rows = anchors.shape[0]
    at = path.coefficients(t.double().expand(rows))
    return anchors.reshape(rows, -1).float(), noise.reshape(rows, -1).float(), at.alpha / at.sigma


def _posterior(anchors: Tensor, lam: Tensor, offset: Tensor, ess: Tensor) -> Posterior:
    """The result in the anchors' shape; offset 0 and sample size 1 where lam is infinite, since x_t is the anchor."""
    finite = lam.isfinite()
    offset = torch.where(finite[:, None], offset, 0.0)
    return Posterior(offset.reshape(anchors.shape), torch.where(finite, ess, 1.0))


def _per_group(
    x0: Tensor, eps: Tensor, lam: Tensor, bank: Tensor, groups: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Offsets and sample sizes; rows of the same group share one pass over its references."""
    offset, ess, room = torch.empty_like(x0), torch.empty_like(lam, dtype=torch.float32), _Workspace(x0.device)
    for sets, rows_of_sets in _batches(groups, max(1, _TOGETHER_VALUES // max(1, bank[0].numel()))):
        rows = pad_sequence(rows_of_sets, batch_first=True, padding_value=-1)
        refs = bank[sets[0]][None] if len(sets) == 1 else bank[sets]  # one alone is not copied
        part = _attend(x0[rows], eps[rows], lam[rows], refs, None if keep is None else keep[rows], room)
        if len(sets) == 1:
            offset[rows], ess[rows] = part
        else:  # row -1, the last one, fills up smaller groups and is left out
            is_row = rows >= 0
            offset[rows[is_row]], ess[rows[is_row]] = part[0][is_row], part[1][is_row]
    return offset, ess


def _batches(groups: Tensor, most: int) -> Iterator[tuple[list[int], list[Tensor]]]:
    """The groups that are computed together, at most `most`: their numbers, and the rows (R,) of each. The numbers of
    rows differ by less than a factor of two, or are small.
    """
    numbers, sizes = (found.tolist() for found in groups.unique(return_counts=True))
    alike: dict[int, list[tuple[int, Tensor]]] = {}
    for number, rows in zip(numbers, groups.argsort(stable=True).split(sizes), strict=True):
        alike.setdefault(max(0, math.ceil(math.log2(len(rows) / _TOGETHER_ROWS))), []).append((number, rows))
    for pairs in alike.values():
        for start in range(0, len(pairs), most):
            part = pairs[start : start + most]
            yield [number for number, _ in part], [rows for _, rows in part]


def _per_row(
    x0: Tensor, eps: Tensor, lam: Tensor, sets: Tensor, groups: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Offsets and sample sizes for rows with references of their own (copied from the bank where `groups` is given),
    computed for a limited number of rows at a time.
    """
    parts, room = [], _Workspace(x0.device)
    chunk = max(1, room.limits.values // max(1, sets[0].numel()))
    for start in range(0, x0.shape[0], chunk):
        rows = slice(start, start + chunk)
        refs = sets[rows if groups is None else groups[rows]]
        mask = None if keep is None else keep[rows, None]
        parts.append(_attend(x0[rows, None], eps[rows, None], lam[rows, None], refs, mask, room))
    return torch.cat([part[0] for part in parts])[:, 0], torch.cat([part[1] for part in parts])[:, 0]


def _attend(
    x0: Tensor, eps: Tensor, lam: Tensor, refs: Tensor, keep: Tensor | None, room: "_Workspace"
) -> tuple[Tensor, Tensor]:
    """Offsets (G, R, d) and sample sizes (G, R) for G groups of R rows that share n references.

    x0, eps: (G, R, d); lam: (G, R); refs: (G, n, d); keep: (G, R, n), or (G, R) int64 to omit one.
    """
    weighing = _Weighing(x0, eps, lam, room)
    weighing.add(refs, keep)
    return weighing.result()


class _Workspace:
    """Reused memory for intermediate values; otherwise a CPU would map new pages for each block."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.limits = _CPU if device.type == "cpu" else _ACCELERATOR
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor; the same name gives the same memory."""
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size or flat.dtype != dtype:
            flat = self._flat[name] = torch.empty(size, dtype=dtype, device=self.device)
        return flat[:size].view(shape)


class _Weighing:
    """The softmax over references, computed block by block (online softmax: Milakov and Gimelshein, 2018).

    All vectors are relative to the group's first anchor. With one row per group this is the anchored form itself; with
    more, `|x0 - b|^2` is expanded around that centre in float64, where the cancellation of the expansion is harmless.
    Terms that are equal for all references of a row are left out of the logits.
    """

    def __init__(self, x0: Tensor, eps: Tensor, lam: Tensor, room: "_Workspace") -> None:
        """Start from the anchors alone, each with weight 1: x0, eps (G, R, d) and lam (G, R)."""
        self.room = room
        self.dtype = torch.float32 if x0.shape[1] == 1 else torch.float64
        self.centre = x0[:, :1].to(self.dtype)
        self.own = x0.to(self.dtype) - self.centre
        lam = lam.to(self.dtype)[..., None]
        self.half_square = 0.5 * LOG2_E * lam.square()
        self.query = 2 * self.half_square * self.own + LOG2_E * lam * eps.to(self.dtype)
        self.peak = ((self.query - self.half_square * self.own) * self.own).sum(-1, keepdim=True)
        self.is_wide = x0.shape[-1] >= _WIDE
        if not self.is_wide:  # as many columns as `_columns` gives
            zeros = lam.new_zeros(1).expand(*lam.shape[:-1], 1 + -(x0.shape[-1] + 2) % 4)
            self.query = torch.cat([self.query, -self.half_square, zeros], dim=-1)
        self.mass = torch.ones_like(self.peak)
        self.squared_mass = torch.ones_like(self.peak)
        self.offset = torch.zeros_like(self.own)

    def add(self, refs: Tensor, keep: Tensor | None) -> None:
        """Add references (G, n, d) to all rows, or to those where keep (G, R, n) allows it; or, where keep is (G, R)
        int64, to all rows but that of each reference at its position.
        """
        groups, rows, width = self.own.shape
        count, limits = refs.shape[1], self.room.limits
        block = max(1, min(count, limits.logits // (groups * rows), limits.values // (groups * width)))
        for start in range(0, count, block):
            part = slice(start, min(start + block, count))
            if keep is not None and keep.dtype == torch.int64:
                self._add_block(refs[:, part], keep[..., None] - start)
            else:
                self._add_block(refs[:, part], None if keep is None else keep[:, :, part])

    def _add_block(self, refs: Tensor, keep: Tensor | None) -> None:
        groups, rows, width = self.own.shape
        count = refs.shape[1]
        wide = self.room.take("wide", (groups, rows, count), self.dtype)
        narrow = self.room.take("narrow", (groups, rows, count), torch.float32)
        columns, squares = self._columns(refs)
        logits = torch.bmm(self.query, columns.mT, out=wide)
        if self.is_wide:
            logits.addcmul_(self.half_square, squares[:, None], value=-1)
        if keep is not None:
            _mask(logits, keep)
        peak = torch.maximum(self.peak, logits.amax(-1, keepdim=True))
        weights = narrow.copy_(logits.sub_(peak))
        torch.threshold_(weights, LEAST_EXPONENT, -torch.inf).exp2_()
        shrink = (self.peak - peak).exp2()
        squared = torch.linalg.vector_norm(weights, dim=-1, keepdim=True).to(self.dtype).square()
        weights = wide.copy_(weights)
        moment = weights @ columns
        mass = weights.sum(-1, keepdim=True) if self.is_wide else moment[..., width + 1 : width + 2]
        self.peak = peak
        self.mass = self.mass * shrink + mass
        self.squared_mass = self.squared_mass * shrink.square() + squared
        self.offset = self.offset * shrink + self.own * mass - moment[..., :width]

    def _columns(self, refs: Tensor) -> tuple[Tensor, Tensor]:
        """What queries and weights are multiplied by, (G, n, columns), for references (G, n, d), and the squares (G, n)
        of their differences from the centre.

        The columns are the differences. Where they are few, the squares and ones follow, so that one product gives the
        logits and another both moment and mass; the ones fill up to a multiple of four columns, which is faster.
        """
        width = refs.shape[-1]
        columns = self.room.take("columns", (*refs.shape[:-1], self.query.shape[-1]), self.dtype)
        delta = columns[..., :width]
        if refs.is_cpu and refs.dtype != self.dtype:
            refs = delta.copy_(refs)  # the subtraction would convert them too, but in new memory
        torch.sub(refs, self.centre, out=delta)
        squares = torch.linalg.vector_norm(delta, dim=-1).square()
        if not self.is_wide:
            columns[..., width], columns[..., width + 1 :] = squares, 1
        return columns, squares

    def result(self) -> tuple[Tensor, Tensor]:
        """Offsets (G, R, d) and effective sample sizes (G, R), float32."""
        ess = self.mass.square() / self.squared_mass
        return (self.offset / self.mass).float(), ess.squeeze(-1).float()


def _mask(logits: Tensor, keep: Tensor) -> None:
    """Mask logits (G, R, n) in place: by keep of the same shape, bool or log prior odds, or at positions (G, R, 1)."""
    if keep.dtype == torch.int64:  # without reading how many lie in this block
        position = keep.clamp(0, logits.shape[-1] - 1)
        logits.scatter_(-1, position, logits.gather(-1, position).masked_fill(position == keep, -torch.inf))
    elif keep.dtype == torch.bool:
        torch.where(keep, logits, logits.new_full((), -torch.inf), out=logits)
    else:
        logits.add_(keep, alpha=LOG2_E)
