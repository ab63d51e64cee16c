"""Adaptive integration of `dx/dt = v` from t = 1 down, with error control of each image on its own.

The usual solvers choose one step for a whole batch, from an error averaged over it: an image would depend on the
company it is drawn in. Here every row has its own time and its own step, rows that are done leave the batch, and the
network still sees all the others at once.
"""

from typing import Protocol

import torch
from torch import Tensor

from stablevm.interpolant import align

# Dormand and Prince (1980), "A family of embedded Runge-Kutta formulae", table 2. The last row of stages is the
# solution of order 5, and its slope is the first one of the next step.
_TIMES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)  # order 5 minus order 4
_ORDER = 5

# Hairer, Norsett and Wanner (1993), "Solving ordinary differential equations I", section II.4.
_SAFETY, _SHRINK_LIMIT, _GROWTH_LIMIT = 0.9, 0.2, 10.0
_PROBE, _PROBE_IF_FLAT, _FLAT = 0.01, 1e-6, 1e-5

# A velocity made from a prediction of the data divides by sigma, 0 at t = 0: the steps end here, and one of Euler's,
# whose error is of the order of the square of it, leads to 0.
_LAST_TIME = 1e-3
_SMALLEST_STEP = 1e-9  # a step that has to be smaller still has met values that are not finite


class RowVelocity(Protocol):
    """Velocity of states x (n, ...) at times t (n,), which belong to the images `rows` (n,) of the batch."""

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor) -> Tensor: ...


def dopri5(velocity: RowVelocity, x: Tensor, rtol: float = 1e-3, atol: float = 1e-6) -> Tensor:
    """Dormand-Prince steps of order 5 from x (B, ...) at t = 1 to t = 0; float64 is best.

    The root mean square over a row of the error that a step is estimated to add stays below atol + rtol |x|, with |x|
    the root mean square of the row. (Not value by value, as for unlike quantities: the pixels that happen to be near 0
    would then rule the steps, and rounding would rule those pixels.) Six evaluations per step, rejected ones too. A row
    that meets values that are not finite ends as NaN.
    """
    result = torch.empty_like(x)
    rows = torch.arange(len(x), device=x.device)
    t = x.new_ones(len(x))
    slope = velocity(x, t, rows)
    step = _first_step(velocity, x, slope, rows, rtol, atol)
    while len(rows):
        is_last = step >= t - _LAST_TIME
        step = torch.where(is_last, t - _LAST_TIME, step)
        ahead, slope_ahead, error = _try_step(velocity, x, t, slope, step, rows)
        ratio = _rms(error) / (atol + rtol * torch.maximum(_rms(x), _rms(ahead)))
        accepted = ratio <= 1
        x = torch.where(align(accepted, x), ahead, x)
        slope = torch.where(align(accepted, x), slope_ahead, slope)
        t = torch.where(accepted, torch.where(is_last, _LAST_TIME, t - step), t)
        step = step * _step_factor(ratio)

        arrived, failed = t == _LAST_TIME, step < _SMALLEST_STEP
        result[rows[arrived]] = (x - _LAST_TIME * slope)[arrived]
        result[rows[failed & ~arrived]] = torch.nan
        going = ~(arrived | failed)
        rows, x, t, slope, step = (values[going] for values in (rows, x, t, slope, step))
    return result


def _try_step(
    velocity: RowVelocity, x: Tensor, t: Tensor, slope: Tensor, step: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The state one step ahead (towards smaller t), the slope there, and the error estimate."""
    slopes, h = [slope], -align(step, x)
    ahead = x
    for time, weights in zip(_TIMES, _STAGES, strict=True):
        ahead = x + h * _combine(weights, slopes)
        slopes.append(velocity(ahead, t - time * step, rows))
    return ahead, slopes[-1], h * _combine(_ERROR, slopes)


def _first_step(velocity: RowVelocity, x: Tensor, slope: Tensor, rows: Tensor, rtol: float, atol: float) -> Tensor:
    """Hairer's guess: a small Euler step shows how fast the slope changes."""
    scale = atol + rtol * _rms(x)
    size, speed = _rms(x) / scale, _rms(slope) / scale
    probe = torch.where((size < _FLAT) | (speed < _FLAT), _PROBE_IF_FLAT, _PROBE * size / speed).clamp(max=1)
    change = velocity(x - align(probe, x) * slope, 1 - probe, rows) - slope
    steepest = torch.maximum(speed, _rms(change) / scale / probe)
    return torch.minimum(probe / _PROBE, (_PROBE / steepest) ** (1 / _ORDER))


def _step_factor(ratio: Tensor) -> Tensor:
    factor = (_SAFETY * ratio ** (-1 / _ORDER)).nan_to_num(_SHRINK_LIMIT)
    return factor.clamp(_SHRINK_LIMIT, _GROWTH_LIMIT)


def _combine(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    total = torch.zeros_like(slopes[0])
    for weight, slope in zip(weights, slopes, strict=True):
        total = total.add(slope, alpha=weight) if weight else total
    return total


def _rms(values: Tensor) -> Tensor:
    """Root mean square over all but the first dimension."""
    return values.flatten(1).square().mean(dim=1).sqrt()
