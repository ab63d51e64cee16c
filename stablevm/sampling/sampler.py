"""Draw latents from a trained network: the one place where training's previews and generation meet the solvers."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from stablevm.errors import UserError
from stablevm.interpolant import Interpolant, get_interpolant
from stablevm.rng import RowGenerators, randn
from stablevm.sampling.dopri5 import dopri5
from stablevm.sampling.guidance import GuidedVelocity
from stablevm.sampling.settings import GuidanceSettings, SamplerSettings
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
from stablevm.shapes import described
from stablevm.snapshot import ModelCard

UNGUIDED = GuidanceSettings()

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
    *,
    guidance: GuidanceSettings = UNGUIDED,
) -> tuple[Tensor, int]:
    """One latent per label: float32 (B, C, h, w) in the network's space, and the network evaluations per image.

    `labels` is int64 (B,), the null class included; `model` is on `device`, in evaluation mode. Image i's noise, the
    initial one and each step's, comes from row i of `streams` alone, so how images are batched does not change them.
    `watch(x, t, v)` is called with each state, its time and its velocity on the way; not with dopri5, where each image
    has times of its own. Its evaluations are a mean over the images, rounded.
    UserError for labels, or guidance, of which the card says that they were never trained.
    """
    _check_trained(card, labels, guidance.cfg_scale)
    shape = (len(labels), *card.latent.shape)
    path = get_interpolant(card.path_type)
    velocity = GuidedVelocity(
        model,
        path,
        card.prediction,
        labels.to(device),
        card.model.null_class,
        scale=guidance.cfg_scale,
        low=guidance.guidance_low,
        high=guidance.guidance_high,
        legacy=guidance.legacy,
        precision=guidance.precision,
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


def _check_trained(card: ModelCard, labels: Tensor, cfg_scale: float) -> None:
    """UserError where the network is to be asked about labels that its training never showed it."""
    null = labels == card.model.null_class
    if not card.null_is_trained and (cfg_scale != 1 or null.any()):
        asked = "labels of the null class" if null.any() else f"cfg_scale {cfg_scale:g}"
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
    """What the sampler of `settings` makes at t = 0 of `noise()` at t = 1, a floating point tensor (B, ...); later
    noise, of the same shape, comes from there too.

    Hundreds of small steps are added up in float32 or wider: a bfloat16 or float16 state would not move. The velocity
    is asked at states of the dtype that the noise came in, and the result has that dtype too. UserError where noise
    or velocities are of another shape than the state.
    """
    if not isinstance(path, Interpolant) or not isinstance(settings, SamplerSettings):
        raise UserError(f"path {path!r}, settings {settings!r}: expected an Interpolant and SamplerSettings")
    first = noise()
    if not isinstance(first, Tensor) or not first.is_floating_point() or first.ndim == 0:
        shown = described(first) if isinstance(first, Tensor) else f"a {type(first).__name__}"
        raise UserError(f"noise() is {shown}: expected floating point numbers (B, ...), a row for each sample")
    dtype = torch.promote_types(first.dtype, torch.float32)

    def wide(name: str, value: Tensor, x: Tensor) -> Tensor:
        if not isinstance(value, Tensor) or value.shape != x.shape:
            shown = tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise UserError(f"the {name} is {shown}, the state {tuple(x.shape)}: expected the same")
        return value.to(dtype)

    def slope(x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        given = x.to(first.dtype)
        return wide("velocity", velocity(given, t) if rows is None else velocity(given, t, rows), x)

    end = _integrate(slope, first.to(dtype), lambda: wide("noise", noise(), first), path, settings)
    return end.to(first.dtype)


def _integrate(
    velocity: Field, x: Tensor, noise: Callable[[], Tensor], path: Interpolant, settings: SamplerSettings
) -> Tensor:
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
