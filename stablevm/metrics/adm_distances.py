"""Precision and recall as in ADM's evaluation script, which computes squared distances in float16.

Use them only for comparison with published numbers. float16 has 11 significant bits, so squared distances of a few
hundred are rounded to quarters, and a point near the edge of a ball may count on the wrong side. Where this was
measured, precision changed by -0.002 to +0.0023 and recall by -0.002 to +0.003.
"""

import torch
from torch import Tensor

from stablevm.metrics.neighbours import PRECISION_RECALL_K, Membership, check_counts
from stablevm.metrics.statistics import check_sets
from stablevm.support.precision import full_precision

BLOCK = 10_000  # rows and columns of the script's blocks; if any value overflows, the whole block is float32
ROWS_AT_ONCE = 1024  # rows of a block that are widened to float32 at once


def membership_adm(
    reference: Tensor, samples: Tensor, k: int = PRECISION_RECALL_K, device: torch.device | None = None
) -> Membership:
    """Like `neighbours.membership`, with the arithmetic of ADM's script.

    As there, the smallest distance of a point is taken for that to itself, and skipped. How the script's float16 sums
    are rounded depends on TensorFlow's GPU kernels; here a sum is rounded once, at its end.
    """
    check_sets(reference, samples)
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
    """The squared distance (n,) of each row to its k-th nearest neighbour."""
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
    """max(|a|^2 - 2ab + |b|^2, 0) for all pairs, with each step rounded to float16; float32 where float16 overflows."""
    halves = _by_norms(a.half(), b.half())
    return halves if halves.isfinite().all() else _by_norms(a, b)


def _by_norms(a: Tensor, b: Tensor) -> Tensor:
    kind = a.dtype
    norms_a, norms_b = (rows.square().sum(1, dtype=torch.float32).to(kind) for rows in (a, b))
    with full_precision(a.device):
        products = (a.float() @ b.float().T).to(kind)
    return products.mul_(-2).add_(norms_a[:, None]).add_(norms_b).clamp_(min=0)
