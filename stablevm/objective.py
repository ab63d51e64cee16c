"""What the network is trained on: noisy samples, times, labels and targets, for CFM, STF and StableVM.

Model-free: a draw knows neither the network nor the trainer, so it fits into any training loop:

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

# References drawn over all classes for the samples whose label was dropped; the number of the published toy study.
POOL_SIZE = 2048
# Values of them that are gathered at once on a CPU, where a large new tensor takes longer to map than to fill.
GATHERED_VALUES_CPU = 2**20


@dataclass(frozen=True, repr=False)
class Draw(ShownByShape):
    """One batch to regress on. All tensors are on the latents' device; images have shape (B, *shape).

    labels holds the null class where the label was dropped. ids are the dataset rows of the anchors (NO_ID where
    unknown): the images that alignment needs. ess is the effective sample size of each target, 1 for CFM. host_t is t
    once more, on the host, where it was drawn: to read it there makes nobody wait for the device.
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
    """What every objective is given: the path, and how targets, times and dropped labels are made.

    prediction: "v" makes the velocity the target, "x" the data. null_class and label_dropout serve classifier-free
    guidance: with that chance a label is replaced by the null class.
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
            raise UserError(f"{arg('label_dropout')} {self.label_dropout}: expected a chance in [0, 1]")
        if self.label_dropout and self.null_class is None:
            raise UserError(f"a label dropout of {self.label_dropout} needs a null class to drop labels to")


class _Objective:
    """What all objectives have."""

    settings: ObjectiveSettings
    bank: ClassBank | None = None  # of references, where the objective keeps one
    _has_drawn = False

    @property
    def protocol(self) -> ObjectiveSettings:
        """The settings, by the name that version 0.1 gave them."""
        warnings.warn("protocol is now settings; the old name goes in stablevm 0.3", DeprecationWarning, stacklevel=2)
        return self.settings

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings})"

    def _begin(
        self, latents: Tensor, labels: Tensor | None, generator: AnyGenerator, ids: Tensor | None = None
    ) -> None:
        """Check the batch, and at the first draw that no other process draws the same."""
        check_batch(latents, labels, ids)
        if not isinstance(generator, torch.Generator | RowGenerators):
            raise UserError(
                f"generator {generator!r}: expected a torch.Generator, such as torch.Generator().manual_seed(0)"
            )
        if not self._has_drawn:
            self._has_drawn = True
            warn_if_drawn_alike(generator)


class FlowMatching(_Objective):
    """Conditional flow matching (`si`): the target is made of the one sample that made x_t (Lipman et al., 2023)."""

    bank: None = None

    @renamed(protocol="settings")
    def __init__(self, settings: ObjectiveSettings | None = None) -> None:
        self.settings = settings or ObjectiveSettings()

    @renamed(stream="generator")
    def draw(self, latents: Tensor, labels: Tensor, generator: AnyGenerator, *, ids: Tensor | None = None) -> Draw:
        """latents (B, *shape), labels (B,) int64; generator: where the times, noise and dropped labels come from.

        UserError for labels or ids of another shape or type.
        """
        check_labels(labels)
        self._begin(latents, labels, generator, ids)
        noisy = _perturb(self.settings, latents, generator)
        labels, _ = _drop_labels(self.settings, labels, generator)
        return _finish(self.settings, noisy, labels, _ids_or_none(ids, labels), None)


class StableTargetField(_Objective):
    """STF (Xu et al., 2023): the samples of one set are the references of those of them that are perturbed.

    The references of a labelled row are those of its class in the set; of a row without label, the whole set.
    references_from: below this time the target is plain flow matching's, and nothing is weighed.
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
        """references (n, *shape) with labels (n,), or None for data of one class; anchors: positions (B,) in the set
        that are perturbed (all if None).

        The anchors must be chosen independently of the references' values, or the target is biased. UserError for
        labels or ids of another shape or type.
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
        """The same for unlabelled anchors (B, *shape) of a set that comes in blocks, in the memory of one block.

        blocks: pairs of references (n, *shape) and keep (B, n), False where a reference is the row's own anchor, or
        None where the block holds no anchor.
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
    """StableVM (Yang et al., 2026): references from a bank of each class's recent samples.

    anchors: which sample makes x_t. "bank", as published: a class uniform over classes, then one of its entries;
    "batch": the fresh sample itself. Rows whose label was dropped have references from all classes, `pool_size` of them
    drawn anew each time. Their weights hold the prior probability that an entry is the anchor: its class's share among
    the anchors over its class's entries; without it the target is biased where classes differ (docs/theory.md).
    class_shares: (classes,), of the fresh samples' classes; where not given, those seen so far.
    references_from: below this time the target is plain flow matching's, and nothing is weighed; unbiased for every
    value, as the time is drawn independently of all else (docs/theory.md).
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
            raise UserError(f"a pool of {pool_size} references: expected at least 1")
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
        """Insert fresh latents (B, *shape) of classes labels (B,) int64 into the bank, then draw B to regress on.

        With the bank's anchors (the default) these are not the fresh samples: whatever else the network is given about
        a sample belongs to the rows `ids` of the draw. The draw is float32, and no gradient flows to the latents.
        UserError where the batch does not fit the bank. Values are looked at on a CPU only, a GPU would be waited for:
        there a label out of range ends in an assertion of the device, and what is not finite stays in the bank.

        ids: dataset rows of the latents, by which copies are recognised. slots: where the caller has inserted them
        already (with the other processes' ones). pool_generator: where the shared pool comes from, if not from
        `generator` (needed when that holds one generator for each row).
        """
        check_labels(labels)
        self._begin(latents, labels, generator, ids)
        self.bank.check(latents, labels, ids)
        if not latents.device == labels.device == self.bank.device:
            raise UserError(
                f"latents are on {latents.device}, labels on {labels.device}, the bank on {self.bank.device}: expected "
                "one device (the bank's is ClassBank(..., device=...))"
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
                raise ValueError("with one generator for each row the pool needs one of its own: give pool_generator")
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
        """Offsets `x0 - m` and effective sample sizes; labelled rows by class, the others against the pool."""
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
        """Blocks of references (n, *shape) over all classes, and of their log prior odds against each anchor (R, n)."""
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
        """Of each class among the anchors, up to a factor."""
        if self.anchors == "bank":
            return (self.bank.counts > 0).float()
        return self.bank.seen.float() if self.class_shares is None else self.class_shares


def draw_anchors(bank: ClassBank, rows: int, generator: AnyGenerator) -> tuple[Tensor, Tensor]:
    """Labels and flat slots (rows,) of the samples to perturb: the first numbers that `StableVM.draw` takes."""
    return bank.draw(rand((rows, 2), generator))


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error per sample: (B,), float32. UserError where the shapes differ: broadcasting hides mistakes."""
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
    """Offsets and effective sample sizes: those of `weigh(rows)` from that time on, 0 and 1 below, as without
    references. The rows are found on the host, so that no device is waited for.
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
    """The labels that the network sees, and which were dropped (on the host, where their number is needed)."""
    if settings.null_class is None:
        return labels, torch.zeros(len(labels), dtype=torch.bool)
    dropped = rand((len(labels),), generator) < settings.label_dropout
    return torch.where(to_device(dropped, labels.device), settings.null_class, labels), dropped


def _ids_or_none(ids: Tensor | None, labels: Tensor) -> Tensor:
    return torch.full_like(labels, NO_ID) if ids is None else ids.to(labels)


def _finish(
    settings: ObjectiveSettings, noisy: _Noisy, labels: Tensor, ids: Tensor, correction: tuple[Tensor, Tensor] | None
) -> Draw:
    """The target: CFM's, plus the correction that the references make where there are any (docs/theory.md)."""
    ess = torch.ones_like(noisy.t) if correction is None else correction[1]
    if settings.prediction == "x":
        target = noisy.x0 if correction is None else noisy.x0 - correction[0]
    else:
        target = settings.path.velocity(noisy.x0, noisy.noise, noisy.t)
        if correction is not None:
            target = target + settings.path.offset_gain(noisy.t, noisy.x0) * correction[0]
    return Draw(noisy.x_t, noisy.t, labels, target, noisy.x0, noisy.noise, ids, ess, noisy.host_t)


__getattr__ = old_names(__name__, Protocol="ObjectiveSettings")
