"""What the network is trained on: noisy samples, times, labels and targets, for CFM, STF and StableVM.

Model-free: a draw knows neither the network nor the trainer, so it fits into any training loop:

    objective = StableVM(ClassBank(num_classes=10, capacity=256, shape=(4, 32, 32)))
    draw = objective.draw(latents, labels, stream)
    loss = squared_error(model(draw.x_t, draw.t, draw.labels), draw.target).mean()
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from stablevm.bank import NO_ID, ClassBank
from stablevm.errors import UserError
from stablevm.interpolant import LINEAR, Interpolant
from stablevm.posterior import posterior, posterior_over_blocks
from stablevm.rng import AnyGenerator, RowGenerators, rand, randn, to_device
from stablevm.schedules import TimeName, draw_times
from stablevm.shapes import ShownByShape, described

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
class Protocol:
    """What all objectives share.

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
            raise UserError(f"--prediction {self.prediction}: expected v or x")
        if not isinstance(self.path, Interpolant):
            raise UserError(f"path {self.path!r}: expected an Interpolant, such as stablevm.LINEAR or stablevm.COSINE")
        if self.weighting not in get_args(TimeName):
            raise UserError(f"--weighting {self.weighting}: expected one of {', '.join(get_args(TimeName))}")
        if not 0 <= self.label_dropout <= 1:
            raise UserError(f"--cfg-prob {self.label_dropout}: expected a chance in [0, 1]")
        if self.label_dropout and self.null_class is None:
            raise UserError(f"a label dropout of {self.label_dropout} needs a null class to drop labels to")


class FlowMatching:
    """Conditional flow matching (`si`): the target is made of the one sample that made x_t (Lipman et al., 2023)."""

    def __init__(self, protocol: Protocol | None = None) -> None:
        self.protocol = protocol or Protocol()

    def __repr__(self) -> str:
        return f"FlowMatching({self.protocol})"

    def draw(self, latents: Tensor, labels: Tensor, stream: AnyGenerator, *, ids: Tensor | None = None) -> Draw:
        """latents (B, *shape), labels (B,) int64; stream: where the times, noise and dropped labels come from.

        UserError for labels or ids of another shape or type.
        """
        _check_batch(latents, labels, stream, ids)
        noisy = _perturb(self.protocol, latents, stream)
        labels, _ = _drop_labels(self.protocol, labels, stream)
        return _finish(self.protocol, noisy, labels, _ids_or_none(ids, labels), None)


class StableTargetField:
    """STF (Xu et al., 2023): the samples of one set are the references of those of them that are perturbed.

    The references of a labelled row are those of its class in the set; of a row without label, the whole set.
    """

    def __init__(self, protocol: Protocol | None = None) -> None:
        self.protocol = protocol or Protocol()

    def draw(
        self,
        references: Tensor,
        labels: Tensor | None,
        stream: AnyGenerator,
        *,
        anchors: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> Draw:
        """references (n, *shape) with labels (n,), or None for data of one class; anchors: positions (B,) in the set
        that are perturbed (all if None).

        The anchors must be chosen independently of the references' values, or the target is biased. UserError for
        labels or ids of another shape or type.
        """
        _check_batch(references, labels, stream, ids, unlabelled=True)
        count, device = references.shape[0], references.device
        chosen = torch.arange(count, device=device) if anchors is None else anchors
        noisy = _perturb(self.protocol, references[chosen], stream)
        if labels is None:
            own_labels = torch.zeros_like(chosen)
            keep = torch.ones(len(chosen), count, dtype=torch.bool, device=device)
        else:
            own_labels, dropped = _drop_labels(self.protocol, labels[chosen], stream)
            keep = (labels[chosen, None] == labels) | to_device(dropped, device)[:, None]
        keep[torch.arange(len(chosen), device=device), chosen] = False
        found = posterior(self.protocol.path, noisy.x0, noisy.noise, noisy.t, references, keep=keep)
        own_ids = _ids_or_none(None if ids is None else ids[chosen], own_labels)
        return _finish(self.protocol, noisy, own_labels, own_ids, (found.offset, found.ess))

    def draw_over_blocks(
        self, anchors: Tensor, blocks: Iterable[tuple[Tensor, Tensor | None]], stream: AnyGenerator
    ) -> Draw:
        """The same for unlabelled anchors (B, *shape) of a set that comes in blocks, in the memory of one block.

        blocks: pairs of references (n, *shape) and keep (B, n), False where a reference is the row's own anchor, or
        None where the block holds no anchor.
        """
        noisy = _perturb(self.protocol, anchors, stream)
        labels = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
        found = posterior_over_blocks(self.protocol.path, noisy.x0, noisy.noise, noisy.t, blocks)
        return _finish(self.protocol, noisy, labels, _ids_or_none(None, labels), (found.offset, found.ess))


class StableVM:
    """StableVM (Yang et al., 2026): references from a bank of each class's recent samples.

    anchors: which sample makes x_t. "bank", as published: a class uniform over classes, then one of its entries;
    "batch": the fresh sample itself. Rows whose label was dropped have references from all classes, `pool_size` of them
    drawn anew each time. Their weights hold the prior probability that an entry is the anchor: its class's share among
    the anchors over its class's entries; without it the target is biased where classes differ (docs/theory.md).
    class_shares: (classes,), of the fresh samples' classes; where not given, those seen so far.
    """

    def __init__(
        self,
        bank: ClassBank,
        protocol: Protocol | None = None,
        *,
        anchors: Anchors = "bank",
        pool_size: int = POOL_SIZE,
        class_shares: Tensor | None = None,
    ) -> None:
        if anchors not in ("bank", "batch"):
            raise UserError(f"--bank-anchors {anchors}: expected bank or batch")
        if pool_size < 1:
            raise UserError(f"a pool of {pool_size} references: expected at least 1")
        if class_shares is not None and class_shares.shape != (bank.num_classes,):
            raise UserError(
                f"class_shares are {tuple(class_shares.shape)}: expected ({bank.num_classes},), one per class"
            )
        self.bank, self.anchors, self.pool_size = bank, anchors, pool_size
        self.class_shares = None if class_shares is None else class_shares.to(bank.device, torch.float32)
        self.protocol = protocol or Protocol()
        if self.protocol.null_class in range(bank.num_classes):
            raise UserError(
                f"null class {self.protocol.null_class} is one of the bank's classes, 0 to {bank.num_classes - 1}: "
                f"give {bank.num_classes}"
            )

    def draw(
        self,
        latents: Tensor,
        labels: Tensor,
        stream: AnyGenerator,
        *,
        ids: Tensor | None = None,
        slots: Tensor | None = None,
        pool_stream: torch.Generator | None = None,
    ) -> Draw:
        """Insert fresh latents (B, *shape) of classes labels (B,) int64 into the bank, then draw B to regress on.

        With the bank's anchors (the default) these are not the fresh samples: whatever else the network is given about
        a sample belongs to the rows `ids` of the draw. The draw is float32, and no gradient flows to the latents.
        UserError where the batch does not fit the bank. Values are looked at on a CPU only, a GPU would be waited for:
        there a label out of range ends in an assertion of the device, and what is not finite stays in the bank.

        ids: dataset rows of the latents, by which copies are recognised. slots: where the caller has inserted them
        already (with the other processes' ones). pool_stream: where the shared pool comes from, if not from `stream`
        (needed when that holds one stream per row).
        """
        _check_batch(latents, labels, stream, ids)
        _check_against_bank(self.bank, latents, labels)
        latents, ids = latents.detach().float(), _ids_or_none(ids, labels)
        if slots is None:
            _check_finite(latents)
            slots = self.bank.insert(latents, labels, ids)
        if self.anchors == "bank":
            labels, slots = draw_anchors(self.bank, latents.shape[0], stream)
            latents, ids = self.bank.gather(slots).to(latents), self.bank.ids_at(slots)
        noisy = _perturb(self.protocol, latents, stream)
        shown, dropped = _drop_labels(self.protocol, labels, stream)
        if pool_stream is None:
            if not isinstance(stream, torch.Generator):
                raise ValueError("with one stream per row the pool needs a stream of its own: give pool_stream")
            pool_stream = stream
        corrections = self._weigh(noisy, labels, slots, ids, dropped, pool_stream)
        return _finish(self.protocol, noisy, shown, ids, corrections)

    def _weigh(
        self,
        noisy: "_Noisy",
        labels: Tensor,
        slots: Tensor,
        ids: Tensor,
        dropped: Tensor,
        pool_stream: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Offsets `x0 - m` and effective sample sizes; labelled rows by class, the others against the pool."""
        offset, ess = torch.empty_like(noisy.x0), torch.empty_like(noisy.t)
        for is_pool, rows in ((False, (~dropped).nonzero()), (True, dropped.nonzero())):
            if not len(rows):
                continue
            rows = to_device(rows.squeeze(1), noisy.x0.device)
            path, x0, noise, t = self.protocol.path, noisy.x0[rows], noisy.noise[rows], noisy.t[rows]
            if is_pool:
                pool = self._pool(labels[rows], slots[rows], ids[rows], pool_stream)
                found = posterior_over_blocks(path, x0, noise, t, pool)
            else:
                keep = self.bank.is_reference(labels[rows], slots[rows], ids[rows])
                found = posterior(path, x0, noise, t, self.bank.entries, groups=labels[rows], keep=keep)
            offset[rows], ess[rows] = found.offset, found.ess
        return offset, ess

    def _pool(
        self, labels: Tensor, slots: Tensor, ids: Tensor, stream: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of references (n, *shape) over all classes, and of their log prior odds against each anchor (R, n)."""
        picked, filled = self.bank.draw_pool(self.pool_size, stream)
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


def draw_anchors(bank: ClassBank, rows: int, stream: AnyGenerator) -> tuple[Tensor, Tensor]:
    """Labels and flat slots (rows,) of the samples to perturb: the first numbers that `StableVM.draw` takes from its
    stream, so that they can be known ahead of it.
    """
    return bank.draw(rand((rows, 2), stream))


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


def _perturb(protocol: Protocol, latents: Tensor, stream: AnyGenerator) -> _Noisy:
    device = latents.device
    host_t = draw_times(protocol.weighting, protocol.path, latents.shape[0], stream)
    t = to_device(host_t, device)
    noise = randn(latents.shape, stream, device)
    return _Noisy(latents, noise, t, protocol.path.interpolate(latents, noise, t), host_t)


def _check_batch(
    latents: Tensor, labels: Tensor | None, stream: AnyGenerator, ids: Tensor | None, *, unlabelled: bool = False
) -> None:
    """UserError unless these are a batch: shapes and types, which a GPU tells without being waited for."""
    for name, values in (("latents", latents), ("labels", labels), ("ids", ids)):
        if values is not None and not isinstance(values, Tensor):
            raise UserError(f"{name} are a {type(values).__name__}: expected a tensor")
    if labels is None and not unlabelled:
        raise UserError(
            "labels are None: for data without classes give zeros, torch.int64 (B,), and the bank one class"
        )
    if not latents.is_floating_point() or not len(latents):
        raise UserError(f"latents are {described(latents)}: expected floating point numbers, one sample or more")
    for name, values, remedy in (
        (
            "labels",
            labels,
            "; give class indices (of one-hot labels, labels.argmax(1)), or zeros for data without classes",
        ),
        ("ids", ids, "; give rows of the data set"),
    ):
        if values is not None and (values.dtype != torch.int64 or values.shape != latents.shape[:1]):
            raise UserError(f"{name} are {described(values)}: expected torch.int64 ({len(latents)},){remedy}")
    if not isinstance(stream, torch.Generator | RowGenerators):
        raise UserError(f"stream {stream!r}: expected a torch.Generator, such as torch.Generator().manual_seed(0)")


def _check_against_bank(bank: ClassBank, latents: Tensor, labels: Tensor) -> None:
    """UserError unless the bank can hold the batch; where labels are on a GPU their range is not looked at."""
    if latents.shape[1:] != bank.shape:
        raise UserError(f"latents are {tuple(latents.shape)}: this bank holds samples of shape {bank.shape}")
    if not latents.device == labels.device == bank.device:
        raise UserError(
            f"latents are on {latents.device}, labels on {labels.device}, the bank on {bank.device}: expected one "
            "device (the bank's is ClassBank(..., device=...))"
        )
    if labels.device.type == "cpu" and not 0 <= labels.min() <= labels.max() < bank.num_classes:
        raise UserError(
            f"labels reach from {labels.min()} to {labels.max()}: this bank has classes 0 to {bank.num_classes - 1}"
        )


def _check_finite(latents: Tensor) -> None:
    """UserError for what would spoil targets for as long as it stays in the bank; on a GPU it is not looked at."""
    if latents.device.type == "cpu" and not (finite := latents.flatten(1).isfinite().all(dim=1)).all():
        row = int(finite.int().argmin())
        raise UserError(f"latents hold NaN or infinity, first in row {row} of the batch: they would stay in the bank")


def _drop_labels(protocol: Protocol, labels: Tensor, stream: AnyGenerator) -> tuple[Tensor, Tensor]:
    """The labels that the network sees, and which were dropped (on the host, where their number is needed)."""
    if protocol.null_class is None:
        return labels, torch.zeros(len(labels), dtype=torch.bool)
    dropped = rand((len(labels),), stream) < protocol.label_dropout
    return torch.where(to_device(dropped, labels.device), protocol.null_class, labels), dropped


def _ids_or_none(ids: Tensor | None, labels: Tensor) -> Tensor:
    return torch.full_like(labels, NO_ID) if ids is None else ids.to(labels)


def _finish(
    protocol: Protocol, noisy: _Noisy, labels: Tensor, ids: Tensor, correction: tuple[Tensor, Tensor] | None
) -> Draw:
    """The target: CFM's, plus the correction that the references make where there are any (docs/theory.md)."""
    ess = torch.ones_like(noisy.t) if correction is None else correction[1]
    if protocol.prediction == "x":
        target = noisy.x0 if correction is None else noisy.x0 - correction[0]
    else:
        target = protocol.path.velocity(noisy.x0, noisy.noise, noisy.t)
        if correction is not None:
            target = target + protocol.path.offset_gain(noisy.t, noisy.x0) * correction[0]
    return Draw(noisy.x_t, noisy.t, labels, target, noisy.x0, noisy.noise, ids, ess, noisy.host_t)
