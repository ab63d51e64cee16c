"""A batch to regress on: noisy samples with times, labels and targets, and the functions that make them."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from stablevm.bank import NO_ID
from stablevm.choices import Prediction, TimeName
from stablevm.interpolant import LINEAR, Interpolant
from stablevm.support.errors import UserError, arg
from stablevm.support.ranges import ABOVE_0, CHANCE, FINITE, check_word
from stablevm.support.rng import AnyGenerator, rand, randn, to_device
from stablevm.support.shapes import ShownByShape
from stablevm.times import draw_times


@dataclass(frozen=True, repr=False)
class Draw(ShownByShape):
    """One batch to regress on: give the network (x_t, t, labels) and compare its output with `target`.

    x_t, target, x0, noise: (B, *shape). t: (B,) in [0, 1]. labels: (B,) int64, the null class where a label was
    dropped. ids: (B,) int64, the data-set row of each anchor, whose image alignment needs (NO_ID where unknown).
    ess: (B,), the effective sample size of each target, 1 for CFM. All are on the latents' device. host_t is a copy of
    t on the CPU, where it was drawn, so that code can read it without waiting for the GPU. With `instant_share` below 1
    in the settings, r: (B,) is the start in [0, t] of each sample's interval, and host_r its copy on the CPU.
    """

    x_t: Tensor
    t: Tensor
    labels: Tensor
    target: Tensor
    x0: Tensor
    noise: Tensor
    ids: Tensor
    ess: Tensor
    host_t: Tensor
    r: Tensor | None = None
    host_r: Tensor | None = None

    def part(self, rows: Tensor | slice) -> "Draw":
        """The draw of some rows: a slice, or a tensor of indices or of bools (B,)."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: _rows(value, rows) for name, value in values.items() if value is not None})


def _rows(value: Tensor, rows: Tensor | slice) -> Tensor:
    return value[rows.to(value.device) if isinstance(rows, Tensor) else rows]


@dataclass(frozen=True)
class ObjectiveSettings:
    """Settings that all objectives share: the path, the kind of target, the times and the label dropout.

    path: LINEAR or COSINE. prediction: "v" to regress on the velocity, "x" on the data. weighting: the distribution of
    training times, as in `draw_times`. label_dropout: the probability in [0, 1] that a label is replaced by
    `null_class`, for classifier-free guidance. time_shift: factor of the times' sigma / alpha, as in `draw_times`; 1
    leaves them as drawn. weighting_mean, weighting_std: of ln(sigma/alpha), in place of those of the weighting; None
    with uniform times. instant_share: the probability in [0, 1] that a sample's interval is a single time; below 1
    two times are drawn for each sample, which is perturbed at the later one (MeanFlow; Geng et al., 2025). Raises
    UserError for a value out of range.
    """

    path: Interpolant = LINEAR
    prediction: Prediction = "v"
    weighting: TimeName = "uniform"
    label_dropout: float = 0.0
    null_class: int | None = None
    time_shift: float = 1.0
    instant_share: float = 1.0
    weighting_mean: float | None = None
    weighting_std: float | None = None

    def __post_init__(self) -> None:
        check_word("prediction", self.prediction, Prediction)
        if not isinstance(self.path, Interpolant):
            raise UserError(f"path {self.path!r}: expected an Interpolant, such as stablevm.LINEAR or stablevm.COSINE")
        check_word("weighting", self.weighting, TimeName)
        CHANCE.check("label_dropout", self.label_dropout)
        ABOVE_0.check("time_shift", self.time_shift)
        CHANCE.check("instant_share", self.instant_share)
        self._check_moments()
        if self.label_dropout and self.null_class is None:
            raise UserError(f"{arg('label_dropout')} {self.label_dropout} needs null_class, which replaces the labels")

    def _check_moments(self) -> None:
        if self.weighting_mean is not None:
            FINITE.check("weighting_mean", self.weighting_mean)
        if self.weighting_std is not None:
            ABOVE_0.check("weighting_std", self.weighting_std)
        if self.weighting == "uniform" and (self.weighting_mean, self.weighting_std) != (None, None):
            raise UserError(f"{arg('weighting_mean')}, {arg('weighting_std')}: expected none with weighting uniform")


@dataclass(frozen=True)
class Noisy:
    """Samples x0 with their noise, times and noisy states x_t; shapes as in `Draw`."""

    x0: Tensor
    noise: Tensor
    t: Tensor
    x_t: Tensor
    host_t: Tensor
    host_r: Tensor | None = None

    def part(self, rows: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        """The x0, noise and t of some rows."""
        return self.x0[rows], self.noise[rows], self.t[rows]


def perturb(settings: ObjectiveSettings, latents: Tensor, generator: AnyGenerator) -> Noisy:
    """Perturb latents (B, *shape) with times and then noise from the generator."""
    device = latents.device
    host_t, host_r = _draw_intervals(settings, latents.shape[0], generator)
    t = to_device(host_t, device)
    noise = randn(latents.shape, generator, device)
    return Noisy(latents, noise, t, settings.path.interpolate(latents, noise, t), host_t, host_r)


def _draw_intervals(settings: ObjectiveSettings, count: int, generator: AnyGenerator) -> tuple[Tensor, Tensor | None]:
    """Times t (count,), and the starts r <= t of their intervals; None where every interval is a single time."""

    def times() -> Tensor:
        return draw_times(
            settings.weighting,
            settings.path,
            count,
            generator,
            shift=settings.time_shift,
            mean=settings.weighting_mean,
            deviation=settings.weighting_std,
        )

    if settings.instant_share == 1:
        return times(), None
    first, second = times(), times()
    later = torch.maximum(first, second)
    is_instant = rand((count,), generator) < settings.instant_share
    return later, torch.where(is_instant, later, torch.minimum(first, second))


def drop_labels(settings: ObjectiveSettings, labels: Tensor, generator: AnyGenerator) -> tuple[Tensor, Tensor]:
    """The labels that the network sees, and a mask of the dropped ones (on the host, where their number is needed)."""
    if settings.null_class is None:
        return labels, torch.zeros(len(labels), dtype=torch.bool)
    dropped = rand((len(labels),), generator) < settings.label_dropout
    return torch.where(to_device(dropped, labels.device), settings.null_class, labels), dropped


def known_ids(ids: Tensor | None, labels: Tensor) -> Tensor:
    """The ids (B,) of the anchors, which are their data-set rows, or NO_ID for all if None; labels: (B,) int64."""
    return torch.full_like(labels, NO_ID) if ids is None else ids.to(labels)


def with_target(
    settings: ObjectiveSettings, noisy: Noisy, labels: Tensor, ids: Tensor, correction: tuple[Tensor, Tensor] | None
) -> Draw:
    """The draw, whose target is that of CFM plus the correction from the references, if any (docs/theory.md).

    correction: the offsets `x0 - m` (B, *shape) and the effective sample sizes (B,).
    """
    ess = torch.ones_like(noisy.t) if correction is None else correction[1]
    if settings.prediction == "x":
        target = noisy.x0 if correction is None else noisy.x0 - correction[0]
    else:
        target = settings.path.velocity(noisy.x0, noisy.noise, noisy.t)
        if correction is not None:
            target = target + settings.path.offset_gain(noisy.t, noisy.x0) * correction[0]
    r = None if noisy.host_r is None else to_device(noisy.host_r, noisy.t.device)
    return Draw(noisy.x_t, noisy.t, labels, target, noisy.x0, noisy.noise, ids, ess, noisy.host_t, r, noisy.host_r)
