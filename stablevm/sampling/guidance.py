"""Latents of a class-conditional network, with classifier-free guidance in an interval of time.

The one place where training's previews and generation meet the solvers.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor, nn

from stablevm.choices import Precision, Prediction
from stablevm.interpolant import Interpolant, get_interpolant
from stablevm.networks.snapshot import ModelCard
from stablevm.sampling.config import CFG_SCALE, GuidanceOptions
from stablevm.solvers.integration import integrate
from stablevm.solvers.settings import SamplerSettings
from stablevm.support.errors import UserError, arg
from stablevm.support.precision import DTYPES, autocast
from stablevm.support.ranges import TIME, check_word
from stablevm.support.rng import RowGenerators, randn

LEGACY_CHANNELS = 3  # the published samplers of DiT and SiT guide these and leave the others to the class alone


@dataclass(frozen=True)
class GuidanceSettings(GuidanceOptions):
    """How `draw_latents` asks the network: the options of `GuidanceOptions`, which documents each field.

    UserError for a number out of its range, and for another precision.
    """

    def __post_init__(self) -> None:
        CFG_SCALE.check("cfg_scale", self.cfg_scale)
        TIME.check("guidance_low", self.guidance_low)
        TIME.check("guidance_high", self.guidance_high)
        if self.guidance_low > self.guidance_high:
            raise UserError(f"{arg('guidance_high')} {self.guidance_high}: expected at least {self.guidance_low}")
        check_word("precision", self.precision, Precision)


def guidance_of(options: GuidanceOptions) -> GuidanceSettings:
    """The part of a command's options."""
    return GuidanceSettings(**{field.name: getattr(options, field.name) for field in fields(GuidanceOptions)})


UNGUIDED = GuidanceSettings()


class GuidedVelocity:
    """`v = v_null + scale (v_cond - v_null)` for `low <= t <= high`, and `v_cond` outside (Ho and Salimans, 2022,
    "Classifier-free diffusion guidance"; Kynkaanniemi et al., 2024, for the interval).

    model(x (B, ...), t (B,), labels (B,)) predicts the velocity (`prediction` "v") or the data ("x"), in float32 or
    under autocast to `precision`, whatever surrounds the call. Its answer comes back as a velocity in the dtype of the
    state. Both halves of a guided evaluation are one batch; `scale` 1 is no guidance at all. `legacy` guides the first
    three channels only. `evaluations` is the number of network evaluations per image so far: one per call, two
    where guidance was on; a mean over the images, where they were evaluated at different times.
    """

    def __init__(
        self,
        model: nn.Module,
        path: Interpolant,
        prediction: Prediction,
        labels: Tensor,
        null_class: int,
        *,
        scale: float = 1.0,
        low: float = 0.0,
        high: float = 1.0,
        legacy: bool = False,
        precision: Precision = "fp32",
    ) -> None:
        self.model = model
        self.path = path
        self.prediction = prediction
        self.labels = labels
        self.null_class = null_class
        self.scale, self.low, self.high, self.legacy = scale, low, high, legacy
        self.precision = precision
        self.rows_evaluated = 0

    @property
    def evaluations(self) -> float:
        return self.rows_evaluated / len(self.labels)

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        """The velocity at x (n, ...) and t, a scalar or (n,). `rows` int64 (n,) are the images that x belongs to."""
        labels = self.labels if rows is None else self.labels[rows]
        times = t.to(x.device).expand(len(x))
        if self.scale == 1:
            return self._predict(x, times, labels)
        guided = ((self.low <= times) & (times <= self.high)).nonzero().flatten()
        null_labels = torch.full_like(labels[guided], self.null_class)
        both = self._predict(
            torch.cat([x, x[guided]]), torch.cat([times, times[guided]]), torch.cat([labels, null_labels])
        )
        velocity, null = both.split([len(x), len(guided)])
        channels = LEGACY_CHANNELS if self.legacy else None
        null, conditional = null[:, :channels], velocity[guided, :channels]
        velocity[guided, :channels] = null + self.scale * (conditional - null)
        return velocity

    def _predict(self, x: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        self.rows_evaluated += len(x)
        with autocast(x.device, DTYPES[self.precision]):
            output = self.model(x.float(), times.float(), labels)
        source: Literal["velocity", "x0"] = "velocity" if self.prediction == "v" else "x0"
        return self.path.convert(output.to(x.dtype), x, times, source, "velocity")


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
