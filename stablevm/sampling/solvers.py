"""Integrators from the prior (t = 1) to data (t = 0), and their time grids.

States are best held in float64: hundreds of small steps are added to them. Times are scalars of a decreasing float64
grid on the CPU. A solver knows nothing of networks: `velocity(x, t)` is any function of a state (B, ...) and a scalar.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from stablevm.interpolant import Interpolant

Velocity = Callable[[Tensor, Tensor], Tensor]


def ode_times(num_steps: int) -> Tensor:
    """`num_steps + 1` evenly spaced times from 1 to 0, float64."""
    # Quotients, not accumulated steps: the grid then holds 0.7 itself where a guidance interval ends at 0.7.
    return torch.arange(num_steps, -1, -1, dtype=torch.float64) / num_steps


def sde_times(num_steps: int, last_time: float) -> Tensor:
    """`num_steps` evenly spaced times from 1 to `last_time`, then 0: the grid of SiT and REPA, float64."""
    noisy = torch.linspace(1, last_time, num_steps, dtype=torch.float64)
    return torch.cat([noisy, noisy.new_zeros(1)])


def euler(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """Explicit Euler for `dx/dt = v`, of order 1. One evaluation per step: `len(times) - 1`."""
    for t, t_next in _steps(times):
        x = x + (t_next - t) * velocity(x, t)
    return x


def heun(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """Heun's method for `dx/dt = v`, of order 2. Two evaluations per step, but one for a step that ends at t = 0.

    A velocity made from a prediction of the data divides by sigma, which is 0 at t = 0, so the step that arrives there
    is an Euler step (Karras et al., 2022, "EDM", algorithm 1). Its error of O(h^2) is made once, so the order stays 2.
    """
    for t, t_next in _steps(times):
        slope = velocity(x, t)
        ahead = x + (t_next - t) * slope
        x = ahead if t_next == 0 else x + (t_next - t) * (slope + velocity(ahead, t_next)) / 2
    return x


def euler_maruyama(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    path: Interpolant,
    noise: Callable[[], Tensor],
    diffusion_scale: float = 1.0,
) -> Tensor:
    """Euler-Maruyama for the SDE with the ODE's marginals, run from t = 1 down (Ma et al., 2024, "SiT", section 2):

        dx = [v - w s / 2] dt + sqrt(w) dB,  w = diffusion_scale * sigma,  s = the score that v implies.

    The last step takes the drift without noise, as published. `noise()` gives standard normal values of x's shape.
    `diffusion_scale` is 1 for StableVM and 2 for REPA. One evaluation per step: `len(times) - 1`.
    """

    def drift_and_diffusion(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        v = velocity(x, t)
        w = diffusion_scale * path.coefficients(t).sigma
        return v - w / 2 * path.convert(v, x, t, "velocity", "score"), w

    *noisy, (t, t_next) = _steps(times)
    for start, end in noisy:
        drift, w = drift_and_diffusion(x, start)
        x = x + (end - start) * drift + (w * (start - end)).sqrt() * noise()
    drift, _ = drift_and_diffusion(x, t)
    return x + (t_next - t) * drift


def _steps(times: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return pairwise(times.unbind())
