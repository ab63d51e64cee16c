"""Solvers with a fixed number of steps from the prior (t = 1) to data (t = 0), and their time grids.

States are best kept in float64, because hundreds of small steps are added to them. Times are a decreasing float64 grid
on the CPU. `velocity(x, t)` may be any function of a state (B, ...) and a scalar time; no network is assumed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from stablevm.interpolant import Interpolant
from stablevm.solvers.settings import SAMPLER_RANGES
from stablevm.support.errors import UserError

# `velocity(x, t)` at states x (n, ...) and a scalar time t. `dopri5` calls `velocity(x, t, rows)` with times (n,) and
# with rows (n,), the positions in the batch of the states x.
Velocity = Callable[..., Tensor]

# Karras et al. (2022), "EDM", table 1.
EDM_SIGMA_MIN, EDM_SIGMA_MAX, EDM_RHO = 0.002, 80.0, 7.0


def ode_times(num_steps: int) -> Tensor:
    """`num_steps + 1` evenly spaced times from 1 to 0, float64."""
    # Quotients, not accumulated steps, so that the grid holds exactly 0.7 where a guidance interval ends at 0.7.
    return torch.arange(num_steps, -1, -1, dtype=torch.float64) / num_steps


def sde_times(num_steps: int, last_time: float) -> Tensor:
    """`num_steps` evenly spaced times from 1 to `last_time`, then 0: the grid of SiT and REPA, float64."""
    noisy = torch.linspace(1, last_time, num_steps, dtype=torch.float64)
    return torch.cat([noisy, noisy.new_zeros(1)])


def edm_times(num_steps: int, path: Interpolant) -> Tensor:
    """EDM's noise levels (Karras et al., 2022, equation 5) as times of `path`: `num_steps` times, then 0; float64.

    A noise level is `sigma / alpha` of the path. The first, 80, is replaced by infinity (t = 1 instead of 80/81 on the
    linear path), because the initial state is drawn from the prior. `num_steps` is 2 or more.
    """
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    highest, lowest = (level ** (1 / EDM_RHO) for level in (EDM_SIGMA_MAX, EDM_SIGMA_MIN))
    times = path.time_at_ratio((highest + ramp * (lowest - highest)) ** EDM_RHO)
    times[0] = 1
    return torch.cat([times, times.new_zeros(1)])


def split_times(num_steps: int, split: float, steps_below: int) -> tuple[Tensor, Tensor]:
    """Two grids, float64: evenly spaced times from 1 to `split`, and `steps_below + 1` from there to 0.

    Together they have `num_steps` steps.
    """
    above = 1 - (1 - split) * (1 - ode_times(num_steps - steps_below))
    return above, split * ode_times(steps_below)


def thinned(count: int, kept: int) -> Tensor:
    """Indices of the `count` decreasing noise levels at which the published StableVS takes a step.

    It takes `kept` of them, at evenly spaced indices from the first to the last but one, so that the step to 0 is a
    large one; or all, if there are at most `kept`. int64 (min(count, kept),).
    """
    if count <= kept:
        return torch.arange(count)
    return torch.linspace(0, count - 2, kept).round().long()


def euler(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """Explicit Euler method for `dx/dt = v`, of order 1, from x (B, ...) at times[0] to times[-1].

    It takes one evaluation per step, `len(times) - 1` in all.
    """
    for t, t_next in _steps(times):
        x = x + (t_next - t) * velocity(x, t)
    return x


def heun(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """Heun's method for `dx/dt = v`, of order 2, from x (B, ...) at times[0] to times[-1].

    It takes two evaluations per step, and one for a step that ends at t = 0: a velocity computed from a prediction of
    the data divides by sigma, which is 0 there, so that step is an Euler step (Karras et al., 2022, "EDM", algorithm
    1). Its error of O(h^2) occurs once, so the order remains 2.
    """
    for t, t_next in _steps(times):
        slope = velocity(x, t)
        ahead = x + (t_next - t) * slope
        x = ahead if t_next == 0 else x + (t_next - t) * (slope + velocity(ahead, t_next)) / 2
    return x


@dataclass(frozen=True)
class Diffusion:
    """The SDE that has the ODE's marginals (Ma et al., 2024, "SiT", section 2), in the direction of decreasing t:

        dx = [v - w s / 2] dt + sqrt(w) dB,  w = scale * sigma,  s = the score that v implies.

    path: the path of the marginals. noise: a function that returns standard normal values of the state's shape.
    scale: 1 for StableVM, 2 for REPA.
    """

    path: Interpolant
    noise: Callable[[], Tensor]
    scale: float = 1.0

    def drift(self, velocity: Velocity, x: Tensor, t: Tensor) -> Tensor:
        """The drift at states x (B, ...) and the scalar time t, with one evaluation of the velocity."""
        v = velocity(x, t)
        return v - self.variance(t) / 2 * self.path.convert(v, x, t, "velocity", "score")

    def variance(self, t: Tensor) -> Tensor:
        """w at the time t, the variance that the noise adds in a unit of time."""
        return self.scale * self.path.coefficients(t).sigma


def euler_maruyama(velocity: Velocity, x: Tensor, times: Tensor, diffusion: Diffusion) -> Tensor:
    """Euler-Maruyama method for the SDE of `diffusion`, from x (B, ...) at times[0] down to times[-1].

    A step that ends at t = 0 takes the drift without noise, as published. One evaluation per step, `len(times) - 1` in
    all.
    """
    for t, t_next in _steps(times):
        x = x + (t_next - t) * diffusion.drift(velocity, x, t)
        if t_next > 0:
            x = x + (diffusion.variance(t) * (t - t_next)).sqrt() * diffusion.noise()
    return x


def stochastic_heun(velocity: Velocity, x: Tensor, times: Tensor, diffusion: Diffusion) -> Tensor:
    """Heun's method for the same SDE: it averages the drifts before and after a step, with one noise.

    The diffusion coefficient does not depend on x, so distributions converge with order 2 (Kloeden and Platen, 1992,
    section 15.1). It takes two evaluations per step, and one for a step that ends at t = 0, which is an Euler step
    without noise.
    """
    for t, t_next in _steps(times):
        drift = diffusion.drift(velocity, x, t)
        ahead = x + (t_next - t) * drift
        if t_next > 0:
            w = (diffusion.variance(t) + diffusion.variance(t_next)) / 2
            kick = (w * (t - t_next)).sqrt() * diffusion.noise()
            ahead = x + (t_next - t) * (drift + diffusion.drift(velocity, ahead + kick, t_next)) / 2 + kick
        x = ahead
    return x


def mean_velocity_steps(mean_velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """MeanFlow (Geng et al., 2025): steps `x_r = x_t - (t - r) u(x_t, r, t)`, exact for the exact mean velocity u.

    mean_velocity: called as mean_velocity(x, t, r), with scalar times r <= t.
    """
    for t, r in _steps(times):
        x = x - (t - r) * mean_velocity(x, t, r)
    return x


def stable_velocity(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    path: Interpolant,
    noise: Callable[[], Tensor],
    noise_factor: float = 0.0,
) -> Tensor:
    """StableVS (Yang et al., 2026): large steps at small t, where x_t nearly determines x0 and v hardly changes.

    It applies `stable_velocity_step` from x (B, ...) at times[0] to times[-1], with one evaluation per step.
    """
    for t, t_next in _steps(times):
        x = stable_velocity_step(velocity(x, t), x, t, t_next, path, noise, noise_factor)
    return x


def stable_velocity_step(
    v: Tensor,
    x: Tensor,
    t: Tensor,
    t_next: Tensor,
    path: Interpolant,
    noise: Callable[[], Tensor],
    noise_factor: float = 0.0,
) -> Tensor:
    """One step of StableVS from x (B, ...) at t to tau = t_next, given the velocity v (B, ...) at x:

        x_tau = alpha_tau x0 + sqrt(sigma_tau^2 - beta^2) e + beta z,  beta = noise_factor * sigma_tau,  z ~ N(0, I),

    where x0 and e are the data and the noise that v implies at x and t. Given x0, x_tau has the path's marginal for
    every `noise_factor` in [0, 1]. On the linear path with `noise_factor` 0 it is x + (tau - t) v. t, t_next: scalar
    tensors. noise: a function that returns z, standard normal values of x's shape; called only if beta > 0.

    Computed in float32 or wider, and returned in x's dtype. UserError for a velocity of another shape than x, or a
    noise_factor out of range.
    """
    if v.shape != x.shape:
        raise UserError(f"the velocity is {tuple(v.shape)}, the state {tuple(x.shape)}: expected the same shape")
    SAMPLER_RANGES["noise_factor"].check("noise_factor", noise_factor)
    given, dtype = x.dtype, torch.promote_types(x.dtype, torch.float32)
    v, x = v.to(dtype), x.to(dtype)
    at = path.coefficients(t_next)
    beta = noise_factor * at.sigma
    x0, direction = path.convert(v, x, t, "velocity", "x0"), path.convert(v, x, t, "velocity", "noise")
    x = at.alpha * x0 + (at.sigma**2 - beta**2).sqrt() * direction
    return (x + beta * noise() if beta > 0 else x).to(given)


def _steps(times: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return pairwise(times.unbind())
