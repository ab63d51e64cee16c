"""What every prepared data set offers, however it lies on the disk."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from stablevm import rng
from stablevm.autoencoder import LatentSpec
from stablevm.options import some_of

_NAMES_SHOWN = 6  # classes named in a command's last line

Rows = Sequence[int] | np.ndarray | Tensor


class PreparedDataset(ABC):
    """A data set on disk. `rows` are positions 0..N-1, in any order; repeated ones are allowed.

    It can be sent to other processes. Files of images are neither checked nor opened until images are asked for.
    """

    folder: Path
    latent: LatentSpec
    class_names: tuple[str, ...]
    resolution: int  # side of the images, in pixels
    has_images: bool
    has_flips: bool  # moments of the mirrored images

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @abstractmethod
    def labels(self) -> Tensor:
        """Classes (N,) int64 of the whole set."""

    @abstractmethod
    def index(self) -> Tensor:
        """Numbers (N,) int64 of the samples in the source that the set was prepared from."""

    @abstractmethod
    def moments(self, rows: Rows) -> Tensor:
        """Means and standard deviations (n, 2C, h, w) float16."""

    @abstractmethod
    def moments_flip(self, rows: Rows) -> Tensor:
        """The same of the mirrored images; the set must have been prepared with them (`has_flips`)."""

    @abstractmethod
    def images(self, rows: Rows) -> Tensor:
        """Images (n, 3, H, W) uint8; the set must hold them (`check_images`)."""

    @abstractmethod
    def check_images(self) -> None:
        """UserError if the set was prepared without images, or if one of their files is missing or cut short."""


def drawn_latents(dataset: PreparedDataset, rows: Sequence[int], *key: int | str, mirrored: bool = False) -> Tensor:
    """Latents (n, *shape) in the network's space: a draw of each row's mean and deviation by its stream (*key, row)."""
    moments = dataset.moments_flip(rows) if mirrored else dataset.moments(rows)
    streams = rng.RowGenerators.for_keys(*key, positions=rows)
    return dataset.latent.from_moments(moments, rng.randn((len(rows), *dataset.latent.shape), streams))


def checked_rows(rows: Rows, count: int) -> np.ndarray:
    """`rows` as int64; IndexError for one outside a data set of `count` rows."""
    rows = np.asarray(rows, np.int64)
    if len(rows) and not (rows.min() >= 0 and rows.max() < count):
        raise IndexError(f"rows {rows.min()} to {rows.max()} asked of a data set of {count} rows")
    return rows


def describe_classes(names: Sequence[str], counts: Sequence[int]) -> list[str]:
    """The end of a last line: how many classes there are, and what the first ones and the empty ones are called."""
    if not names:
        return []
    text = f"{len(names):,} {'class' if len(names) == 1 else 'classes'}: {some_of(names, _NAMES_SHOWN)}"
    empty = [name for name, count in zip(names, counts, strict=False) if not count]
    return [text, f"{len(empty):,} of them without an image: {some_of(empty, _NAMES_SHOWN)}"] if empty else [text]
