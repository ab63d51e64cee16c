"""The interface of prepared data sets, whatever their layout on disk."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stablevm.networks.autoencoder import LatentSpec
from stablevm.support import rng
from stablevm.support.errors import UserError, arg
from stablevm.support.options import some_of

_NAMES_SHOWN = 6  # classes named in the last line of a command's output

Rows = Sequence[int] | np.ndarray | Tensor


@dataclass(frozen=True)
class Fingerprint:
    """A fingerprint of a data set's contents: if two are equal, both sets have the same samples in the same rows."""

    rows: int
    class_names: str  # SHA-256, as are the following
    latents: str  # of latents and labels
    images: str  # empty if images do not matter

    def difference(self, expected: "Fingerprint") -> str | None:
        """A description of the first difference from `expected`; None if there is none."""
        if self.rows != expected.rows:
            return f"{self.rows:,} rows instead of {expected.rows:,}"
        if self.class_names != expected.class_names:
            return "other class names"
        if self.latents != expected.latents:
            return "other latents or labels, or the same in another order"
        return None if self.images == expected.images else "other images"

    def difference_of_images(self, expected: "Fingerprint") -> str | None:
        """Like `difference`, but of the images alone: their latents, classes and the names of these may differ."""
        return replace(self, class_names="", latents="").difference(replace(expected, class_names="", latents=""))


def digest(parts: Iterable[object]) -> str:
    """The SHA-256 of a sequence of texts, numbers and bytes."""
    found = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogateescape")
        found.update(b"%d:" % len(content) + content)
    return found.hexdigest()


class PreparedDataset(ABC):
    """A data set on disk. Its methods take `rows`, numbers from 0 to N - 1 in any order, repeated or not.

    It can be sent to other processes. Files of images are neither checked nor opened until images are requested.
    """

    folder: Path
    latent: LatentSpec
    class_names: tuple[str, ...]
    resolution: int  # side of the images, in pixels
    has_images: bool
    has_flips: bool  # whether it holds moments of the mirrored images

    layout: str  # a description of its layout on disk

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @abstractmethod
    def labels(self) -> Tensor:
        """The classes (N,) int64 of all samples."""

    @abstractmethod
    def index(self) -> Tensor:
        """The numbers (N,) int64 of the samples in the source from which the set was prepared."""

    @abstractmethod
    def moments(self, rows: Rows) -> Tensor:
        """The means and standard deviations (n, 2C, h, w), float16, of the latents of these rows."""

    @abstractmethod
    def moments_flip(self, rows: Rows) -> Tensor:
        """The moments of the mirrored images; the set must have been prepared with them (`has_flips`)."""

    @abstractmethod
    def images(self, rows: Rows) -> Tensor:
        """The images (n, 3, H, W), uint8, of these rows; the set must hold images (`check_images`)."""

    @abstractmethod
    def describe(self, row: int) -> str:
        """A description of a row by which its image and its file can be found."""

    @abstractmethod
    def fingerprint(self, *, with_images: bool) -> Fingerprint:
        """The fingerprint of the contents, including images if they matter."""

    @property
    def raw_latent(self) -> LatentSpec:
        """The latents of the set, of which scale and shift may still have to be measured."""
        return self.latent

    def facts(self) -> list[tuple[str, str]]:
        """Further facts about the set, as names and values, for `stablevm data info`."""
        return []

    def faults(self) -> Iterator[str]:
        """Faults of the layout as a whole, beyond those of single rows."""
        return iter(())

    def record(self, latent: LatentSpec) -> None:
        """Write down another normalisation of the latents, which are kept as they are.

        UserError if the layout has no place for it.
        """
        raise UserError(
            f"{arg('folder')} {self.folder}: {self.layout}: statistics can't be recorded; make shards of it with "
            "stablevm prepare pack"
        )

    @abstractmethod
    def check_images(self) -> None:
        """Raise UserError if the set was prepared without images, or a file of images is missing or truncated."""


def drawn_latents(dataset: PreparedDataset, rows: Sequence[int], *key: int | str) -> Tensor:
    """Sample latents (n, *shape) for the network from the moments of `rows`, each with the generator (*key, row).

    UserError, naming the row, if its moments are not finite.
    """
    moments = dataset.moments(rows)
    check_finite(dataset, rows, moments)
    generators = rng.RowGenerators.for_keys(*key, positions=rows)
    return dataset.latent.from_moments(moments, rng.randn((len(rows), *dataset.latent.shape), generators))


def checked_rows(rows: Rows, count: int) -> np.ndarray:
    """The rows as int64; IndexError if one is outside a data set of `count` rows."""
    rows = np.asarray(rows, np.int64)
    if len(rows) and not (rows.min() >= 0 and rows.max() < count):
        raise IndexError(f"rows {rows.min()} to {rows.max()} requested from a data set of {count} rows")
    return rows


def describe_classes(names: Sequence[str], counts: Sequence[int]) -> list[str]:
    """The number of classes, the names of the first ones, and those without images, for a command's last line."""
    if not names:
        return []
    text = f"{len(names):,} {'class' if len(names) == 1 else 'classes'}: {some_of(names, _NAMES_SHOWN)}"
    empty = [name for name, count in zip(names, counts, strict=False) if not count]
    return [text, f"{len(empty):,} of them without an image: {some_of(empty, _NAMES_SHOWN)}"] if empty else [text]


def check_finite(dataset: PreparedDataset, rows: Rows, moments: Tensor) -> None:
    """Raise UserError, naming the row, if moments (n, 2C, h, w) are not finite; in a bank they would spoil every target
    of their class.
    """
    if moments.sum(dtype=torch.float32).isfinite():  # much faster than checking each value, and just as safe
        return
    bad = ~moments.isfinite().flatten(1).all(1)
    if bad.any():
        row = int(np.asarray(rows)[int(bad.nonzero()[0])])
        raise UserError(
            f"{arg('folder')} {dataset.folder}: the latent of {dataset.describe(row)} is not finite; encode that "
            "image again in float32 or leave it out (stablevm data verify names all such rows)"
        )
