"""Precision and recall as ADM's evaluation script gets them: squared distances in float16.

For comparison with published numbers alone: float16 has 11 digits, so that squared distances of a few hundred are
rounded to quarters, and a point just outside a ball may count as inside, or one inside as outside: precision moved by
-0.002 to +0.0023 and recall by -0.002 to +0.003 where it was measured.
"""

import torch
from torch import Tensor

from stablevm.metrics.neighbours import PRECISION_RECALL_K, Membership, check_counts
from stablevm.support.precision import full_precision

BLOCK = 10_000  # rows and columns of the script's blocks; a block in which anything overflows is float32 as a whole
ROWS_AT_ONCE = 1024  # of a block, where it is widened to float32


def membership_adm(
    reference: Tensor, samples: Tensor, k: int = PRECISION_RECALL_K, device: torch.device | None = None
) -> Membership:
    """`neighbours.membership` by the script's arithmetic; a point is among its own nearest neighbours, and is skipped
    as the first of them.

    What float16 sums lose on a TensorFlow 1 GPU depends on its kernels; here sums are rounded once, at their end.
    """
    check_counts(reference, samples, k)
    device = device or reference.device
    real, fake = (features.detach().to(device, torch.float32) for features in (reference, samples))
    real_radii, fake_radii = _radii(real, k), _radii(fake, k)
    real_in, fake_in = (torch.zeros(len(each), dtype=torch.bool, device=device) for each in (real, fake))
    for start in range(0, len(real), BLOCK):
        mine = slice(start, start + BLOCK)
        for other_start in range(0, len(fake), BLOCK):
            theirs = slice(other_start, other_start + BLOCK)
            block = _squared_distances(real[mine], fake[theirs])
            for begin in range(0, len(block), ROWS_AT_ONCE):
                rows = block[begin : begin + ROWS_AT_ONCE].float()
                some = slice(start + begin, start + begin + len(rows))
                real_in[some] |= (rows <= fake_radii[theirs]).any(1)
                fake_in[theirs] |= (rows <= real_radii[some, None]).any(0)
    return Membership(samples=fake_in.cpu(), reference=real_in.cpu())


def _radii(features: Tensor, k: int) -> Tensor:
    """Squared distance of each to its k-th neighbour, (n,)."""
    best = torch.full((len(features), k + 1), torch.inf, dtype=torch.float32, device=features.device)
    for start in range(0, len(features), BLOCK):
        for other_start in range(0, len(features), BLOCK):
            block = _squared_distances(features[start : start + BLOCK], features[other_start : other_start + BLOCK])
            for begin in range(0, len(block), ROWS_AT_ONCE):
                rows = block[begin : begin + ROWS_AT_ONCE].float()
                mine = slice(start + begin, start + begin + len(rows))
                found = rows.topk(min(k + 1, rows.shape[1]), dim=1, largest=False).values
                best[mine] = torch.cat([best[mine], found], 1).topk(k + 1, dim=1, largest=False).values
    return best.amax(1)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """max(|a|^2 - 2ab + |b|^2, 0) of all pairs, each step rounded to float16; float32 where float16 overflows."""
    halves = _by_norms(a.half(), b.half())
    return halves if halves.isfinite().all() else _by_norms(a, b)


def _by_norms(a: Tensor, b: Tensor) -> Tensor:
    kind = a.dtype
    norms_a, norms_b = (rows.square().sum(1, dtype=torch.float32).to(kind) for rows in (a, b))
    with full_precision(a.device):
        products = (a.float() @ b.float().T).to(kind)
    return products.mul_(-2).add_(norms_a[:, None]).add_(norms_b).clamp_(min=0)
