"""The posterior mean `m(x_t) = E[x0 | x_t]` over reference samples, computed like attention.

With `x_t = alpha x0 + sigma noise`, where x0 (the *anchor*) is one of the references, and `lam = alpha / sigma`,

    logit_k = -0.5 lam^2 |x0 - b_k|^2 - lam noise.(x0 - b_k),    m = sum_k softmax(logit)_k b_k

This is the anchored form of the self-normalised estimator of Xu et al. (2023, "Stable Target Field", equation 6), which
StableVM (Yang et al., 2026) uses too. The anchor's own logit is 0, so it needs no entry among the references: it always
takes part exactly once, and `references` holds the others.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from stablevm.interpolant import Interpolant
from stablevm.support.precision import full_precision
from stablevm.support.shapes import ShownByShape

# Logits this far below the largest get weight 0: e^-43 is 2e-19, and the square of any smaller weight is subnormal in
# float32, which is slow on a CPU.
LEAST_EXPONENT = -43.0
LEAST_WEIGHT = math.exp(LEAST_EXPONENT)


@dataclass(frozen=True)
class _Limits:
    """How many values of references, and how many logits, are held in memory at once."""

    values: int
    logits: int


# Small enough for a CPU's cache; large enough to fill a GPU with few kernels (256 MiB of float32 values).
_CPU, _ACCELERATOR = _Limits(values=2**21, logits=2**17), _Limits(values=2**26, logits=2**22)


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
) -> Posterior:
    """Compute the posterior mean of each row over its anchor and its references, as the offset from the anchor.

    anchors, noise: (B, *shape), the x0 and the noise that made x_t; t: (B,) times in [0, 1].
    references: float32, or float16 from storage, in one of three arrangements:
        (n, *shape)                  one set for all rows;
        (B, n, *shape)               one set per row;
        (G, n, *shape) with groups   a bank of G sets; row i uses set groups[i] (int64).
    keep: (B, n) bool, False where a reference takes no part in a row (an empty slot, a copy of the anchor); or float,
        the log of the ratio of each reference's prior probability to the anchor's, -inf where it takes no part.

    All arithmetic is float32 or wider, with full-precision products even under autocast and TF32. Where each row has
    references of its own, differences are taken before products; products with shared references are float64. So
    references that nearly coincide are still told apart. Where sigma = 0 (t = 0), x_t equals its anchor: the offset is
    0 and the effective sample size is 1.
    """
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

    blocks: pairs of references (n, *shape) and keep (B, n) or None, as in `posterior`.
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
    """Offsets and sample sizes; rows of the same group share one pass over its references, and nothing is copied."""
    offset, ess, room = torch.empty_like(x0), torch.empty_like(lam, dtype=torch.float32), _Workspace(x0.device)
    for group in groups.unique().tolist():
        rows = (groups == group).nonzero().squeeze(1)
        mask = None if keep is None else keep[rows][None]
        part = _attend(x0[rows][None], eps[rows][None], lam[rows][None], bank[group][None], mask, room)
        offset[rows], ess[rows] = part[0][0], part[1][0]
    return offset, ess


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

    x0, eps: (G, R, d); lam: (G, R); refs: (G, n, d); keep: (G, R, n).
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
        self.half_square = 0.5 * lam.square()
        self.query = lam.square() * self.own + lam * eps.to(self.dtype)
        self.peak = ((self.query - self.half_square * self.own) * self.own).sum(-1, keepdim=True)
        self.mass = torch.ones_like(self.peak)
        self.squared_mass = torch.ones_like(self.peak)
        self.offset = torch.zeros_like(self.own)

    def add(self, refs: Tensor, keep: Tensor | None) -> None:
        """Add references (G, n, d) to all rows, or to those where keep (G, R, n) allows it."""
        groups, rows, width = self.own.shape
        count, limits = refs.shape[1], self.room.limits
        block = max(1, min(count, limits.logits // (groups * rows), limits.values // (groups * width)))
        for start in range(0, count, block):
            part = slice(start, min(start + block, count))
            self._add_block(refs[:, part], None if keep is None else keep[:, :, part])

    def _add_block(self, refs: Tensor, keep: Tensor | None) -> None:
        groups, rows, width = self.own.shape
        count = refs.shape[1]
        wide = self.room.take("wide", (groups, rows, count), self.dtype)
        narrow = self.room.take("narrow", (groups, rows, count), torch.float32)
        differences = self.room.take("differences", (groups, count, width), self.dtype)
        if refs.is_cpu and refs.dtype != self.dtype:
            refs = differences.copy_(refs)  # the subtraction would convert them too, but in new memory
        delta = torch.sub(refs, self.centre, out=differences)
        squares = torch.linalg.vector_norm(delta, dim=-1).square()[:, None]
        logits = torch.bmm(self.query, delta.mT, out=wide).addcmul_(self.half_square, squares, value=-1)
        if keep is not None and keep.dtype == torch.bool:
            logits.masked_fill_(~keep, -torch.inf)
        elif keep is not None:
            logits.add_(keep)
        peak = torch.maximum(self.peak, logits.amax(-1, keepdim=True))
        # Set to zero only after the exponential: on a CPU, exp(-inf) takes 20 times as long.
        weights = narrow.copy_(logits.sub_(peak)).clamp_(min=LEAST_EXPONENT - 1).exp_()
        torch.threshold_(weights, LEAST_WEIGHT, 0.0)
        shrink = (self.peak - peak).exp()
        squared = torch.linalg.vector_norm(weights, dim=-1, keepdim=True).to(self.dtype).square()
        weights = wide.copy_(weights)
        mass = weights.sum(-1, keepdim=True)
        moment = self.own * mass - weights @ delta
        self.peak = peak
        self.mass = self.mass * shrink + mass
        self.squared_mass = self.squared_mass * shrink.square() + squared
        self.offset = self.offset * shrink + moment

    def result(self) -> tuple[Tensor, Tensor]:
        """Offsets (G, R, d) and effective sample sizes (G, R), float32."""
        ess = self.mass.square() / self.squared_mass
        return (self.offset / self.mass).float(), ess.squeeze(-1).float()
