"""Training objectives: noisy samples, times, labels and regression targets for CFM, STF and StableVM.

An objective knows neither the network nor the trainer, so it fits into any training loop:

    objective = StableVM(ClassBank(num_classes=10, capacity=256, shape=(4, 32, 32)))
    draw = objective.draw(latents, labels, generator)
    loss = squared_error(model(draw.x_t, draw.t, draw.labels), draw.target).mean()
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from stablevm.bank import NO_ID, ClassBank, check_batch, check_labels, check_positions, check_shares
from stablevm.interpolant import LINEAR, Interpolant
from stablevm.posterior import Posterior, posterior, posterior_over_blocks
from stablevm.support.errors import UserError, arg
from stablevm.support.moved import old_names, renamed
from stablevm.support.rng import AnyGenerator, RowGenerators, rand, randn, to_device, warn_if_drawn_alike
from stablevm.support.shapes import ShownByShape
from stablevm.times import TimeName, draw_times

Prediction = Literal["v", "x"]
Anchors = Literal["bank", "batch"]

# References drawn from all classes for the samples whose label was dropped, as many as in the published toy study.
POOL_SIZE = 2048
# Values of these references gathered at once on a CPU, where a large new tensor takes longer to map than to fill.
GATHERED_VALUES_CPU = 2**20


@dataclass(frozen=True, repr=False)
class Draw(ShownByShape):
    """One batch to regress on: give the network (x_t, t, labels) and compare its output with `target`.

    x_t, target, x0, noise: (B, *shape). t: (B,) in [0, 1]. labels: (B,) int64, the null class where a label was
    dropped. ids: (B,) int64, the data-set row of each anchor, whose image alignment needs (NO_ID where unknown).
    ess: (B,), the effective sample size of each target, 1 for CFM. All are on the latents' device. host_t is a copy of
    t on the CPU, where it was drawn, so that code can read it without waiting for the GPU.
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


@dataclass(frozen=True)
class ObjectiveSettings:
    """Settings that all objectives share: the path, the kind of target, the times and the label dropout.

    path: LINEAR or COSINE. prediction: "v" to regress on the velocity, "x" on the data. weighting: the distribution of
    training times, as in `draw_times`. label_dropout: the probability in [0, 1] that a label is replaced by
    `null_class`, for classifier-free guidance. Raises UserError for a value out of range.
    """

    path: Interpolant = LINEAR
    prediction: Prediction = "v"
    weighting: TimeName = "uniform"
    label_dropout: float = 0.0
    null_class: int | None = None

    def __post_init__(self) -> None:
        if self.prediction not in ("v", "x"):
            raise UserError(f"{arg('prediction')} {self.prediction!r}: expected v or x")
        if not isinstance(self.path, Interpolant):
            raise UserError(f"path {self.path!r}: expected an Interpolant, such as stablevm.LINEAR or stablevm.COSINE")
        if self.weighting not in get_args(TimeName):
            raise UserError(f"{arg('weighting')} {self.weighting!r}: expected one of {', '.join(get_args(TimeName))}")
        if not 0 <= self.label_dropout <= 1:
            raise UserError(f"{arg('label_dropout')} {self.label_dropout}: expected a probability in [0, 1]")
        if self.label_dropout and self.null_class is None:
            raise UserError(f"{arg('label_dropout')} {self.label_dropout} needs null_class, which replaces the labels")


class _Objective:
    """What all objectives share: their settings, their bank if they have one, and the checks of a batch."""

    settings: ObjectiveSettings
    bank: ClassBank | None = None  # of references, where the objective keeps one
    _has_drawn = False

    @property
    def protocol(self) -> ObjectiveSettings:
        """The settings, under their name in version 0.1."""
        message = "protocol is now settings; the old name will be removed in stablevm 0.3"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return self.settings

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings})"

    def _begin(
        self, latents: Tensor, labels: Tensor | None, generator: AnyGenerator, ids: Tensor | None = None
    ) -> None:
        """Check the batch; at the first draw, also that no other process draws the same random numbers."""
        check_batch(latents, labels, ids)
        if not isinstance(generator, torch.Generator | RowGenerators):
            raise UserError(
                f"generator {generator!r}: expected a torch.Generator, such as torch.Generator().manual_seed(0)"
            )
        if not self._has_drawn:
            self._has_drawn = True
            warn_if_drawn_alike(generator)


class FlowMatching(_Objective):
    """Conditional flow matching (CFM, or `si`; Lipman et al., 2023): the target is `alpha' x0 + sigma' noise`.

    It is made from the one sample x0 that made x_t, without references.
    """

    bank: None = None

    @renamed(protocol="settings")
    def __init__(self, settings: ObjectiveSettings | None = None) -> None:
        self.settings = settings or ObjectiveSettings()

    @renamed(stream="generator")
    def draw(self, latents: Tensor, labels: Tensor, generator: AnyGenerator, *, ids: Tensor | None = None) -> Draw:
        """Draw times and noise for latents (B, *shape) with labels (B,) int64.

        generator: the source of times, noise and dropped labels. ids: (B,) int64, the latents' rows in the data set,
        passed on to the draw. UserError for labels or ids of another shape or type.
        """
        check_labels(labels)
        self._begin(latents, labels, generator, ids)
        noisy = _perturb(self.settings, latents, generator)
        labels, _ = _drop_labels(self.settings, labels, generator)
        return _finish(self.settings, noisy, labels, _ids_or_none(ids, labels), None)


class StableTargetField(_Objective):
    """Stable Target Field (STF; Xu et al., 2023): samples of a set are perturbed, with the set as their references.

    The target averages the conditional velocity over the references, weighted by how likely each made x_t. A row with
    a label has the set's samples of its class as references, a row without one the whole set. references_from: the
    time in [0, 1] below which the target is that of plain flow matching.
    """

    @renamed(protocol="settings")
    def __init__(self, settings: ObjectiveSettings | None = None, *, references_from: float = 0.0) -> None:
        self.settings = settings or ObjectiveSettings()
        self.references_from = _time(references_from)

    @renamed(stream="generator")
    def draw(
        self,
        references: Tensor,
        labels: Tensor | None,
        generator: AnyGenerator,
        *,
        anchors: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> Draw:
        """Perturb samples of the set `references` (n, *shape) with labels (n,) int64, or None for data of one class.

        generator: the source of times, noise and dropped labels. anchors: positions (B,) int64 in the set of the
        samples to perturb, all if None; they must be chosen independently of the references' values, or the target is
        biased. ids: (n,) int64, the references' rows in the data set. UserError for labels, anchors or ids of another
        shape or type.
        """
        self._begin(references, labels, generator, ids)
        if anchors is not None:
            check_positions("anchors", anchors, None, len(references))
        count, device = references.shape[0], references.device
        chosen = torch.arange(count, device=device) if anchors is None else anchors
        noisy = _perturb(self.settings, references[chosen], generator)
        if labels is None:
            own_labels = torch.zeros_like(chosen)
            keep = torch.ones(len(chosen), count, dtype=torch.bool, device=device)
        else:
            own_labels, dropped = _drop_labels(self.settings, labels[chosen], generator)
            keep = (labels[chosen, None] == labels) | to_device(dropped, device)[:, None]
        keep[torch.arange(len(chosen), device=device), chosen] = False

        def weigh(rows: Tensor | slice) -> Posterior:
            return posterior(self.settings.path, *noisy.part(rows), references, keep=keep[rows])

        own_ids = _ids_or_none(None if ids is None else ids[chosen], own_labels)
        return _finish(self.settings, noisy, own_labels, own_ids, _weigh_from(self.references_from, noisy, weigh))

    @renamed(stream="generator")
    def draw_over_blocks(
        self, anchors: Tensor, blocks: Iterable[tuple[Tensor, Tensor | None]], generator: AnyGenerator
    ) -> Draw:
        """Like `draw`, for anchors (B, *shape) without labels and a set read in blocks, one in memory at a time.

        blocks: pairs of references (n, *shape) and keep (B, n) bool, which is False where a reference is the row's own
        anchor; keep may be None where the block holds no anchor.
        """
        self._begin(anchors, None, generator)
        noisy = _perturb(self.settings, anchors, generator)
        labels = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)

        def weigh(rows: Tensor | slice) -> Posterior:
            parts = ((block, None if keep is None else keep[rows]) for block, keep in blocks)
            return posterior_over_blocks(self.settings.path, *noisy.part(rows), parts)

        corrections = _weigh_from(self.references_from, noisy, weigh)
        return _finish(self.settings, noisy, labels, _ids_or_none(None, labels), corrections)


class StableVM(_Objective):
    """StableVM (Yang et al., 2026): the references of a sample are a bank's recent samples of its class.

    The target averages the conditional velocity over the references, weighted by how likely each made x_t.

    anchors: the samples to perturb. "bank", as published, draws a class uniformly and then one of its entries; "batch"
    takes the fresh samples themselves. A row whose label was dropped has references from all classes, `pool_size` of
    them, drawn again at each step. Their weights include the prior probability that an entry is the anchor, which is
    its class's share of the anchors divided by the number of the class's entries; without it the target is biased
    where classes differ in size (docs/theory.md).
    class_shares: (classes,), the shares of the classes among the fresh samples; if None, those seen so far.
    references_from: the time in [0, 1] below which the target is that of plain flow matching. Every value is unbiased,
    because the time is drawn independently of everything else (docs/theory.md).
    """

    bank: ClassBank

    @renamed(protocol="settings")
    def __init__(
        self,
        bank: ClassBank,
        settings: ObjectiveSettings | None = None,
        *,
        anchors: Anchors = "bank",
        pool_size: int = POOL_SIZE,
        class_shares: Tensor | None = None,
        references_from: float = 0.0,
    ) -> None:
        if anchors not in ("bank", "batch"):
            raise UserError(f"{arg('anchors')} {anchors!r}: expected bank or batch")
        if pool_size < 1:
            raise UserError(f"{arg('pool_size')} {pool_size}: expected at least 1")
        if class_shares is not None:
            check_shares(class_shares, bank.num_classes)
        self.bank, self.anchors, self.pool_size = bank, anchors, pool_size
        self.class_shares = None if class_shares is None else class_shares.to(bank.device, torch.float32)
        self.references_from = _time(references_from)
        self.settings = settings or ObjectiveSettings()
        if self.settings.null_class in range(bank.num_classes):
            raise UserError(
                f"null class {self.settings.null_class} is one of the bank's classes, 0 to {bank.num_classes - 1}: "
                f"give {bank.num_classes}"
            )

    @renamed(stream="generator", pool_stream="pool_generator")
    def draw(
        self,
        latents: Tensor,
        labels: Tensor,
        generator: AnyGenerator,
        *,
        ids: Tensor | None = None,
        slots: Tensor | None = None,
        pool_generator: torch.Generator | None = None,
    ) -> Draw:
        """Insert fresh latents (B, *shape) with labels (B,) int64 into the bank, then draw B samples to regress on.

        With anchors from the bank (the default) the drawn samples are not the fresh ones: anything else that the
        network is given about a sample must be that of the rows `ids` of the draw. The draw is float32, and no gradient
        flows to the latents.

        generator: the source of anchors, times, noise and dropped labels. ids: (B,) int64, the latents' rows in the
        data set, by which copies are recognised. slots: (B,) int64, the latents' slots if the caller has already
        inserted them (together with those of other processes). pool_generator: the source of the references of all
        classes, `generator` if None; required when `generator` is a RowGenerators.

        UserError where the batch does not fit the bank. Values are checked on a CPU only, because on a GPU the check
        would have to wait for it: there a label out of range ends in a device-side assertion, and values that are not
        finite stay in the bank.
        """
        check_labels(labels)
        self._begin(latents, labels, generator, ids)
        self.bank.check(latents, labels, ids)
        if not latents.device == labels.device == self.bank.device:
            raise UserError(
                f"latents are on {latents.device}, labels on {labels.device}, the bank on {self.bank.device}: expected "
                "the same device for all (set the bank's with ClassBank(..., device=...))"
            )
        latents = latents.detach().float()
        if slots is None:
            slots = self.bank.insert(latents, labels, ids)
        else:
            check_positions("slots", slots, len(latents), self.bank.discarded_slot + 1)
        ids = _ids_or_none(ids, labels)
        if self.anchors == "bank":
            labels, slots = draw_anchors(self.bank, latents.shape[0], generator)
            latents, ids = self.bank.gather(slots).to(latents), self.bank.ids_at(slots)
        noisy = _perturb(self.settings, latents, generator)
        shown, dropped = _drop_labels(self.settings, labels, generator)
        if pool_generator is None:
            if not isinstance(generator, torch.Generator):
                raise ValueError("generator is a RowGenerators, which can't draw the shared pool: give pool_generator")
            pool_generator = generator
        corrections = self._weigh(noisy, labels, slots, ids, dropped, pool_generator)
        return _finish(self.settings, noisy, shown, ids, corrections)

    def _weigh(
        self,
        noisy: "_Noisy",
        labels: Tensor,
        slots: Tensor,
        ids: Tensor,
        dropped: Tensor,
        pool_generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Offsets `x0 - m` (B, *shape) and effective sample sizes (B,): labelled rows are weighed against their class,
        the others against the pool.
        """
        offset, ess = torch.zeros_like(noisy.x0), torch.ones_like(noisy.t)
        weighed = noisy.host_t >= self.references_from
        for is_pool, chosen in ((False, weighed & ~dropped), (True, weighed & dropped)):
            if not chosen.any():
                continue
            rows = to_device(chosen.nonzero().squeeze(1), noisy.x0.device)
            path, part = self.settings.path, noisy.part(rows)
            if is_pool:
                pool = self._pool(labels[rows], slots[rows], ids[rows], pool_generator)
                found = posterior_over_blocks(path, *part, pool)
            else:
                keep = self.bank.is_reference(labels[rows], slots[rows], ids[rows])
                found = posterior(path, *part, self.bank.entries, groups=labels[rows], keep=keep)
            offset[rows], ess[rows] = found.offset, found.ess
        return offset, ess

    def _pool(
        self, labels: Tensor, slots: Tensor, ids: Tensor, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of references (n, *shape) from all classes, with their log prior odds against each anchor (R, n)."""
        picked, filled = self.bank.draw_pool(self.pool_size, generator)
        log_prior = (self._shares() / self.bank.counts).log()
        odds = log_prior[picked // self.bank.capacity] - log_prior[labels, None]
        copies = (self.bank.ids_at(picked) == ids[:, None]) & (ids != NO_ID)[:, None]
        takes_part = filled & ~copies & (picked != slots[:, None])
        odds = odds.masked_fill(~takes_part, -torch.inf)
        together = max(1, GATHERED_VALUES_CPU // math.prod(self.bank.shape)) if picked.is_cpu else len(picked)
        for part, prior in zip(picked.split(together), odds.split(together, dim=1), strict=True):
            yield self.bank.gather(part), prior

    def _shares(self) -> Tensor:
        """The share of each class among the anchors (classes,), up to a constant factor."""
        if self.anchors == "bank":
            return (self.bank.counts > 0).float()
        return self.bank.seen.float() if self.class_shares is None else self.class_shares


def draw_anchors(bank: ClassBank, rows: int, generator: AnyGenerator) -> tuple[Tensor, Tensor]:
    """Draw the labels and flat slots (rows,) of the samples to perturb, as `StableVM.draw` does first."""
    return bank.draw(rand((rows, 2), generator))


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample: (B,), float32, for a prediction and a target (B, ...).

    UserError where their shapes differ, because broadcasting would hide the mistake.
    """
    if prediction.shape != target.shape:
        raise UserError(
            f"the prediction is {tuple(prediction.shape)}, the target {tuple(target.shape)}: expected the same"
        )
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)


@dataclass(frozen=True)
class _Noisy:
    x0: Tensor
    noise: Tensor
    t: Tensor
    x_t: Tensor
    host_t: Tensor

    def part(self, rows: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        return self.x0[rows], self.noise[rows], self.t[rows]


def _time(references_from: float) -> float:
    if not 0 <= references_from <= 1:
        raise UserError(f"references_from {references_from}: expected a time in [0, 1]")
    return references_from


def _weigh_from(
    references_from: float, noisy: _Noisy, weigh: Callable[[Tensor | slice], Posterior]
) -> tuple[Tensor, Tensor]:
    """Offsets and effective sample sizes: `weigh(rows)` for rows with t >= references_from; 0 and 1 for the others, as
    without references. The rows are selected on the host, without waiting for the GPU.
    """
    offset, ess = torch.zeros_like(noisy.x0), torch.ones_like(noisy.t)
    chosen = noisy.host_t >= references_from
    if chosen.any():
        rows = slice(None) if references_from == 0 else to_device(chosen.nonzero().squeeze(1), noisy.x0.device)
        found = weigh(rows)
        offset[rows], ess[rows] = found.offset, found.ess
    return offset, ess


def _perturb(settings: ObjectiveSettings, latents: Tensor, generator: AnyGenerator) -> _Noisy:
    device = latents.device
    host_t = draw_times(settings.weighting, settings.path, latents.shape[0], generator)
    t = to_device(host_t, device)
    noise = randn(latents.shape, generator, device)
    return _Noisy(latents, noise, t, settings.path.interpolate(latents, noise, t), host_t)


def _drop_labels(settings: ObjectiveSettings, labels: Tensor, generator: AnyGenerator) -> tuple[Tensor, Tensor]:
    """The labels that the network sees, and a mask of the dropped ones (on the host, where their number is needed)."""
    if settings.null_class is None:
        return labels, torch.zeros(len(labels), dtype=torch.bool)
    dropped = rand((len(labels),), generator) < settings.label_dropout
    return torch.where(to_device(dropped, labels.device), settings.null_class, labels), dropped


def _ids_or_none(ids: Tensor | None, labels: Tensor) -> Tensor:
    return torch.full_like(labels, NO_ID) if ids is None else ids.to(labels)


def _finish(
    settings: ObjectiveSettings, noisy: _Noisy, labels: Tensor, ids: Tensor, correction: tuple[Tensor, Tensor] | None
) -> Draw:
    """The draw, whose target is that of CFM plus the correction from the references, if any (docs/theory.md)."""
    ess = torch.ones_like(noisy.t) if correction is None else correction[1]
    if settings.prediction == "x":
        target = noisy.x0 if correction is None else noisy.x0 - correction[0]
    else:
        target = settings.path.velocity(noisy.x0, noisy.noise, noisy.t)
        if correction is not None:
            target = target + settings.path.offset_gain(noisy.t, noisy.x0) * correction[0]
    return Draw(noisy.x_t, noisy.t, labels, target, noisy.x0, noisy.noise, ids, ess, noisy.host_t)


__getattr__ = old_names(__name__, Protocol="ObjectiveSettings")
