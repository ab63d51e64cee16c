"""Which samples each optimiser step sees, and the loader that reads them.

The stream of samples is the concatenation of one permutation per epoch; step s takes the positions s*G to (s+1)*G of it
(G the global batch) and each process a contiguous part of those. It is a function of (seed, step) alone: to resume is
to start at another step, and one process or four see the same global batches.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stablevm.data.dataset import PreparedDataset, check_finite
from stablevm.data.workers import Calls
from stablevm.support import rng
from stablevm.support.errors import UserError, arg


@dataclass(frozen=True)
class TrainingBatch:
    """The samples of one process in one optimiser step."""

    moments: Tensor  # (B, 2C, h, w) float16: mean, then standard deviation
    labels: Tensor  # (B,) int64
    rows: Tensor  # (B,) int64: rows of the data set, which name the samples
    images: Tensor | None  # (B, 3, H, W) uint8, where asked for
    image_rows: Tensor | None = None  # (B,) int64: the rows that the images are of

    def pin_memory(self) -> "TrainingBatch":
        """The batch in page-locked memory, from which copies to a GPU run beside other work."""
        return TrainingBatch(
            moments=self.moments.pin_memory(),
            labels=self.labels.pin_memory(),
            rows=self.rows.pin_memory(),
            images=None if self.images is None else self.images.pin_memory(),
            image_rows=None if self.image_rows is None else self.image_rows.pin_memory(),
        )


@dataclass(frozen=True)
class StepSampler:
    """Yields the rows of process `rank` of `world` for the steps `start_step` to `start_step + num_steps - 1`.

    Every sample comes once in each epoch, none is dropped; a step may reach over the end of an epoch, and a global
    batch may be larger than the data set. Raises UserError if `world` does not divide `global_batch`.
    """

    num_samples: int
    global_batch: int
    rank: int
    world: int
    seed: int
    start_step: int
    num_steps: int

    def __post_init__(self) -> None:
        if self.global_batch < 1 or self.global_batch % self.world:
            raise UserError(
                f"{arg('global_batch')} {self.global_batch}: not a positive multiple of the {self.world} processes "
                "that share it; give one"
            )

    @property
    def first_position(self) -> int:
        """Position of this process's first sample in the global batch."""
        return self.rank * self.local_batch

    @property
    def local_batch(self) -> int:
        return self.global_batch // self.world

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[list[int]]:
        epoch, permutation = -1, np.empty(0, np.int64)
        for step in range(self.start_step, self.start_step + self.num_steps):
            position = step * self.global_batch + self.first_position
            end = position + self.local_batch
            rows: list[int] = []
            while position < end:
                if epoch != position // self.num_samples:
                    epoch = position // self.num_samples
                    permutation = self.permutation(epoch)
                first = position - epoch * self.num_samples
                part = permutation[first : first + end - position].tolist()
                rows += part
                position += len(part)
            yield rows

    def permutation(self, epoch: int) -> np.ndarray:
        """The order (num_samples,) int64 in which `epoch` goes through the data set."""
        return torch.randperm(self.num_samples, generator=rng.generator(self.seed, "epoch", epoch)).numpy()


def training_loader(
    dataset: PreparedDataset,
    *,
    global_batch: int,
    seed: int,
    num_steps: int,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    with_images: bool = False,
    image_rows: Iterable[list[int]] | None = None,
    finite: bool = False,
    pin_memory: bool = False,
) -> Calls[TrainingBatch]:
    """A loader of `num_steps` batches (`TrainingBatch`) of this process, from `start_step` on.

    With `image_rows`, which gives one list for each step, the images are those of other rows than the samples'; it is
    asked in this process, shortly before the workers are. With `finite` a sample whose latent is not finite ends the
    run. Raises UserError for a batch that the processes can't share, and for images that the data set does not hold.
    """
    if with_images:
        dataset.check_images()
    sampler = StepSampler(len(dataset), global_batch, rank, world, seed, start_step, num_steps)
    return Calls(
        _StepReader(dataset, finite),
        _StepRequests(sampler, (image_rows or sampler) if with_images else None),
        workers,
        finish_after_signals=True,  # the trainer, told to stop, finishes its step and needs the workers for that
        pin_memory=pin_memory,
    )


class _Request(NamedTuple):
    """What a worker is asked for: the samples of a step, and images where they are wanted."""

    rows: list[int]
    image_rows: list[int] | None


class _StepRequests:
    def __init__(self, sampler: StepSampler, image_rows: Iterable[list[int]] | None) -> None:
        self.sampler, self.image_rows = sampler, image_rows

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[_Request]:
        image_rows = repeat(None) if self.image_rows is None else self.image_rows
        yield from map(_Request, self.sampler, image_rows)


class _StepReader:
    def __init__(self, dataset: PreparedDataset, finite: bool) -> None:
        self.dataset, self.finite = dataset, finite
        self.labels = dataset.labels()

    def __call__(self, request: _Request) -> TrainingBatch:
        rows, image_rows = request
        moments = self.dataset.moments(rows)
        if self.finite:
            check_finite(self.dataset, rows, moments)
        return TrainingBatch(
            moments=moments,
            labels=self.labels[rows],
            rows=torch.tensor(rows),
            images=None if image_rows is None else self.dataset.images(image_rows),
            image_rows=None if image_rows is None else torch.tensor(image_rows),
        )
