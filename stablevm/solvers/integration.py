"""`integrate`: from noise to data, for any velocity, with the solver that `SamplerSettings` describes."""

from collections.abc import Callable

import torch
from torch import Tensor

from stablevm.interpolant import Interpolant
from stablevm.solvers.dopri5 import dopri5
from stablevm.solvers.fixed_steps import (
    Diffusion,
    Velocity,
    edm_times,
    euler,
    euler_maruyama,
    heun,
    mean_velocity_steps,
    ode_times,
    sde_times,
    split_times,
    stable_velocity,
    stochastic_heun,
)
from stablevm.solvers.settings import SamplerSettings
from stablevm.support.errors import UserError
from stablevm.support.shapes import described

# Solvers with a given number of steps, by the value of `SamplerSettings.solver`: of the ODE, and of the SDE.
_FIXED_STEPS = {"euler": euler, "heun": heun}
_FIXED_STEPS_SDE = {"euler": euler_maruyama, "heun": stochastic_heun}


def integrate(velocity: Velocity, noise: Callable[[], Tensor], path: Interpolant, settings: SamplerSettings) -> Tensor:
    """Integrate along `path` from noise at t = 1 to samples (B, ...) at t = 0, with the solver of `settings`.

    velocity: a function of states x (B, ...) and a scalar time (of x, times (n,) and row indices (n,) with the solver
    dopri5; of x, a time t and the time r of the next state with the mode meanflow, which takes the mean velocity from r
    to t). noise: a function that returns standard normal values (B, ...), called for the initial state and for the
    noise of each step that needs some.

    The state is float32 or wider, because adding hundreds of small steps to a bfloat16 or float16 state would not
    change it. The velocity receives states in the dtype of the noise, and the result has that dtype. UserError if the
    noise or a velocity has another shape than the state.
    """
    if not isinstance(path, Interpolant) or not isinstance(settings, SamplerSettings):
        raise UserError(f"path {path!r}, settings {settings!r}: expected an Interpolant and SamplerSettings")
    if not callable(noise):
        raise UserError(
            f"noise is a {type(noise).__name__}: expected a function that returns it, such as lambda: torch.randn(4, 2)"
        )
    first = noise()
    if not isinstance(first, Tensor) or not first.is_floating_point() or first.ndim == 0:
        shown = described(first) if isinstance(first, Tensor) else f"a {type(first).__name__}"
        raise UserError(f"noise() returned {shown}: expected floating-point numbers (B, ...), a row for each sample")
    dtype = torch.promote_types(first.dtype, torch.float32)

    def wide(name: str, value: Tensor, x: Tensor) -> Tensor:
        if not isinstance(value, Tensor) or value.shape != x.shape:
            shown = tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise UserError(f"the {name} is {shown}, the state {tuple(x.shape)}: expected the same shape")
        if not value.is_floating_point():  # integers are rounded, and a complex number would lose its imaginary part
            raise UserError(f"the {name} is {described(value)}: expected floating-point numbers")
        return value.to(dtype)

    def slope(x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        given = x.to(first.dtype)
        return wide("velocity", velocity(given, t) if rows is None else velocity(given, t, rows), x)

    end = _integrate(slope, first.to(dtype), lambda: wide("noise", noise(), first), path, settings)
    return end.to(first.dtype)


def _integrate(
    velocity: Velocity, x: Tensor, noise: Callable[[], Tensor], path: Interpolant, settings: SamplerSettings
) -> Tensor:
    if settings.mode == "stablevs":
        above, below = _split_times(path, settings)
        x = _fixed_steps(velocity, x, above, noise, path, settings)
        return stable_velocity(velocity, x, below, path, noise, settings.noise_factor)
    if settings.mode == "meanflow":
        return mean_velocity_steps(velocity, x, _times(path, settings))
    if settings.solver == "dopri5":
        return dopri5(velocity, x, settings.rtol, settings.atol)
    return _fixed_steps(velocity, x, _times(path, settings), noise, path, settings)


def _fixed_steps(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    noise: Callable[[], Tensor],
    path: Interpolant,
    settings: SamplerSettings,
) -> Tensor:
    kind = settings.above_split if settings.mode == "stablevs" else settings.mode
    if kind == "sde":
        return _FIXED_STEPS_SDE[settings.solver](velocity, x, times, Diffusion(path, noise, settings.diffusion_scale))
    return _FIXED_STEPS[settings.solver](velocity, x, times)


def _times(path: Interpolant, settings: SamplerSettings) -> Tensor:
    if settings.edm_schedule:
        return edm_times(settings.num_steps, path)
    shift = settings.time_shift or 1.0
    if settings.mode == "sde":
        return path.shift(sde_times(settings.num_steps, _unshifted(path, settings.last_time, shift)), shift)
    return path.shift(ode_times(settings.num_steps), shift)


def _split_times(path: Interpolant, settings: SamplerSettings) -> tuple[Tensor, Tensor]:
    shift = settings.time_shift or 1.0
    split = _unshifted(path, settings.split_time, shift)
    above, below = split_times(settings.num_steps, split, settings.steps_below)
    return path.shift(above, shift), path.shift(below, shift)


def _unshifted(path: Interpolant, t: float, shift: float) -> float:
    """The time that the shift moves to `t`, which stays where the options say."""
    return t if shift == 1 else float(path.shift(torch.tensor(t, dtype=torch.float64), 1 / shift))
