"""Draw latents from a trained network: the one place where training's previews and generation meet the solvers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from stablevm.errors import UserError
from stablevm.interpolant import Interpolant, get_interpolant
from stablevm.rng import RowGenerators, randn
from stablevm.sampling.dopri5 import dopri5
from stablevm.sampling.guidance import GuidedVelocity, Precision
from stablevm.sampling.solvers import (
    edm_times,
    euler,
    euler_maruyama,
    heun,
    ode_times,
    sde_times,
    split_times,
    stable_velocity,
    stochastic_heun,
)
from stablevm.snapshot import ModelCard


@dataclass(frozen=True)
class SamplerSettings:
    """How to get from noise to a latent; `GenerateConfig` documents each field."""

    mode: Literal["ode", "sde", "stablevs"] = "sde"
    num_steps: int = 250
    solver: Literal["euler", "heun", "dopri5"] = "euler"
    rtol: float = 1e-3
    atol: float = 1e-6
    edm_schedule: bool = False
    diffusion_scale: float = 1.0
    last_time: float = 0.04
    split_time: float = 0.85
    steps_below: int = 9
    above_split: Literal["ode", "sde"] = "ode"
    noise_factor: float = 0.0
    cfg_scale: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    legacy: bool = False
    precision: Precision = "fp32"


# Solvers with a given number of steps, by the word of --solver. A solver of the ODE alone stands in the first only.
_FIXED_STEPS = {"euler": euler, "heun": heun}
_FIXED_STEPS_SDE = {"euler": euler_maruyama, "heun": stochastic_heun}


class Field(Protocol):
    """A velocity at states x (n, ...) and a scalar time, or at times (n,) for the rows (n,) of a batch."""

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor: ...


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
    `watch(x, t, v)` is called with each state, its time and its velocity on the way; not with dopri5, where each image
    has times of its own. Its evaluations are a mean over the images, rounded.
    UserError for labels, or guidance, of which the card says that they were never trained.
    """
    _check_trained(card, labels, settings)
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
        legacy=settings.legacy,
        precision=settings.precision,
    )

    def watched(x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        v = velocity(x, t, rows)
        if watch is not None and rows is None:
            watch(x, t, v)
        return v

    def noise() -> Tensor:
        return randn(shape, streams, device).double()

    latents = integrate(watched, noise, path, settings)
    return latents.float(), round(velocity.evaluations)


def _check_trained(card: ModelCard, labels: Tensor, settings: SamplerSettings) -> None:
    """UserError where the network is to be asked about labels that its training never showed it."""
    null = labels == card.model.null_class
    if not card.null_is_trained and (settings.cfg_scale != 1 or null.any()):
        asked = "labels of the null class" if null.any() else f"cfg_scale {settings.cfg_scale:g}"
        raise UserError(
            f"{asked}: the network was trained with label_dropout 0, so its null class is untrained; "
            "draw classes with cfg_scale 1"
        )
    if not card.classes_are_trained and not null.all():
        raise UserError(
            "labels: the network was trained with label_dropout 1, so its classes are untrained; "
            f"draw the null class, {card.model.null_class}"
        )


def integrate(velocity: Field, noise: Callable[[], Tensor], path: Interpolant, settings: SamplerSettings) -> Tensor:
    """What the sampler of `settings` makes at t = 0 of `noise()` at t = 1; later noise comes from there too."""
    x = noise()
    if settings.mode == "stablevs":
        above, below = split_times(settings.num_steps, settings.split_time, settings.steps_below)
        x = _fixed_steps(velocity, x, above, noise, path, settings)
        return stable_velocity(velocity, x, below, path, noise, settings.noise_factor)
    if settings.solver == "dopri5":
        return dopri5(velocity, x, settings.rtol, settings.atol)
    return _fixed_steps(velocity, x, _times(path, settings), noise, path, settings)


def _fixed_steps(
    velocity: Field, x: Tensor, times: Tensor, noise: Callable[[], Tensor], path: Interpolant, settings: SamplerSettings
) -> Tensor:
    kind = settings.above_split if settings.mode == "stablevs" else settings.mode
    if kind == "sde":
        return _FIXED_STEPS_SDE[settings.solver](velocity, x, times, path, noise, settings.diffusion_scale)
    return _FIXED_STEPS[settings.solver](velocity, x, times)


def _times(path: Interpolant, settings: SamplerSettings) -> Tensor:
    if settings.edm_schedule:
        return edm_times(settings.num_steps, path)
    if settings.mode == "sde":
        return sde_times(settings.num_steps, settings.last_time)
    return ode_times(settings.num_steps)
