"""The order of training samples, and the loader that reads them.

The order is one permutation per epoch, one after another. Step s takes positions s*G to (s+1)*G, where G is the global
batch size, and each process takes a contiguous part of them. A batch depends only on (seed, step), so resuming means
starting at another step, and any number of processes see the same global batches.
"""

from collections.abc import Callable, Iterable, Iterator
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
    """The samples of one process for one optimiser step."""

    moments: Tensor  # (B, 2C, h, w) float16: means, then standard deviations
    labels: Tensor  # (B,) int64
    rows: Tensor  # (B,) int64: the samples' rows in the data set
    images: Tensor | None  # (B, 3, H, W) uint8, if requested; or stored tokens (B, T, D) float16 in their place
    image_rows: Tensor | None = None  # (B,) int64: the rows of the images

    def pin_memory(self) -> "TrainingBatch":
        """Copy the batch to page-locked memory, from which copies to a GPU run in parallel with other work."""
        return TrainingBatch(
            moments=self.moments.pin_memory(),
            labels=self.labels.pin_memory(),
            rows=self.rows.pin_memory(),
            images=None if self.images is None else self.images.pin_memory(),
            image_rows=None if self.image_rows is None else self.image_rows.pin_memory(),
        )


@dataclass(frozen=True)
class StepSampler:
    """An iterable over the rows of process `rank` of `world`, for steps `start_step` to `start_step + num_steps - 1`.

    Each epoch contains every sample once. A step may extend into the next epoch, and a global batch may be larger than
    the data set. Raises UserError if `world` does not divide `global_batch`.
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
                f"{arg('global_batch')} {self.global_batch}: expected a positive multiple of the number of processes, "
                f"{self.world}"
            )

    @property
    def first_position(self) -> int:
        """The position of this process's first sample in the global batch."""
        return self.rank * self.local_batch

    @property
    def local_batch(self) -> int:
        """The number of samples of this process in each step."""
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
        """The order of the samples in an epoch: (num_samples,) int64."""
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
    images: Callable[[list[int]], Tensor] | None = None,
    image_rows: Iterable[list[int]] | None = None,
    finite: bool = False,
    pin_memory: bool = False,
) -> Calls[TrainingBatch]:
    """A loader of `num_steps` batches (`TrainingBatch`) for this process, beginning with step `start_step`.

    images: what reads the images of rows, or something else in their place; by default the data set.
    image_rows: one list of rows for each step, whose images are read instead of those of the samples; it is iterated in
    this process, shortly before a batch is requested from the workers. finite: raise UserError for a sample whose
    latent is not finite. Raises UserError if the processes can't share a batch equally, or the data set lacks images.
    """
    if with_images and images is None:
        dataset.check_images()
    sampler = StepSampler(len(dataset), global_batch, rank, world, seed, start_step, num_steps)
    return Calls(
        _StepReader(dataset, finite, images or dataset.images),
        _StepRequests(sampler, (image_rows or sampler) if with_images else None),
        workers,
        finish_after_signals=True,  # when asked to stop, the trainer finishes its step, for which it needs the workers
        pin_memory=pin_memory,
    )


class _Request(NamedTuple):
    """A request to a worker: the rows of a step's samples, and of its images if they are wanted."""

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
    def __init__(self, dataset: PreparedDataset, finite: bool, images: Callable[[list[int]], Tensor]) -> None:
        self.dataset, self.finite, self.images = dataset, finite, images
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
            images=None if image_rows is None else self.images(image_rows),
            image_rows=None if image_rows is None else torch.tensor(image_rows),
        )
