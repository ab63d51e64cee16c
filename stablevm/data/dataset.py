"""What every prepared data set offers, however it lies on the disk."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stablevm.networks.autoencoder import LatentSpec
from stablevm.support import rng
from stablevm.support.errors import UserError, arg
from stablevm.support.options import some_of

_NAMES_SHOWN = 6  # classes named in a command's last line

Rows = Sequence[int] | np.ndarray | Tensor


@dataclass(frozen=True)
class Fingerprint:
    """What a data set holds: two that are equal give the same samples under the same row numbers, wherever they lie."""

    rows: int
    class_names: str  # SHA-256, as the following
    latents: str  # and labels
    images: str  # empty where they do not matter

    def difference(self, expected: "Fingerprint") -> str | None:
        """In words, what a set has in place of the `expected`; None where nothing differs."""
        if self.rows != expected.rows:
            return f"{self.rows:,} rows instead of {expected.rows:,}"
        if self.class_names != expected.class_names:
            return "other class names"
        if self.latents != expected.latents:
            return "other latents or labels, or the same in another order"
        return None if self.images == expected.images else "other images"


def digest(parts: Iterable[object]) -> str:
    """SHA-256 of texts, numbers and bytes in their order."""
    found = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogateescape")
        found.update(b"%d:" % len(content) + content)
    return found.hexdigest()


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

    layout: str  # how it lies on the disk, in words

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
    def describe(self, row: int) -> str:
        """A row in words that lead to its image and its file."""

    @abstractmethod
    def fingerprint(self, *, with_images: bool) -> Fingerprint:
        """What the set holds, its images included where they matter."""

    def facts(self) -> list[tuple[str, str]]:
        """Names and values of what else people want to know of it."""
        return []

    def faults(self) -> Iterator[str]:
        """Faults of the layout as a whole, beyond those of single rows."""
        return iter(())

    @abstractmethod
    def check_images(self) -> None:
        """UserError if the set was prepared without images, or if one of their files is missing or cut short."""


def drawn_latents(dataset: PreparedDataset, rows: Sequence[int], *key: int | str) -> Tensor:
    """Latents (n, *shape) in the network's space: a draw of each row's mean and deviation by its stream (*key, row).

    UserError naming a row whose moments are not finite.
    """
    moments = dataset.moments(rows)
    check_finite(dataset, rows, moments)
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


def check_finite(dataset: PreparedDataset, rows: Rows, moments: Tensor) -> None:
    """UserError naming the first of `rows` whose moments (n, 2C, h, w) are not finite: in a bank it would spoil every
    target of its class.
    """
    if moments.sum(dtype=torch.float32).isfinite():  # many times as fast as looking at each, and never true with one
        return
    bad = ~moments.isfinite().flatten(1).all(1)
    if bad.any():
        row = int(np.asarray(rows)[int(bad.nonzero()[0])])
        raise UserError(
            f"{arg('folder')} {dataset.folder}: the latent of {dataset.describe(row)} is not finite; encode that "
            "image again in float32 or leave it out (stablevm data verify names all such rows)"
        )
