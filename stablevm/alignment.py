"""Representation alignment: pull the network's inner tokens towards a frozen encoder's (REPA, VA-REPA, iREPA)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stablevm.errors import UserError

# Added to the deviation over patches, as in iREPA (Singh et al., 2025).
IREPA_EPSILON = 1e-6


def alignment_loss(projected: Tensor, features: Tensor) -> Tensor:
    """Minus the mean over patches of the cosine between tokens (B, T, D): values (B,) in [-1, 1].

    REPA (Yu et al., 2024), equation 8. Computed in float32. UserError for other shapes, such as maps (B, D, H, W).
    """
    if projected.ndim != 3 or projected.shape != features.shape:
        raise UserError(
            f"projected tokens are {tuple(projected.shape)}, the encoder's {tuple(features.shape)}: expected the same "
            "(B, T, D) of both; the projector makes the width D, and T is the number of patches, class token left out"
        )
    return -F.cosine_similarity(projected.float(), features.float(), dim=-1).mean(dim=1)


def weighted_alignment(losses: Tensor, weights: Tensor, total: Tensor | None = None) -> Tensor:
    """`sum_i w_i l_i / sum_i w_i` of losses and weights (B,): VA-REPA's term (Yang et al., 2026).

    total: the sum of the weights, where it spans more rows than these (other processes, other micro-batches).
    With no weight at all the term is 0, still attached to the graph, so that distributed training sees every parameter.
    UserError for other shapes, such as a mean that was already taken.
    """
    if losses.ndim != 1 or losses.shape != weights.shape:
        raise UserError(f"losses are {tuple(losses.shape)}, weights {tuple(weights.shape)}: expected (B,) of both")
    total = weights.sum() if total is None else total
    return (weights * losses).sum() / torch.where(total > 0, total, 1.0)


def normalize_over_space(features: Tensor, gamma: float) -> Tensor:
    """iREPA's spatial normalisation of encoder tokens (B, T, D): minus gamma times the mean over patches, divided by
    the standard deviation over patches (Singh et al., 2025).
    """
    features = features.float()
    centred = features - gamma * features.mean(dim=1, keepdim=True)
    return centred / (centred.std(dim=1, keepdim=True) + IREPA_EPSILON)
