"""The memory bank of StableVM: for each class, the most recent samples, as one preallocated ring."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stablevm.errors import UserError
from stablevm.rng import rand, to_device

NO_ID = -1


class ClassBank:
    """A first-in-first-out queue of at most `capacity` samples per class (Yang et al., 2026: 256).

    Slots are numbered flat: slot s of class c is `c * capacity + s`. No storage is allocated after construction, what
    insertion and drawing hold meanwhile grows with the batch, not with the bank (but for the pool's key per slot), and
    no method but the state's makes the host wait for the device.
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
        """shape: of one sample. dtype: of storage; float16 halves the memory and rounds the references."""
        for name, count in (("classes", num_classes), ("a capacity", capacity)):
            if not isinstance(count, int) or count < 1:
                raise UserError(f"a bank of {count!r} as {name}: expected a whole number, 1 or more")
        if not isinstance(shape, Sequence) or not dtype.is_floating_point:
            raise UserError(
                f"a bank of {dtype} {shape!r}: expected a shape such as (4, 32, 32) of floating point numbers"
            )
        self.num_classes, self.capacity, self.shape = num_classes, capacity, tuple(shape)
        slots = num_classes * capacity
        # One slot beyond the last takes the writes that no queue keeps: no shape then depends on the data.
        self._data = torch.zeros(slots + 1, *shape, dtype=dtype, device=device)
        self._ids = torch.full((slots + 1,), NO_ID, dtype=torch.int64, device=device)
        self._heads = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self.counts = torch.zeros_like(self._heads)  # filled slots per class; they are the first ones of each class
        self.seen = torch.zeros_like(self._heads)  # samples ever inserted per class

    def __repr__(self) -> str:
        return (
            f"ClassBank({self.num_classes} classes of {self.capacity}, shape {self.shape}, {self._data.dtype} on "
            f"{self.device})"
        )

    @property
    def discarded_slot(self) -> int:
        """The flat slot that `insert` reports for a sample that did not stay."""
        return self.num_classes * self.capacity

    @property
    def entries(self) -> Tensor:
        """(classes, capacity, *shape), a view."""
        return self._data[:-1].view(self.num_classes, self.capacity, *self.shape)

    @property
    def ids(self) -> Tensor:
        """(classes, capacity) int64, a view: the dataset row of each entry, or NO_ID."""
        return self._ids[:-1].view(self.num_classes, self.capacity)

    @property
    def device(self) -> torch.device:
        return self._data.device

    def insert(self, samples: Tensor, labels: Tensor, ids: Tensor | None = None) -> Tensor:
        """Put samples (B, *shape) of classes `labels` (B,) into their queues, in order; returns their flat slots (B,).

        A sample whose id is in its queue already is refreshed where it stands, so that a small class seen many times
        does not hold copies. Of more new samples of a class than fit, the last ones stay.
        """
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
        # A known sample that comes twice at once: the last one stays, as a GPU writes to one place in any order.
        again = torch.triu(target[:, None] == target, diagonal=1).any(dim=1)
        target.masked_fill_(again, self.discarded_slot)
        self._data.index_copy_(0, target, samples.to(self._data))
        self._ids.index_copy_(0, target, ids)
        self._heads.add_(added[:-1]).remainder_(self.capacity)
        self.counts.add_(added[:-1]).clamp_(max=self.capacity)
        self.seen.index_add_(0, labels, torch.ones_like(labels))
        return target

    def gather(self, slots: Tensor) -> Tensor:
        """Samples (B, *shape) at flat slots, in the storage's dtype."""
        return self._data[slots]

    def ids_at(self, slots: Tensor) -> Tensor:
        return self._ids[slots]

    def draw(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Labels and flat slots (B,) from uniforms (B, 2) in [0, 1): a class uniform over those with an entry, then an
        entry uniform over that class's.
        """
        uniforms = to_device(uniforms, self.device)
        upper = (self.counts > 0).cumsum(0)
        picked = (uniforms[:, 0] * upper[-1]).floor()
        labels = torch.searchsorted(upper, picked.to(upper.dtype), right=True)
        local = (uniforms[:, 1] * self.counts[labels]).long()
        return labels, labels * self.capacity + local

    def draw_pool(self, size: int, stream: torch.Generator) -> tuple[Tensor, Tensor]:
        """Flat slots (n,) of min(size, slots) entries over all classes, and a mask (n,) of those that are filled.

        Without replacement, every entry alike: how much a class counts is for the weights to say.
        """
        empty = torch.arange(self.capacity, device=self.device) >= self.counts[:, None]
        keys = rand(empty.shape, stream, self.device)
        best = keys.masked_fill_(empty, -1.0).flatten().topk(min(size, empty.numel()))
        return best.indices, best.values >= 0

    def is_reference(self, labels: Tensor, slots: Tensor, ids: Tensor) -> Tensor:
        """(B, capacity) bool: filled entries of each row's class that are not the row's anchor nor a copy of it."""
        local = torch.arange(self.capacity, device=self.device)
        filled = local < self.counts[labels, None]
        itself = labels[:, None] * self.capacity + local == slots[:, None]
        return filled & ~itself & ~self._is_copy(labels, ids)

    def _is_copy(self, labels: Tensor, ids: Tensor) -> Tensor:
        """(B, capacity) bool: entries of each row's class that are the sample `ids` (B,); NO_ID names none."""
        return (self.ids[labels] == ids[:, None]) & (ids != NO_ID)[:, None]

    def replica(self) -> "ClassBank":
        """A bank on the CPU that keeps the same books and holds no values: given the same samples' labels and ids (and
        values of shape (0,)), it reports the same slots and draws the same entries.
        """
        books = ClassBank(self.num_classes, self.capacity, (0,))
        for mine, theirs in zip(self._books(), books._books(), strict=True):
            theirs.copy_(mine)
        return books

    def _books(self) -> tuple[Tensor, ...]:
        return self.ids, self._heads, self.counts, self.seen

    def state_dict(self) -> dict[str, Tensor]:
        """All that the bank holds, exactly; tensors only, so that safetensors can store it."""
        return {
            "entries": self.entries.clone(),
            "ids": self.ids.clone(),
            "heads": self._heads.clone(),
            "counts": self.counts.clone(),
            "seen": self.seen.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a state of a bank of the same classes, capacity, shape and dtype; UserError otherwise."""
        given, own = state["entries"], self.entries
        if given.shape != own.shape or given.dtype != own.dtype:
            raise UserError(
                f"the saved bank is {tuple(given.shape)} {given.dtype}, this run's is {tuple(own.shape)} {own.dtype}: "
                "resume with the bank options of the checkpoint"
            )
        self.entries.copy_(given)
        self.ids.copy_(state["ids"])
        self._heads.copy_(state["heads"])
        self.counts.copy_(state["counts"])
        self.seen.copy_(state["seen"])


def _rank_within(keys: Tensor) -> Tensor:
    """For each element, how many equal keys stand before it."""
    order = keys.argsort(stable=True)
    grouped = keys[order]
    position = torch.arange(keys.numel(), device=keys.device)
    rank = torch.empty_like(keys)
    rank[order] = position - torch.searchsorted(grouped, grouped)
    return rank
