"""Sampling latents from a class-conditional network, guided by labels or by a weaker network in intervals of time.

Both previews during training and `generate` use it.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stablevm.choices import Precision, Prediction
from stablevm.interpolant import Interpolant, get_interpolant
from stablevm.networks.joint_state import parted
from stablevm.networks.snapshot import ModelCard
from stablevm.sampling.config import CFG_SCALE, GuidanceOptions
from stablevm.solvers.integration import integrate
from stablevm.solvers.settings import SamplerSettings, spelt_in_python
from stablevm.support.errors import UserError, arg
from stablevm.support.precision import DTYPES, autocast
from stablevm.support.ranges import TIME, check_word
from stablevm.support.rng import RowGenerators, randn
from stablevm.support.text import brief

LEGACY_CHANNELS = 3  # the published samplers of DiT and SiT guide only these channels


@dataclass(frozen=True)
class GuidanceSettings(GuidanceOptions):
    """Settings of `sample_latents`: the options of `GuidanceOptions`, which documents each field.

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


@dataclass(frozen=True)
class Guide:
    """A weaker network of the same data, for autoguidance (Karras et al., 2024, "Guiding a diffusion model with a bad
    version of itself"): samples move away from its prediction at times from `low` to `high`.

    model: on the device of the samples, in evaluation mode; card: its facts. scale: 0 or more; 1 has no effect.
    """

    model: nn.Module
    card: ModelCard
    scale: float
    low: float = 0.0
    high: float = 1.0

    def labels(self, labels: Tensor) -> Tensor:
        """The labels for this network (n,): the same, or its null class if it was trained without classes."""
        return labels if self.card.classes_are_trained else torch.full_like(labels, self.card.model.null_class)


def check_guide(theirs: ModelCard, ours: ModelCard) -> None:
    """Raise UserError unless the network `theirs` can guide `ours`: it has the same latents, path and classes.

    Predictions, sizes and training times may differ. A network trained without classes may have any.
    """
    latents = ours.latent, theirs.latent
    facts = [(f"latents' {fact}", *(getattr(each, fact) for each in latents)) for fact in ("shape", "scale", "shift")]
    if not ours.latent.has_autoencoder_of(theirs.latent):
        facts.append(("autoencoder", *(each.autoencoder_id for each in latents)))
    facts.append(("path", ours.path_type, theirs.path_type))
    facts.append(("class token's width", *(card.model.cls_token_dim for card in (ours, theirs))))
    if theirs.classes_are_trained:
        facts.append(("number of classes", ours.model.num_classes, theirs.model.num_classes))
        if ours.names_classes and theirs.names_classes:
            facts.append(("classes", ", ".join(ours.class_names), ", ".join(theirs.class_names)))
    for fact, wanted, found in facts:
        if wanted != found:
            raise UserError(
                f"{arg('guide_ckpt')}: {fact}: {brief(found)}, expected {brief(wanted)} of the network that it guides; "
                "give a weaker network of the same data"
            )


class GuidedVelocity:
    """The velocity of a network with classifier-free guidance (Ho and Salimans, 2022) in an interval of time
    (Kynkaanniemi et al., 2024): `v = v_null + scale (v_cond - v_null)` for `low <= t <= high`, and `v_cond` outside.

    model: called as model(x (B, ...), t (B,), labels (B,)), in float32 or under autocast to `precision`; it predicts
    the velocity (`prediction` "v") or the data ("x"). The result is a velocity in the dtype of the state. Both
    predictions of a guided evaluation are computed in one batch. `scale` 1 means no guidance. With `legacy` only the
    first three channels are guided. With a `guide`, `(guide.scale - 1) (v_cond - v_weak)` is added in its own interval,
    where v_weak is its velocity for the same labels; without guidance by labels that is `v_weak + guide.scale (v_cond -
    v_weak)`. evaluations: the number of network evaluations per image so far, of both networks together: one for each
    call, one more with guidance, and one with the guide, averaged over images evaluated at different times.
    """

    def __init__(
        self,
        model: Callable[..., Any],
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
        guide: Guide | None = None,
    ) -> None:
        self.model, self.guide = model, guide
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

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor | None = None, *, r: Tensor | None = None) -> Tensor:
        """The velocity at states x (n, ...) and times t, a scalar or (n,); rows: (n,) int64, the images of x.

        r: a scalar; if given, the mean velocity from that time to t.
        """
        labels = self.labels if rows is None else self.labels[rows]
        times = t.to(x.device).expand(len(x))
        conditional, velocity = self._by_labels(x, times, labels, r)
        if self.guide is None:
            return velocity
        near = _inside(times, self.guide.low, self.guide.high)
        weak = self._predict(x[near], times[near], self.guide.labels(labels[near]), guide=self.guide)
        velocity = velocity.clone()
        velocity[near] += (self.guide.scale - 1) * (conditional[near] - weak)
        return velocity

    def _by_labels(self, x: Tensor, times: Tensor, labels: Tensor, r: Tensor | None) -> tuple[Tensor, Tensor]:
        """The velocity for the labels without guidance, and with it."""
        if self.scale == 1:
            velocity = self._predict(x, times, labels, r)
            return velocity, velocity
        guided = _inside(times, self.low, self.high)
        null_labels = torch.full_like(labels[guided], self.null_class)
        both = self._predict(
            torch.cat([x, x[guided]]), torch.cat([times, times[guided]]), torch.cat([labels, null_labels]), r
        )
        plain, null = both.split([len(x), len(guided)])
        velocity, channels = plain.clone(), LEGACY_CHANNELS if self.legacy else None
        null, conditional = null[:, :channels], plain[guided, :channels]
        velocity[guided, :channels] = null + self.scale * (conditional - null)
        return plain, velocity

    def _predict(
        self, x: Tensor, times: Tensor, labels: Tensor, r: Tensor | None = None, *, guide: Guide | None = None
    ) -> Tensor:
        """The velocity by the network, or by the guide; r as in `__call__`."""
        self.rows_evaluated += len(x)
        more = {} if r is None else {"r": r.to(x.device).float().expand(len(x))}
        model, prediction = (self.model, self.prediction) if guide is None else (guide.model, guide.card.prediction)
        with autocast(x.device, DTYPES[self.precision]):
            output = model(x.float(), times.float(), labels, **more)
        source: Literal["velocity", "x0"] = "velocity" if prediction == "v" else "x0"
        return self.path.convert(output.to(x.dtype), x, times, source, "velocity")


def _inside(times: Tensor, low: float, high: float) -> Tensor:
    """The rows whose times (n,) lie in the interval, int64."""
    return ((low <= times) & (times <= high)).nonzero().flatten()


@torch.no_grad()
def sample_latents(
    model: nn.Module,
    card: ModelCard,
    labels: Tensor,
    streams: RowGenerators,
    settings: SamplerSettings,
    device: torch.device | str,
    watch: Callable[[Tensor, Tensor, Tensor], None] | None = None,
    *,
    guidance: GuidanceSettings = UNGUIDED,
    guide: Guide | None = None,
) -> tuple[Tensor, int]:
    """Sample one latent for each label: float32 (B, C, h, w), and the number of network evaluations per image.

    labels: (B,) int64, which may include the null class. model: on `device`, in evaluation mode. streams: a generator
    for each image, from which all its noise comes, so that images do not depend on how they are batched. watch: called
    as watch(x, t, v) with each state, its time and its velocity; not with dopri5, where each image has its own times.
    With dopri5 the number of evaluations is a rounded mean over images. A network with a class token makes it beside
    the latent, guided alike, and it is dropped. UserError for labels or guidance that were never trained, according to
    the card, and for a guide that does not fit.
    """
    _check_request(card, labels, settings, guidance, guide)
    shape = (len(labels), *card.model.state_shape)
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
        guide=guide,
    )

    takes_intervals = settings.mode == "meanflow"

    def watched(x: Tensor, t: Tensor, third: Tensor | None = None) -> Tensor:
        """The third argument is the time r of the next state for MeanFlow, the rows of x for dopri5."""
        v = velocity(x, t, r=third) if takes_intervals else velocity(x, t, third)
        if watch is not None and (takes_intervals or third is None):
            watch(latents_of(x), t, latents_of(v))
        return v

    def latents_of(states: Tensor) -> Tensor:
        return parted(states, card.latent.shape)[0] if card.model.cls_token_dim else states

    def noise() -> Tensor:
        return randn(shape, streams, device).double()

    if settings.time_shift is None and "time_shift" not in settings.without_effect(spelt_in_python):
        settings = replace(settings, time_shift=card.time_shift)
    latents = latents_of(integrate(watched, noise, path, settings))
    return latents.float(), round(velocity.evaluations)


def _check_request(
    card: ModelCard, labels: Tensor, settings: SamplerSettings, guidance: GuidanceSettings, guide: Guide | None
) -> None:
    """Raise UserError for what the network, or its guide, was not trained for."""
    check_trained(card, labels, guidance.cfg_scale)
    takes_intervals = settings.mode == "meanflow"
    if takes_intervals and not card.model.intervals:
        raise UserError(f"{arg('mode')} meanflow: the network was trained without meanflow, so it knows no intervals")
    if guidance.legacy and card.model.cls_token_dim:
        raise UserError(f"{arg('legacy')}: the network has a class token, whose states have no channels; leave it out")
    if guide is not None:
        if takes_intervals:
            raise UserError(f"{arg('mode')} meanflow: expected no guide, which guides velocities and not their means")
        check_guide(guide.card, card)
        check_trained(guide.card, guide.labels(labels), 1.0)


def check_trained(card: ModelCard, labels: Tensor, cfg_scale: float, *, called: str = "cfg_scale") -> None:
    """Raise UserError if sampling needs labels that were never trained; called: the argument for the scale."""
    null = labels == card.model.null_class
    if not card.null_is_trained and (cfg_scale != 1 or null.any()):
        asked = "labels of the null class" if null.any() else f"{called} {cfg_scale:g}"
        raise UserError(
            f"{asked}: the network was trained with label_dropout 0, so its null class is untrained; "
            f"sample classes with {called} 1"
        )
    if not card.classes_are_trained and not null.all():
        raise UserError(
            "labels: the network was trained with label_dropout 1, so its classes are untrained; "
            f"sample the null class, {card.model.null_class}"
        )
