"""Representation alignment (REPA, VA-REPA, iREPA): pull the network's hidden tokens towards a frozen encoder's."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stablevm.choices import WeightName
from stablevm.interpolant import LINEAR, Interpolant
from stablevm.support.errors import UserError
from stablevm.support.ranges import ABOVE_0, TIME_ABOVE_0, check_word

# Added to the deviation over patches, as in iREPA (Singh et al., 2025).
IREPA_EPSILON = 1e-6


def alignment_loss(projected: Tensor, features: Tensor) -> Tensor:
    """Alignment loss of REPA (Yu et al., 2024, equation 8): minus the cosine similarity, averaged over patches.

    projected, features: the network's projected tokens and the encoder's (B, T, D). The result is (B,), in [-1, 1],
    computed in float32. UserError for other shapes, such as feature maps (B, D, H, W).
    """
    if projected.ndim != 3 or projected.shape != features.shape:
        raise UserError(
            f"projected tokens are {tuple(projected.shape)}, the encoder's {tuple(features.shape)}: expected the same "
            "shape (B, T, D); the projector sets the width D, and T is the number of patches, without the class token"
        )
    return -F.cosine_similarity(projected.float(), features.float(), dim=-1).mean(dim=1)


def weighted_alignment(losses: Tensor, weights: Tensor, total: Tensor | None = None) -> Tensor:
    """Alignment term of VA-REPA (Yang et al., 2026): `sum_i w_i l_i / sum_i w_i` of losses and weights (B,), a scalar.

    total: the sum of the weights, if it covers more rows than these (other processes, other micro-batches). If all
    weights are 0 the term is 0, but stays attached to the graph, so that distributed training sees every parameter.
    UserError for other shapes, such as losses that have already been averaged.
    """
    if losses.ndim != 1 or losses.shape != weights.shape:
        raise UserError(f"losses are {tuple(losses.shape)}, weights {tuple(weights.shape)}: expected (B,) for both")
    total = weights.sum() if total is None else total
    return (weights * losses).sum() / torch.where(total > 0, total, 1.0)


def normalize_over_space(features: Tensor, gamma: float) -> Tensor:
    """Spatial normalisation of iREPA (Singh et al., 2025), which keeps the shape and returns float32.

    features: an encoder's tokens (B, T, D). It subtracts gamma times their mean over patches, and divides by their
    standard deviation over patches plus 1e-6.
    """
    features = features.float()
    centred = features - gamma * features.mean(dim=1, keepdim=True)
    return centred / (centred.std(dim=1, keepdim=True) + IREPA_EPSILON)


@dataclass(frozen=True)
class AlignmentSchedule:
    """The weight w(t) of VA-REPA (Yang et al., 2026): large near the data (t = 0), small near the noise (t = 1).

    name: "hard", "sigmoid", "cosine" or "snr"; "hard_high", its opposite, for an ablation; "constant" for plain REPA.
    path: the path whose signal-to-noise ratio "snr" uses. tau: the time in (0, 1] around which the weight falls.
    steepness: k > 0 of the sigmoid. UserError for values out of range. Call it with times to get their weights.
    """

    name: WeightName
    path: Interpolant = LINEAR
    tau: float = 0.7
    steepness: float = 20.0

    def __post_init__(self) -> None:
        check_word("name", self.name, WeightName)
        if not isinstance(self.path, Interpolant):
            raise UserError(f"path {self.path!r}: expected an Interpolant, such as stablevm.LINEAR or stablevm.COSINE")
        TIME_ABOVE_0.check("tau", self.tau)
        ABOVE_0.check("steepness", self.steepness)

    def __call__(self, t: Tensor) -> Tensor:
        """The weights in [0, 1] at times `t` in [0, 1], with the shape of `t`."""
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
        """`SNR(t) / (SNR(t) + SNR(tau))`, with both sides multiplied by the sigmas so that t = 0 is no special case.

        At t = tau it is 1/2 by definition; this is set explicitly, because for tau = 1 the quotient there is 0 / 0.
        """
        now, split = self.path.coefficients(t), self.path.coefficients(torch.full_like(t, self.tau))
        signal = (now.alpha * split.sigma).square()
        return torch.where(t == self.tau, 0.5, signal / (signal + (now.sigma * split.alpha).square()))
