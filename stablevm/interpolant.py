"""Paths between data and noise, and the conversions between velocity, x0, noise and score predictions.

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
LEAST_TIME = 0.05  # in the division by sigma of a loss in velocities (JiT's code)


@dataclass(frozen=True, repr=False)
class Coefficients(ShownByShape):
    """alpha, sigma and their derivatives with respect to t, each with the shape of the times they were computed at."""

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
    """A path `x_t = alpha(t) x0 + sigma(t) noise` from data (t = 0) to noise (t = 1).

    Its methods take `x0`, `noise` and `x_t` of shape (B, ...), and `t` in [0, 1] of shape (B,) or a scalar tensor.
    """

    name: str
    _coefficients: Callable[[Tensor], Coefficients] = field(repr=False)
    _time_at_ratio: Callable[[Tensor], Tensor] = field(repr=False)

    def coefficients(self, t: Tensor, like: Tensor | None = None) -> Coefficients:
        """The coefficients at `t`; if `like` (B, ...) is given, reshaped so that they broadcast against it."""
        return self._coefficients(t if like is None else align(t, like))

    def time_at_ratio(self, ratio: Tensor) -> Tensor:
        """The time at which `sigma / alpha`, the noise level that EDM calls sigma, equals `ratio`."""
        return self._time_at_ratio(ratio)

    def shift(self, t: Tensor, factor: float) -> Tensor:
        """The times at which `sigma / alpha` is `factor` times that at `t`: more noise for a factor above 1.

        On the linear path this is `factor t / (1 + (factor - 1) t)`, the time shift of SD3 (Esser et al., 2024,
        equation 23). 0 and 1 stay where they are.
        """
        if factor == 1:
            return t
        c = self.coefficients(t)
        return torch.where(c.alpha > 0, self.time_at_ratio(factor * c.sigma / c.alpha), 1.0)

    def interpolate(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noisy sample `x_t = alpha x0 + sigma noise` (B, ...)."""
        c = self.coefficients(t, x0)
        return c.alpha * x0 + c.sigma * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The conditional velocity `alpha' x0 + sigma' noise` (B, ...), which is the target of plain flow matching."""
        c = self.coefficients(t, x0)
        return c.d_alpha * x0 + c.d_sigma * noise

    def offset_gain(self, t: Tensor, like: Tensor) -> Tensor:
        """`sigma' alpha / sigma - alpha'`, minus the derivative of the velocity with respect to E[x0 | x_t].

        It turns the difference x0 - E[x0 | x_t] into the correction of the target (docs/theory.md). It is set to 0 at
        t = 0, where that difference is exactly 0. Shaped to broadcast against `like` (B, ...).
        """
        c = self.coefficients(t, like)
        return torch.where(c.sigma > 0, c.wronskian / c.sigma, 0.0)

    def velocity_weight(self, t: Tensor, least_time: float = LEAST_TIME) -> Tensor:
        """The factor that turns the squared error of a data prediction into that of the velocity it implies.

        Shaped as t. On the linear path it is 1 / t^2. Times below `least_time` count as that, as in JiT (Li and He,
        2025, section 4.3), because the factor is unbounded at t = 0. It is the same for targets averaged over
        references, since the velocity is affine in E[x0 | x_t].
        """
        t = t.clamp(min=least_time)
        return self.offset_gain(t, t).square()

    def snr(self, t: Tensor) -> Tensor:
        """The signal-to-noise ratio `alpha^2 / sigma^2`, with the shape of `t`; infinite at t = 0."""
        c = self.coefficients(t)
        return (c.alpha / c.sigma).square()

    def convert(self, value: Tensor, x_t: Tensor, t: Tensor, source: Kind, target: Kind) -> Tensor:
        """Convert a prediction `value` (B, ...) at `x_t` and `t` from one kind to another.

        source, target: "velocity", "x0", "noise" or "score", all affine in E[x0 | x_t] (docs/theory.md). The
        conversion computes the pair (x0, noise) that the prediction implies. From a velocity it divides only by the
        path's Wronskian, which is never zero. What remains singular is so by definition: the score at t = 0, noise
        from x0 at t = 0, and x0 from noise or score at t = 1. ValueError for an unknown kind.
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
    """The pair (x0, noise) that is consistent with both `value` and `x_t`."""
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
    """Reshape `t` (B,) to (B, 1, ..., 1) with as many dimensions as `like`; a scalar is returned as it is."""
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


# Named functions, not lambdas, so that an object that holds a path can be pickled.
LINEAR = Interpolant("linear", _linear, _linear_time)
"""The linear path: `x_t = (1 - t) x0 + t noise`."""
COSINE = Interpolant("cosine", _cosine, _cosine_time)
"""The cosine path: `x_t = cos(pi t / 2) x0 + sin(pi t / 2) noise`."""
INTERPOLANTS = {path.name: path for path in (LINEAR, COSINE)}


def get_interpolant(name: str) -> Interpolant:
    """The path called `name` ("linear" or "cosine"); UserError for any other name."""
    if name not in INTERPOLANTS:
        raise UserError(f"{arg('path')} {name!r}: expected one of {', '.join(INTERPOLANTS)}")
    return INTERPOLANTS[name]
