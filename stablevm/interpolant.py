"""Paths between data and noise, and every conversion between the four things a network can predict.

Time runs from data (`t = 0`) to the prior N(0, I) (`t = 1`). A path is `x_t = alpha(t) x0 + sigma(t) noise`
(Albergo et al., 2023, "Stochastic Interpolants"; Ma et al., 2024, "SiT", section 2).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from stablevm.support.errors import UserError, arg
from stablevm.support.shapes import ShownByShape

Kind = Literal["velocity", "x0", "noise", "score"]


@dataclass(frozen=True, repr=False)
class Coefficients(ShownByShape):
    """alpha, sigma and their derivatives by t, each of the shape of the times that they were asked for."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def wronskian(self) -> Tensor:
        """`alpha sigma' - alpha' sigma`: 1 on the linear path, pi/2 on the cosine path, never zero."""
        return self.alpha * self.d_sigma - self.d_alpha * self.sigma


@dataclass(frozen=True)
class Interpolant:
    """One path. `x0`, `noise` and `x_t` have shape (B, ...); `t` has shape (B,) or is a scalar tensor, in [0, 1]."""

    name: str
    _coefficients: Callable[[Tensor], Coefficients] = field(repr=False)
    _time_at_ratio: Callable[[Tensor], Tensor] = field(repr=False)

    def coefficients(self, t: Tensor, like: Tensor | None = None) -> Coefficients:
        """Coefficients at `t`; with `like` (B, ...), shaped to broadcast against it."""
        return self._coefficients(t if like is None else align(t, like))

    def time_at_ratio(self, ratio: Tensor) -> Tensor:
        """The time at which `sigma / alpha` equals `ratio` (the noise level that EDM calls sigma)."""
        return self._time_at_ratio(ratio)

    def interpolate(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """`x_t = alpha x0 + sigma noise`."""
        c = self.coefficients(t, x0)
        return c.alpha * x0 + c.sigma * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """`alpha' x0 + sigma' noise`: the conditional velocity of the path, and the target of plain flow matching."""
        c = self.coefficients(t, x0)
        return c.d_alpha * x0 + c.d_sigma * noise

    def offset_gain(self, t: Tensor, like: Tensor) -> Tensor:
        """`sigma' alpha / sigma - alpha'`: how much the velocity rises where E[x0 | x_t] falls (docs/theory.md).

        0 at t = 0, where it multiplies a difference of posterior means that is exactly 0.
        """
        c = self.coefficients(t, like)
        return torch.where(c.sigma > 0, c.wronskian / c.sigma, 0.0)

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio `alpha^2 / sigma^2`; infinite at t = 0."""
        c = self.coefficients(t)
        return (c.alpha / c.sigma).square()

    def convert(self, value: Tensor, x_t: Tensor, t: Tensor, source: Kind, target: Kind) -> Tensor:
        """Turn a prediction of one kind into another: all four are affine in E[x0 | x_t] (docs/theory.md).

        Each conversion goes through the pair (x0, noise) that the prediction implies, with the path's Wronskian
        as the only divisor for velocities. What stays singular is so by nature: scores at t = 0, noise from x0 at
        t = 0 and x0 from noise at t = 1.
        """
        if source == target:
            return value
        c = self.coefficients(t, x_t)
        x0, noise = _pair(value, x_t, c, source)
        if target == "x0":
            return x0
        if target == "noise":
            return noise
        if target == "score":
            return -noise / c.sigma
        if target == "velocity":
            return c.d_alpha * x0 + c.d_sigma * noise
        raise ValueError(f"target kind {target!r} is not one of velocity, x0, noise, score")


def _pair(value: Tensor, x_t: Tensor, c: Coefficients, source: Kind) -> tuple[Tensor, Tensor]:
    """The data and the noise that `value` and `x_t` imply together."""
    if source == "velocity":
        x0 = (c.d_sigma * x_t - c.sigma * value) / c.wronskian
        return x0, (c.alpha * value - c.d_alpha * x_t) / c.wronskian
    if source == "x0":
        return value, (x_t - c.alpha * value) / c.sigma
    if source == "noise":
        return (x_t - c.sigma * value) / c.alpha, value
    if source == "score":
        noise = -c.sigma * value
        return (x_t - c.sigma * noise) / c.alpha, noise
    raise ValueError(f"source kind {source!r} is not one of velocity, x0, noise, score")


def align(t: Tensor, like: Tensor) -> Tensor:
    """Reshape times (B,), or any values of rows, to (B, 1, ..., 1) with the dimensions of `like`; scalars stay."""
    return t if t.ndim == 0 else t.reshape(-1, *[1] * (like.ndim - 1))


def _linear(t: Tensor) -> Coefficients:
    one = torch.ones_like(t)
    return Coefficients(1 - t, t, -one, one)


def _cosine(t: Tensor) -> Coefficients:
    quarter = math.pi / 2
    cosine, sine = torch.cos(quarter * t), torch.sin(quarter * t)
    return Coefficients(cosine, sine, -quarter * sine, quarter * cosine)


def _linear_time(ratio: Tensor) -> Tensor:
    return ratio / (1 + ratio)


def _cosine_time(ratio: Tensor) -> Tensor:
    return torch.atan(ratio) * (2 / math.pi)


# Functions with names, not lambdas: a path is pickled with all that holds one.
LINEAR = Interpolant("linear", _linear, _linear_time)
"""`x_t = (1 - t) x0 + t noise`."""
COSINE = Interpolant("cosine", _cosine, _cosine_time)
"""`x_t = cos(pi t / 2) x0 + sin(pi t / 2) noise`."""
INTERPOLANTS = {path.name: path for path in (LINEAR, COSINE)}


def get_interpolant(name: str) -> Interpolant:
    """The path called `name`; UserError otherwise."""
    if name not in INTERPOLANTS:
        raise UserError(f"{arg('path')} {name!r}: expected one of {', '.join(INTERPOLANTS)}")
    return INTERPOLANTS[name]
