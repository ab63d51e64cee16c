"""Representation alignment: pull the network's inner tokens towards a frozen encoder's (REPA, VA-REPA, iREPA)."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from stablevm.interpolant import LINEAR, Interpolant
from stablevm.support.errors import UserError, arg

WeightName = Literal["hard", "hard_high", "sigmoid", "cosine", "snr", "constant"]

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


@dataclass(frozen=True)
class AlignmentSchedule:
    """The weight w(t) of VA-REPA (Yang et al., 2026): 1 where the input is clear, fading towards the prior.

    name: one of hard, hard_high (ablation), sigmoid, cosine, snr, constant (plain REPA).
    path: for snr. tau: the time around which it fades, in (0, 1]; steepness: k of the sigmoid.
    """

    name: WeightName
    path: Interpolant = LINEAR
    tau: float = 0.7
    steepness: float = 20.0

    def __post_init__(self) -> None:
        if self.name not in get_args(WeightName):
            expected = ", ".join(get_args(WeightName))
            raise UserError(f"name {self.name!r}: expected one of {expected}")
        if not isinstance(self.path, Interpolant):
            raise UserError(f"path {self.path!r}: expected an Interpolant, such as stablevm.LINEAR or stablevm.COSINE")
        if not 0 < self.tau <= 1:
            raise UserError(f"{arg('tau')} {self.tau}: expected a time in (0, 1]")
        if not 0 < self.steepness < math.inf:
            raise UserError(f"{arg('steepness')} {self.steepness}: expected more than 0, as the weight falls with time")

    def __call__(self, t: Tensor) -> Tensor:
        """Weights in [0, 1] of the shape of `t` (times in [0, 1])."""
        if self.name == "hard":
            return (t < self.tau).to(t.dtype)
        if self.name == "hard_high":
            return (t >= self.tau).to(t.dtype)
        if self.name == "sigmoid":
            return torch.sigmoid(self.steepness * (self.tau - t))
        if self.name == "cosine":
            return torch.where(t < self.tau, 0.5 * (1 + torch.cos(math.pi * t / self.tau)), 0.0)
        if self.name == "snr":
            return self._snr_share(t)
        return torch.ones_like(t)

    def _snr_share(self, t: Tensor) -> Tensor:
        """`SNR(t) / (SNR(t) + SNR(tau))`, multiplied through by the sigmas so that t = 0 needs no care.

        At t = tau it is 1/2 by definition; said apart, because for tau = 1 it is 0 / 0 there.
        """
        now, split = self.path.coefficients(t), self.path.coefficients(torch.full_like(t, self.tau))
        signal = (now.alpha * split.sigma).square()
        return torch.where(t == self.tau, 0.5, signal / (signal + (now.sigma * split.alpha).square()))
