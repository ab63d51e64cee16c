"""The posterior mean `m(x_t) = E[x0 | x_t]` over reference samples: the one attention-like kernel of this library.

With `x_t = alpha x0 + sigma noise`, where x0 (the *anchor*) is one of the references, and `lam = alpha / sigma`,

    logit_k = -0.5 lam^2 |x0 - b_k|^2 - lam noise.(x0 - b_k),    m = sum_k softmax(logit)_k b_k

(the anchored form of the self-normalised estimator of Xu et al., 2023, "Stable Target Field", equation 6, which
StableVM, Yang et al., 2026, takes over). The anchor's own logit is 0, so it needs no entry among the references: it
always takes part, exactly once, and `references` hold the others.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stablevm.interpolant import Interpolant
from stablevm.precision import full_precision

# Bytes of float32 differences that are held at once: small enough for a CPU's cache, large enough to fill a GPU.
CHUNK_BYTES_CPU = 8 * 2**20
CHUNK_BYTES_ACCELERATOR = 256 * 2**20


@dataclass(frozen=True)
class Posterior:
    """`offset` is `x0 - m`, shaped like the anchors; `ess` (B,) is the effective sample size `1 / sum_k w_k^2`."""

    offset: Tensor
    ess: Tensor


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
    """Weigh each anchor against its references.

    anchors, noise: (B, *shape), the x0 and the noise that made x_t; t: (B,) times in [0, 1].
    references: float32 or stored float16, in one of three arrangements:
        (n, *shape)                  one set for all rows;
        (B, n, *shape)               one set per row;
        (G, n, *shape) with groups   a bank of G sets; row i uses set groups[i] (int64).
    keep: (B, n) bool; False masks a reference for a row: an empty slot, or a copy of the row's anchor.

    The arithmetic is float32 or wider with full-precision products even under autocast and TF32. Differences are
    taken before products wherever a row has its references to itself, and products of shared references are float64,
    so that references that nearly coincide keep their distances. Where sigma = 0 (t = 0) the noisy sample is its
    anchor, and the references drop out.
    """
    rows = anchors.shape[0]
    per_set = references.shape[: references.ndim - anchors.ndim + 1]
    n = per_set[-1]
    flat = references.reshape(*per_set, -1)
    x0, eps = anchors.reshape(rows, -1).float(), noise.reshape(rows, -1).float()
    at = path.coefficients(t.double().expand(rows))
    noisy = at.sigma > 0
    lam = torch.where(noisy, at.alpha / at.sigma, 0.0)
    mask = noisy[:, None] if keep is None else noisy[:, None] & keep
    mask = mask.expand(rows, n)
    with full_precision(anchors.device):
        if flat.ndim == 2:
            offset, ess = _attend(x0[None], eps[None], lam[None], flat[None], mask[None])
            offset, ess = offset[0], ess[0]
        elif groups is None:
            offset, ess = _per_row(x0, eps, lam, flat, None, mask)
        elif anchors.device.type == "cpu":
            offset, ess = _per_group(x0, eps, lam, flat, groups, mask)
        else:  # finding the groups would make the host wait for the device
            offset, ess = _per_row(x0, eps, lam, flat, groups, mask)
    return Posterior(offset.reshape(anchors.shape), ess)


def _per_group(
    x0: Tensor, eps: Tensor, lam: Tensor, bank: Tensor, groups: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows of the same group share one pass over its references; nothing is gathered."""
    offset, ess = torch.empty_like(x0), torch.empty_like(lam, dtype=torch.float32)
    for group in groups.unique().tolist():
        rows = (groups == group).nonzero().squeeze(1)
        part = _attend(x0[rows][None], eps[rows][None], lam[rows][None], bank[group][None], mask[rows][None])
        offset[rows], ess[rows] = part[0][0], part[1][0]
    return offset, ess


def _per_row(
    x0: Tensor, eps: Tensor, lam: Tensor, sets: Tensor, groups: Tensor | None, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Each row has its references to itself (gathered, where it has a group); a bounded number of rows at a time."""
    limit = CHUNK_BYTES_CPU if x0.device.type == "cpu" else CHUNK_BYTES_ACCELERATOR
    chunk = max(1, limit // max(1, 4 * sets.shape[1] * sets.shape[2]))
    parts = [
        _attend(x0[s, None], eps[s, None], lam[s, None], sets[s if groups is None else groups[s]], mask[s, None])
        for s in (slice(start, start + chunk) for start in range(0, x0.shape[0], chunk))
    ]
    return torch.cat([part[0] for part in parts])[:, 0], torch.cat([part[1] for part in parts])[:, 0]


def _attend(x0: Tensor, eps: Tensor, lam: Tensor, refs: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """G groups of R rows that share n references: x0, eps (G, R, d), lam (G, R), refs (G, n, d), keep (G, R, n).

    Everything is measured from the group's first anchor. With one row per group that is the anchored form itself;
    with more, `|x0 - b|^2` is expanded around that centre and the products are float64, where the cancellation of the
    expansion does no harm. Terms that are the same for all references of a row are left out of the logits.
    """
    dtype = torch.float32 if x0.shape[1] == 1 else torch.float64
    centre = x0[:, :1]
    delta = (refs - centre).to(dtype)
    own = (x0 - centre).to(dtype)
    lam = lam.to(dtype)[..., None]
    query = lam.square() * own + lam * eps.to(dtype)
    logits = query @ delta.mT - 0.5 * lam.square() * torch.linalg.vector_norm(delta, dim=-1).square()[:, None]
    logits = logits.masked_fill(~keep, -torch.inf)
    anchor_logit = ((query - 0.5 * lam.square() * own) * own).sum(-1, keepdim=True)
    logits = torch.cat([anchor_logit, logits], dim=-1)
    weights = (logits - logits.amax(-1, keepdim=True)).float().softmax(-1)
    others = weights[..., 1:].to(dtype)
    offset = own * others.sum(-1, keepdim=True) - others @ delta
    return offset.float(), 1 / weights.square().sum(-1)
