"""Draw latents from a trained network: the one place where training's previews and generation meet the solvers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from stablevm.interpolant import get_interpolant
from stablevm.rng import RowGenerators, randn
from stablevm.sampling.guidance import GuidedVelocity, Precision
from stablevm.sampling.solvers import euler, euler_maruyama, heun, ode_times, sde_times
from stablevm.snapshot import ModelCard


@dataclass(frozen=True)
class SamplerSettings:
    """How to get from noise to a latent. `heun` is for the ODE; `diffusion_scale` and `last_time` are for the SDE."""

    mode: Literal["ode", "sde"] = "sde"
    num_steps: int = 250
    heun: bool = False
    cfg_scale: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    diffusion_scale: float = 1.0
    last_time: float = 0.04
    precision: Precision = "fp32"


@torch.no_grad()
def draw_latents(
    model: nn.Module,
    card: ModelCard,
    labels: Tensor,
    streams: RowGenerators,
    settings: SamplerSettings,
    device: torch.device | str,
    watch: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> tuple[Tensor, int]:
    """One latent per label: float32 (B, C, h, w) in the network's space, and the network evaluations per image.

    `labels` is int64 (B,), the null class included; `model` is on `device`, in evaluation mode. Image i's noise, the
    initial one and each step's, comes from row i of `streams` alone, so how images are batched does not change them.
    `watch(x, t, v)` is called with each state, its time and its velocity on the way.
    """
    shape = (len(labels), *card.latent.shape)
    path = get_interpolant(card.path_type)
    velocity = GuidedVelocity(
        model,
        path,
        card.prediction,
        labels.to(device),
        card.model.null_class,
        scale=settings.cfg_scale,
        low=settings.guidance_low,
        high=settings.guidance_high,
        precision=settings.precision,
    )

    def watched(x: Tensor, t: Tensor) -> Tensor:
        v = velocity(x, t)
        if watch is not None:
            watch(x, t, v)
        return v

    def noise() -> Tensor:
        return randn(shape, streams, device).double()

    if settings.mode == "sde":
        times = sde_times(settings.num_steps, settings.last_time)
        latents = euler_maruyama(watched, noise(), times, path, noise, settings.diffusion_scale)
    else:
        solve = heun if settings.heun else euler
        latents = solve(watched, noise(), ode_times(settings.num_steps))
    return latents.float(), velocity.evaluations
