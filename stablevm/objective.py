"""Training objectives, CFM, STF and StableVM: from a batch of data to noisy samples with regression targets.

An objective knows neither the network nor the trainer, so it fits into any training loop:

    objective = StableVM(ClassBank(num_classes=10, capacity=256, shape=(4, 32, 32)))
    draw = objective.draw(latents, labels, generator)
    loss = squared_error(model(draw.x_t, draw.t, draw.labels), draw.target).mean()
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from stablevm.bank import NO_ID, ClassBank, check_batch, check_labels, check_positions, check_shares
from stablevm.choices import Anchors
from stablevm.draw import Draw, Noisy, ObjectiveSettings, drop_labels, known_ids, perturb, with_target
from stablevm.posterior import Posterior, posterior, posterior_over_blocks
from stablevm.support.errors import UserError
from stablevm.support.moved import old_names, renamed
from stablevm.support.ranges import AT_LEAST_1, TIME, check_word
from stablevm.support.rng import AnyGenerator, RowGenerators, rand, to_device, warn_if_drawn_alike

# References drawn from all classes for the samples whose label was dropped, as many as in the published toy study.
POOL_SIZE = 2048
# Values of these references gathered at once on a CPU, where a large new tensor takes longer to map than to fill.
GATHERED_VALUES_CPU = 2**20


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

    It is made from the one sample x0 that made x_t, without references. settings: `ObjectiveSettings()` by default.
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
        noisy = perturb(self.settings, latents, generator)
        labels, _ = drop_labels(self.settings, labels, generator)
        return with_target(self.settings, noisy, labels, known_ids(ids, labels), None)


class StableTargetField(_Objective):
    """Stable Target Field (STF; Xu et al., 2023): samples of a set are perturbed, with the set as their references.

    The target averages the conditional velocity over the references, weighted by how likely each made x_t. A row with
    a label has the set's samples of its class as references, a row without one the whole set. settings:
    `ObjectiveSettings()` by default. references_from: the time in [0, 1] below which the target is that of plain flow
    matching.
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
        noisy = perturb(self.settings, references[chosen], generator)
        keep = None
        if labels is None:
            own_labels = torch.zeros_like(chosen)
        else:
            own_labels, dropped = drop_labels(self.settings, labels[chosen], generator)
            keep = (labels[chosen, None] == labels) | to_device(dropped, device)[:, None]
            keep[torch.arange(len(chosen), device=device), chosen] = False

        def weigh(rows: Tensor | slice) -> Posterior:
            mask = {"omit": chosen[rows]} if keep is None else {"keep": keep[rows]}
            return posterior(self.settings.path, *noisy.part(rows), references, **mask)

        own_ids = known_ids(None if ids is None else ids[chosen], own_labels)
        return with_target(self.settings, noisy, own_labels, own_ids, _weigh_from(self.references_from, noisy, weigh))

    @renamed(stream="generator")
    def draw_over_blocks(
        self, anchors: Tensor, blocks: Iterable[tuple[Tensor, Tensor | None]], generator: AnyGenerator
    ) -> Draw:
        """Like `draw`, for anchors (B, *shape) without labels and a set read in blocks, one in memory at a time.

        blocks: pairs of references (n, *shape) and the position in them of each row's own anchor, (B,) int64, outside
        0 to n - 1 where it lies in another block; or, in place of the positions, a mask (B, n), False at the anchor; or
        None where the block holds no anchor. generator: the source of times and noise.
        """
        self._begin(anchors, None, generator)
        noisy = perturb(self.settings, anchors, generator)
        labels = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)

        def weigh(rows: Tensor | slice) -> Posterior:
            parts = ((block, None if keep is None else keep[rows]) for block, keep in blocks)
            return posterior_over_blocks(self.settings.path, *noisy.part(rows), parts)

        corrections = _weigh_from(self.references_from, noisy, weigh)
        return with_target(self.settings, noisy, labels, known_ids(None, labels), corrections)


class StableVM(_Objective):
    """StableVM (Yang et al., 2026): the references of a sample are a bank's recent samples of its class.

    The target averages the conditional velocity over the references, weighted by how likely each made x_t.

    settings: `ObjectiveSettings()` by default.
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
        check_word("anchors", anchors, Anchors)
        AT_LEAST_1.check("pool_size", pool_size)
        if class_shares is not None:
            check_shares(class_shares, bank.num_classes)
        self.bank, self.anchors, self.pool_size = bank, anchors, pool_size
        self.class_shares = None if class_shares is None else class_shares.to(bank.device, torch.float32)
        self.references_from = _time(references_from)
        self._had_ids = False
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
        self._tell_of_missing_ids(ids)
        latents = latents.detach().float()
        if slots is None:
            slots = self.bank.insert(latents, labels, ids)
        else:
            check_positions("slots", slots, len(latents), self.bank.discarded_slot + 1)
        ids = known_ids(ids, labels)
        if self.anchors == "bank":
            labels, slots = draw_anchors(self.bank, latents.shape[0], generator)
            latents, ids = self.bank.gather(slots).to(latents), self.bank.ids_at(slots)
        noisy = perturb(self.settings, latents, generator)
        shown, dropped = drop_labels(self.settings, labels, generator)
        if pool_generator is None:
            if not isinstance(generator, torch.Generator):
                raise ValueError("generator is a RowGenerators, which can't draw the shared pool: give pool_generator")
            pool_generator = generator
        corrections = self._weigh(noisy, labels, slots, ids, dropped, pool_generator)
        return with_target(self.settings, noisy, shown, ids, corrections)

    def _tell_of_missing_ids(self, ids: Tensor | None) -> None:
        """Warn, once, of a draw without ids after one with ids."""
        if ids is not None:
            self._had_ids = True
        elif self._had_ids:
            self._had_ids = False
            warnings.warn(
                "this draw is given no ids, earlier ones were: copies of its samples in the bank are not recognised, "
                f"which biases the target, and draw.ids holds {NO_ID} for them",
                stacklevel=4,  # past the decorator of `draw`
            )

    def _weigh(
        self,
        noisy: Noisy,
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


def _time(references_from: float) -> float:
    TIME.check("references_from", references_from)
    return references_from


def _weigh_from(
    references_from: float, noisy: Noisy, weigh: Callable[[Tensor | slice], Posterior]
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


__getattr__ = old_names(__name__, Protocol="ObjectiveSettings")
