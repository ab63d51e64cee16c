"""Adaptive integration of `dx/dt = v` from t = 1 to t = 0, with a step size for each image.

The usual solvers choose one step size for a whole batch from an average error, so that an image depends on the others
in its batch. Here every row has its own time and step size. Rows that have arrived leave the batch, and the network
still evaluates all remaining rows together.
"""

import torch
from torch import Tensor

from stablevm.interpolant import align
from stablevm.solvers.fixed_steps import Velocity
from stablevm.support.errors import UserError

# Dormand and Prince (1980), "A family of embedded Runge-Kutta formulae", table 2. The last row of stages is the
# solution of order 5, and the slope there is the first one of the next step.
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

# A velocity computed from a prediction of the data divides by sigma, which is 0 at t = 0. So the adaptive steps end
# here, and a last Euler step, whose error is of the order of its square, goes to 0.
_LAST_TIME = 1e-3
_SMALLEST_STEP = 1e-9  # a row that needs a smaller step makes no progress
_MOST_TRIES = 10_000  # a hundred times what images need


def dopri5(velocity: Velocity, x: Tensor, rtol: float = 1e-3, atol: float = 1e-6) -> Tensor:
    """Integrate with Dormand-Prince steps of order 5 from x (B, ...) at t = 1 to t = 0.

    x is float32 or wider; float64 is best. A step is accepted if the root mean square (RMS) of its estimated error over
    a row is at most atol + rtol |x|, where |x| is the RMS of the row. The error is not controlled value by value, as is
    usual for unlike quantities, because pixels that happen to be near 0 would then dictate the steps. Each step costs
    six evaluations of the velocity, also when it is rejected.

    The integration always ends. A row whose values become infinite or NaN leaves the batch and is NaN in the result.
    Where the tolerance can't be met, because the velocity jumps or is rounded too coarsely, UserError is raised.
    """
    result = torch.empty_like(x)
    rows = torch.arange(len(x), device=x.device)
    t = torch.ones(len(x), dtype=torch.float64, device=x.device)

    def slope_at(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return velocity(x, t.to(x.dtype), rows)

    slope = slope_at(x, t, rows)
    step = _first_step(slope_at, x, slope, rows, rtol, atol)
    tries = 0
    while len(rows):
        is_last = step >= t - _LAST_TIME
        step = torch.where(is_last, t - _LAST_TIME, step)
        ahead, slope_ahead, error = _try_step(slope_at, x, t, slope, step, rows)
        ratio = _rms(error) / (atol + rtol * torch.maximum(_rms(x), _rms(ahead)))
        accepted = ratio <= 1
        x = torch.where(align(accepted, x), ahead, x)
        slope = torch.where(align(accepted, x), slope_ahead, slope)
        t = torch.where(accepted, torch.where(is_last, _LAST_TIME, t - step), t)
        step = step * _step_factor(ratio)

        arrived, stuck = t == _LAST_TIME, ~(step >= _SMALLEST_STEP)  # NaN is not above it either
        result[rows[arrived]] = (x - _LAST_TIME * slope)[arrived]
        broken = stuck & ~arrived & ~ratio.isfinite()
        result[rows[broken]] = torch.nan
        going = ~(arrived | broken)
        tries += 1
        hopeless = going & (stuck | (tries == _MOST_TRIES))
        if hopeless.any():
            raise UserError(
                f"rtol {rtol:g}, atol {atol:g}: dopri5 can't meet this tolerance at t = {float(t[hopeless].max()):.3g},"
                " where the velocity jumps or is rounded too coarsely; use larger tolerances or another solver"
            )
        rows, x, t, slope, step = (values[going] for values in (rows, x, t, slope, step))
    return result


def _try_step(
    velocity: Velocity, x: Tensor, t: Tensor, slope: Tensor, step: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Take one step towards smaller t: the new state, the slope there, and the estimated error."""
    slopes, h = [slope], -align(step.to(x.dtype), x)
    ahead = x
    for time, weights in zip(_TIMES, _STAGES, strict=True):
        ahead = x + h * _combine(weights, slopes)
        slopes.append(velocity(ahead, t - time * step, rows))
    return ahead, slopes[-1], h * _combine(_ERROR, slopes)


def _first_step(velocity: Velocity, x: Tensor, slope: Tensor, rows: Tensor, rtol: float, atol: float) -> Tensor:
    """The initial step size (n,) after Hairer: a small Euler step shows how fast the slope changes."""
    scale = atol + rtol * _rms(x)
    size, speed = _rms(x) / scale, _rms(slope) / scale
    probe = torch.where((size < _FLAT) | (speed < _FLAT), _PROBE_IF_FLAT, _PROBE * size / speed)
    probe = probe.clamp(max=1 - _LAST_TIME)  # the velocity need not be defined at t = 0
    change = velocity(x - align(probe.to(x.dtype), x) * slope, 1 - probe, rows) - slope
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
    """The root mean square over all but the first dimension: (n,), float64."""
    return values.reshape(*values.shape, 1).flatten(1).double().square().mean(dim=1).sqrt()
