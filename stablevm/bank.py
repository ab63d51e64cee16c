"""The memory bank of StableVM: a preallocated ring buffer that holds the most recent samples of each class."""

import numbers
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stablevm.support.errors import UserError, arg
from stablevm.support.moved import renamed
from stablevm.support.rng import rand, to_device
from stablevm.support.shapes import described

NO_ID = -1


class ClassBank:
    """A first-in-first-out queue of at most `capacity` samples for each class (Yang et al., 2026: 256).

    Slots have flat numbers: slot s of class c is `c * capacity + s`. All storage is allocated at construction. The
    temporary memory of insertion and drawing grows with the batch, not with the bank (except one key per slot in
    `draw_pool`). Only the methods that save and load the state make the CPU wait for the GPU.
    """

    def __init__(
        self,
        num_classes: int,
        capacity: int,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocate an empty bank on `device`.

        num_classes, capacity: 1 or more. shape: the shape of one sample. dtype: the floating-point type of the storage;
        float16 halves the memory and rounds the references. UserError for anything else.
        """
        for name, count in (("num_classes", num_classes), ("capacity", capacity)):
            if not isinstance(count, numbers.Integral) or isinstance(count, bool) or count < 1:
                raise UserError(f"{arg(name)} {count!r}: expected a whole number, 1 or more")
        if not (_is_shape(shape) and isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise UserError(
                f"shape {shape!r}, dtype {dtype}: expected a shape such as (4, 32, 32) and a floating-point dtype"
            )
        self.num_classes, self.capacity, self.shape = num_classes, capacity, tuple(shape)
        slots = num_classes * capacity
        # Tensors made in inference mode could not be written to outside it.
        with torch.inference_mode(False):
            # The extra slot at the end receives the samples that no queue keeps, so that no shape depends on the data.
            self._data = torch.zeros(slots + 1, *shape, dtype=dtype, device=device)
            self._ids = torch.full((slots + 1,), NO_ID, dtype=torch.int64, device=device)
            self._heads = torch.zeros(num_classes, dtype=torch.int64, device=device)
            self.counts = torch.zeros_like(self._heads)  # filled slots per class, which are the class's first ones
            self.seen = torch.zeros_like(self._heads)  # samples ever inserted per class

    def __repr__(self) -> str:
        return (
            f"ClassBank({self.num_classes} classes of {self.capacity}, shape {self.shape}, {self._data.dtype} on "
            f"{self.device})"
        )

    @property
    def discarded_slot(self) -> int:
        """The flat slot that `insert` returns for a sample that was not kept."""
        return self.num_classes * self.capacity

    @property
    def entries(self) -> Tensor:
        """A view of all slots (classes, capacity, *shape) in the storage's dtype, empty ones too."""
        return self._data[:-1].view(self.num_classes, self.capacity, *self.shape)

    @property
    def ids(self) -> Tensor:
        """A view (classes, capacity) int64 of each entry's row in the data set, or NO_ID."""
        return self._ids[:-1].view(self.num_classes, self.capacity)

    @property
    def device(self) -> torch.device:
        """The device of the storage."""
        return self._data.device

    def insert(self, samples: Tensor, labels: Tensor, ids: Tensor | None = None) -> Tensor:
        """Insert samples (B, *shape) with labels (B,) int64 into their queues, in order; return their flat slots (B,).

        ids: (B,) int64, the samples' rows in the data set. A sample whose id is already in its queue is refreshed in
        place, so that a small class seen many times does not hold copies. If a class has more new samples than fit, the
        last ones are kept. The bank holds no gradients.

        UserError, with nothing inserted, for samples, labels or ids of another shape or type. Values on a CPU are
        checked too: labels must be in range, and samples finite and in the range of the storage's dtype. On a GPU the
        check would have to wait for it, so it is left out.
        """
        self.check(samples, labels, ids)
        self._check_values(samples, ids)
        labels = labels.to(self.device)
        ids = torch.full_like(labels, NO_ID) if ids is None else ids.to(self.device)
        known, known_slot = self._is_copy(labels, ids).max(dim=1)

        queue = torch.where(known, self.num_classes, labels)  # known samples queue nowhere
        added = torch.zeros(self.num_classes + 1, dtype=torch.int64, device=self.device)
        added.index_add_(0, queue, torch.ones_like(queue))
        rank = _rank_within(queue)
        stays = rank >= added[queue] - self.capacity
        slot = (self._heads[labels] + rank) % self.capacity
        overtaken = (known_slot - self._heads[labels]) % self.capacity < added[labels]

        local = torch.where(known, known_slot, slot)
        stays = torch.where(known, ~overtaken, stays)
        target = torch.where(stays, labels * self.capacity + local, self.discarded_slot)
        # If a known sample occurs twice in the batch, only the last one is written: a GPU writes in no fixed order.
        again = torch.triu(target[:, None] == target, diagonal=1).any(dim=1)
        target.masked_fill_(again, self.discarded_slot)
        self._data.index_copy_(0, target, samples.detach().to(self._data))
        self._ids.index_copy_(0, target, ids)
        self._heads.add_(added[:-1]).remainder_(self.capacity)
        self.counts.add_(added[:-1]).clamp_(max=self.capacity)
        self.seen.index_add_(0, labels, torch.ones_like(labels))
        return target

    def check(self, samples: Tensor, labels: Tensor, ids: Tensor | None = None) -> None:
        """Raise UserError unless the bank can hold samples (B, *shape) with labels (B,) and ids (B,), if given.

        The range of labels on a GPU is not checked.
        """
        check_labels(labels)
        check_batch(samples, labels, ids)
        if samples.shape[1:] != self.shape:
            raise UserError(f"latents are {tuple(samples.shape)}: this bank holds samples of shape {self.shape}")
        if labels.device.type == "cpu" and not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise UserError(
                f"labels range from {labels.min()} to {labels.max()}: this bank has classes 0 to {self.num_classes - 1}"
            )

    def _check_values(self, samples: Tensor, ids: Tensor | None) -> None:
        """Raise UserError for values that would spoil targets while they stay in the bank; skipped on a GPU."""
        if samples.device.type != "cpu" or not samples.numel():
            return
        limit = torch.finfo(self._data.dtype).max
        if all(-limit <= end <= limit for end in samples.detach().aminmax()):  # one pass; NaN becomes both ends
            return
        stored = samples.detach().flatten(1).to(self._data.dtype).isfinite().all(dim=1)
        if stored.all():
            return
        row = int(stored.int().argmin())
        held = "values beyond the range of the bank's " + str(self._data.dtype)
        if not samples[row].isfinite().all():
            held = "NaN or infinity"
        name = "" if ids is None else f" (id {int(ids[row])})"
        raise UserError(f"latents hold {held}, first in row {row} of the batch{name}: they would stay in the bank")

    def gather(self, slots: Tensor) -> Tensor:
        """The samples (B, *shape) at flat slots (B,), in the storage's dtype."""
        return self._data[slots]

    def ids_at(self, slots: Tensor) -> Tensor:
        """The data-set rows (B,) int64 of the samples at flat slots (B,), NO_ID where unknown."""
        return self._ids[slots]

    def draw(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Pick entries by uniforms (B, 2) in [0, 1): their labels (B,) and flat slots (B,).

        The class is uniform over the classes that have an entry, and the entry is uniform over that class's entries.
        """
        uniforms = to_device(uniforms, self.device)
        upper = (self.counts > 0).cumsum(0)
        picked = (uniforms[:, 0] * upper[-1]).floor()
        labels = torch.searchsorted(upper, picked.to(upper.dtype), right=True)
        local = (uniforms[:, 1] * self.counts[labels]).long()
        return labels, labels * self.capacity + local

    @renamed(stream="generator")
    def draw_pool(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw `size` entries of all classes, or all slots if there are fewer: flat slots (n,), and a mask (n,) that is
        False where a slot is empty.

        Every entry is equally likely, and none is drawn twice. How much a class counts is left to the weights.
        generator: the source of random numbers, on the CPU or the bank's device.
        """
        empty = torch.arange(self.capacity, device=self.device) >= self.counts[:, None]
        keys = rand(empty.shape, generator, self.device)
        best = keys.masked_fill_(empty, -1.0).flatten().topk(min(size, empty.numel()))
        return best.indices, best.values >= 0

    def is_reference(self, labels: Tensor, slots: Tensor, ids: Tensor) -> Tensor:
        """A mask (B, capacity) of the references of each row: filled entries of its class, except the anchor and copies
        of it. labels, slots, ids: (B,), of the anchors.
        """
        local = torch.arange(self.capacity, device=self.device)
        filled = local < self.counts[labels, None]
        itself = labels[:, None] * self.capacity + local == slots[:, None]
        return filled & ~itself & ~self._is_copy(labels, ids)

    def _is_copy(self, labels: Tensor, ids: Tensor) -> Tensor:
        """A mask (B, capacity) of the entries of each row's class that have the row's id (B,); none for NO_ID."""
        return (self.ids[labels] == ids[:, None]) & (ids != NO_ID)[:, None]

    def replica(self) -> "ClassBank":
        """A copy on the CPU without the samples' values.

        Given the same labels and ids (and values of shape (0,)), it returns the same slots and draws the same entries.
        """
        copy = ClassBank(self.num_classes, self.capacity, (0,))
        for mine, theirs in zip(self._indices(), copy._indices(), strict=True):
            theirs.copy_(mine)
        return copy

    def _indices(self) -> tuple[Tensor, ...]:
        return self.ids, self._heads, self.counts, self.seen

    def state_dict(self) -> dict[str, Tensor]:
        """An exact copy of all that the bank holds; only tensors, so that safetensors can store it."""
        return {name: tensor.clone() for name, tensor in self._state().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state of a bank with the same number of classes, capacity, shape and dtype.

        UserError, with nothing restored, for the state of another bank, and for a state that lacks tensors or
        contradicts itself.
        """
        own = self._state()
        _check_state(state, own, self.capacity)
        for name, mine in own.items():
            mine.copy_(state[name])

    def _state(self) -> dict[str, Tensor]:
        indices = dict(zip(("ids", "heads", "counts", "seen"), self._indices(), strict=True))
        return {"entries": self.entries, **indices}


def _is_shape(shape: Sequence[int]) -> bool:
    if not isinstance(shape, Sequence):
        return False
    return all(isinstance(side, numbers.Integral) and not isinstance(side, bool) and side >= 0 for side in shape)


def check_labels(labels: Tensor | None) -> None:
    """Raise UserError for None, which only a set of references allows."""
    if labels is None:
        raise UserError(
            "labels are None: for data without classes give zeros, torch.int64 (B,), and make the bank with one class"
        )


def check_batch(latents: Tensor, labels: Tensor | None, ids: Tensor | None = None) -> None:
    """Raise UserError unless shapes and types are those of a batch; both are known without waiting for a GPU."""
    for name, values in (("latents", latents), ("labels", labels), ("ids", ids)):
        if values is not None and not isinstance(values, Tensor):
            raise UserError(f"{name} are a {type(values).__name__}: expected a tensor")
    if not latents.is_floating_point() or latents.ndim == 0 or not len(latents):
        raise UserError(f"latents are {described(latents)}: expected floating-point numbers, one sample or more")
    for name, values, remedy in (
        (
            "labels",
            labels,
            "; give class indices (labels.argmax(1) if they are one-hot), or zeros for data without classes",
        ),
        ("ids", ids, "; give the samples' rows in the data set"),
    ):
        if values is not None and (values.dtype != torch.int64 or values.shape != latents.shape[:1]):
            raise UserError(f"{name} are {described(values)}: expected torch.int64 ({len(latents)},){remedy}")


def check_positions(name: str, values: Tensor, rows: int | None, bound: int) -> None:
    """Raise UserError unless these are `rows` positions (any number if None) below `bound`; values on a GPU are not
    checked.
    """
    if not isinstance(values, Tensor):
        raise UserError(f"{name} are a {type(values).__name__}: expected a tensor")
    if values.dtype != torch.int64 or values.ndim != 1 or not len(values) or rows not in (None, len(values)):
        raise UserError(f"{name} are {described(values)}: expected torch.int64 ({'B' if rows is None else rows},)")
    if values.device.type == "cpu" and not 0 <= values.min() <= values.max() < bound:
        raise UserError(f"{name} range from {values.min()} to {values.max()}: expected 0 to {bound - 1}")


def check_shares(shares: Tensor, classes: int) -> None:
    """Raise UserError unless these are shares of `classes` classes."""
    if shares.shape != (classes,):
        raise UserError(f"class_shares are {tuple(shares.shape)}: expected ({classes},), one per class")
    if not (shares.isfinite() & (shares >= 0)).all():
        raise UserError(f"class_shares {shares.tolist()}: expected finite numbers, 0 or more")


def _check_state(state: Mapping[str, Tensor], own: Mapping[str, Tensor], capacity: int) -> None:
    """Raise UserError unless a bank with the state `own` can load `state`."""
    damaged = "the saved bank is damaged: "
    if not isinstance(state, Mapping):
        raise UserError(f"{damaged}it is a {type(state).__name__}, expected a mapping, as state_dict returns it")
    missing = [name for name in own if not isinstance(state.get(name), Tensor)]
    unknown = [name for name in state if name not in own]
    if missing or unknown:
        held = ", ".join([f"no tensor {name}" for name in missing] + [f"an unknown {name!r}" for name in unknown])
        raise UserError(f"{damaged}it holds {held}; expected {', '.join(own)}")
    for name, mine in own.items():
        given = state[name]
        if given.shape != mine.shape or given.dtype != mine.dtype:
            which = "" if name == "entries" else f" ({name})"
            raise UserError(
                f"the saved bank is {tuple(given.shape)} {given.dtype}{which}, this run's is {tuple(mine.shape)} "
                f"{mine.dtype}: resume with the bank options of the checkpoint"
            )
    heads, counts, seen = state["heads"], state["counts"], state["seen"]
    for name, wrong, expected in (
        ("counts", (counts < 0) | (counts > capacity), f"0 to {capacity}"),
        ("heads", (heads < 0) | (heads >= capacity), f"0 to {capacity - 1}"),
        ("heads", (counts < capacity) & (heads != counts), "the number of entries where a class is not full"),
        ("seen", seen < counts, "at least the number of entries"),
    ):
        if wrong.any():
            label = int(wrong.int().argmax())
            raise UserError(f"{damaged}{name} of class {label} is {int(state[name][label])}, expected {expected}")
    for label, entries in enumerate(state["entries"]):  # class by class, in little memory
        if not entries.isfinite().all():
            raise UserError(f"{damaged}class {label} holds NaN or infinity, which would end up in targets")


def _rank_within(keys: Tensor) -> Tensor:
    """For each key, the number of equal keys before it."""
    order = keys.argsort(stable=True)
    grouped = keys[order]
    position = torch.arange(keys.numel(), device=keys.device)
    rank = torch.empty_like(keys)
    rank[order] = position - torch.searchsorted(grouped, grouped)
    return rank
