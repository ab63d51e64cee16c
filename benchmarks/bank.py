"""The memory bank: time and memory of insertion, compared with concatenating a queue per class, and time of sampling.

python benchmarks/bank.py [--classes 1000] [--capacity 256] [--dtype float16] [--device auto]

Both sides have full queues, as in training after its start, and each holds the whole bank.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from common import GIBIBYTE, MEBIBYTE, DeviceName, allocated_bytes, choose_device, medians
from torch import Tensor

from stablevm.bank import ClassBank
from stablevm.objective import POOL_SIZE
from stablevm.support.machine import describe_machine


@dataclass(frozen=True)
class Sizes:
    """Insert batches of fresh latents of classes at random into full queues."""

    classes: int = 1000
    capacity: int = 256
    batch: int = 256
    shape: tuple[int, ...] = (4, 32, 32)
    dtype: Literal["float32", "float16"] = "float16"
    """The dtype of both sides' storage; in float32 the published bank takes 3.9 GiB."""
    device: DeviceName = "auto"
    repeats: int = 15


class Concatenated:
    """The published implementation: one tensor per class, concatenated with new samples and cut to the capacity."""

    def __init__(self, bank: ClassBank) -> None:
        self.capacity, self.queues = bank.capacity, list(bank.entries.clone())

    def insert(self, samples: Tensor, labels: Tensor) -> None:
        for label in labels.unique().tolist():
            fresh = samples[labels == label].to(self.queues[label])
            self.queues[label] = torch.cat([self.queues[label], fresh])[-self.capacity :]


class Feed:
    """Batches of fresh samples of random classes, with ids that no queue holds."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.stream = torch.Generator(device).manual_seed(0)
        self.sizes, self.device, self.next_id = sizes, device, 0
        self.samples = torch.randn(sizes.batch, *sizes.shape, generator=self.stream, device=device)

    def labels(self) -> Tensor:
        return torch.randint(self.sizes.classes, (self.sizes.batch,), generator=self.stream, device=self.device)

    def ids(self) -> Tensor:
        self.next_id += self.sizes.batch
        return torch.arange(self.next_id - self.sizes.batch, self.next_id, device=self.device)


def full_bank(sizes: Sizes, classes: int, feed: Feed) -> ClassBank:
    bank = ClassBank(classes, sizes.capacity, sizes.shape, dtype=getattr(torch, sizes.dtype), device=feed.device)
    for label in torch.arange(classes, device=feed.device).split(16):
        labels = label.repeat_interleave(sizes.capacity)
        start = int(label[0]) * sizes.capacity
        samples = torch.randn(len(labels), *sizes.shape, generator=feed.stream, device=feed.device)
        bank.insert(samples, labels, -2 - torch.arange(start, start + len(labels), device=feed.device))
    assert (bank.counts == sizes.capacity).all()
    return bank


def compare_insertion(sizes: Sizes, bank: ClassBank, feed: Feed) -> None:
    queues, small = Concatenated(bank), full_bank(sizes, max(1, sizes.classes // 10), feed)
    storage = bank.entries.data_ptr()
    slots = torch.randperm(sizes.classes * sizes.capacity, generator=feed.stream, device=feed.device)[: sizes.batch]
    rows = bank.entries.flatten(0, 1)
    sides = {
        "ClassBank.insert": lambda: bank.insert(feed.samples, feed.labels(), feed.ids()),
        f"the same, {small.num_classes} classes": lambda: small.insert(
            feed.samples, feed.labels() % small.num_classes, feed.ids()
        ),
        "writing the samples alone": lambda: rows.index_copy_(0, slots, feed.samples.to(rows)),
        "torch.cat per class": lambda: queues.insert(feed.samples, feed.labels()),
    }
    times = medians(sides, repeats=sizes.repeats, device=feed.device)
    reference = times["ClassBank.insert"]
    print(f"{'':28}{'ms':>9}{'ratio':>9}{'allocated meanwhile':>25}")
    for name, run in sides.items():
        memory = allocated_bytes(run, feed.device) / MEBIBYTE
        print(f"{name:28}{times[name] * 1e3:9.2f}{times[name] / reference:8.2f}x{memory:21.2f} MiB")
    print(f"storage in place after all: {'yes' if bank.entries.data_ptr() == storage else 'NO'}")


def time_sampling(sizes: Sizes, bank: ClassBank, feed: Feed) -> None:
    uniforms = torch.rand(sizes.batch, 2, generator=feed.stream, device=feed.device)
    labels, slots = bank.draw(uniforms)
    pool_stream = torch.Generator().manual_seed(0)
    sides = {
        f"draw {sizes.batch} entries": lambda: bank.draw(uniforms),
        "gather their values": lambda: bank.gather(slots),
        "which may be references": lambda: bank.is_reference(labels, slots, feed.ids()),
        f"draw a pool of {POOL_SIZE}": lambda: bank.draw_pool(POOL_SIZE, pool_stream),
    }
    times = medians(sides, repeats=sizes.repeats, device=feed.device)
    print(f"\n{'':28}{'ms':>9}{'allocated meanwhile':>25}")
    for name, run in sides.items():
        print(f"{name:28}{times[name] * 1e3:9.3f}{allocated_bytes(run, feed.device) / MEBIBYTE:21.2f} MiB")


def main(sizes: Sizes) -> None:
    feed = Feed(sizes, choose_device(sizes.device))
    bank = full_bank(sizes, sizes.classes, feed)
    held = bank.entries.numel() * bank.entries.element_size() / GIBIBYTE
    latent = " x ".join(map(str, sizes.shape))
    print(describe_machine(feed.device))
    print(
        f"{sizes.batch} latents of {latent} into {sizes.classes} classes x {sizes.capacity}, {sizes.dtype}: "
        f"{held:.2f} GiB"
    )
    compare_insertion(sizes, bank, feed)
    time_sampling(sizes, bank, feed)


if __name__ == "__main__":
    main(tyro.cli(Sizes))
