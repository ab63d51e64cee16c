"""Functions of time: how much a sample's alignment counts at t, and how training times are drawn."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from stablevm.errors import UserError
from stablevm.interpolant import LINEAR, Interpolant
from stablevm.rng import AnyGenerator, rand, randn

WeightName = Literal["hard", "hard_high", "sigmoid", "cosine", "snr", "constant"]
TimeName = Literal["uniform", "lognormal", "logit_normal"]

# ln(sigma/alpha) ~ N(mean, std^2): EDM (Karras et al., 2022, table 1) and SD3 (Esser et al., 2024, section 3.1).
LOG_RATIO_MOMENTS = {"lognormal": (-1.2, 1.2), "logit_normal": (0.0, 1.0)}


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
            raise UserError(f"--proj-weight-schedule {self.name}: expected one of {expected}")
        if not isinstance(self.path, Interpolant):
            raise UserError(f"path {self.path!r}: expected an Interpolant, such as stablevm.LINEAR or stablevm.COSINE")
        if not 0 < self.tau <= 1:
            raise UserError(f"--proj-tau {self.tau}: expected a time in (0, 1]")

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


def draw_times(name: TimeName, path: Interpolant, rows: int, stream: AnyGenerator) -> Tensor:
    """Training times (B,) in [0, 1], float32 on the CPU.

    uniform: U[0, 1). lognormal: EDM's noise levels, ln(sigma/alpha) ~ N(-1.2, 1.2^2). logit_normal: N(0, 1) instead,
    which on the linear path is the logit-normal distribution of SD3. Both become times through the path in use.
    """
    if name == "uniform":
        return rand((rows,), stream)
    if name not in LOG_RATIO_MOMENTS:
        raise UserError(f"--weighting {name}: expected one of {', '.join(get_args(TimeName))}")
    mean, deviation = LOG_RATIO_MOMENTS[name]
    return path.time_at_ratio(torch.exp(mean + deviation * randn((rows,), stream)))
