"""A source of images to prepare: names that its storage opens, their classes, and what is told about them."""

import hashlib
import json
import os
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stablevm.support.errors import UserError, arg

ONE_CLASS = ("all",)  # class names of a source without classes


class Pictures(Protocol):
    """What holds the images of a source: a folder, an archive, or files of many images each."""

    @property
    def root(self) -> Path:
        """The folder or file that messages name."""

    def open(self, name: str) -> IO[bytes]:
        """The file of one image, in any format of pictures; OSError if it can't be read."""


@dataclass(frozen=True)
class Source:
    """A source of images, sorted by name; image i is `names[i]` in the storage and has the class `labels[i]`."""

    storage: Pictures
    names: list[str]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)  # other entries of its dataset.json, such as the resolution
    stray: tuple[str, ...] = ()  # images outside the class folders
    ignored: int = 0  # files that are not images
    hidden: int = 0  # hidden files, and files left by operating systems
    unlisted: int = 0  # images that its dataset.json does not list
    warnings: tuple[str, ...] = ()  # about classes that may be unintended

    def __len__(self) -> int:
        return len(self.names)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.names, self.labels.tolist(), self.class_names)

    def first(self, count: int | None) -> "Source":
        """The source with only the first `count` images, but all classes; itself for None."""
        if count is None or count >= len(self):
            return self
        return replace(self, names=self.names[:count], labels=self.labels[:count])

    def part(self, numbers: Container[int], count: int) -> "Source":
        """Some of `count` parts, with all classes. numbers: of the parts, from 1; part k is every `count`-th image from
        the k-th on.
        """
        if count == 1:
            return self
        rows = [row for row in range(len(self)) if row % count + 1 in numbers]
        return replace(self, names=[self.names[row] for row in rows], labels=self.labels[rows])

    def renamed(self, class_names: Sequence[str]) -> "Source":
        """The source with other names of its classes; UserError unless there is one for each."""
        if len(class_names) < len(self.class_names):
            raise UserError(
                f"{arg('class_names')}: {len(class_names)} names, but {self.storage.root} has "
                f"{len(self.class_names)} classes; give a name for each"
            )
        return replace(self, class_names=tuple(class_names))

    def empty_classes(self) -> list[str]:
        """The names of classes without an image."""
        counts = np.bincount(self.labels, minlength=len(self.class_names))
        return [self.class_names[label] for label in np.flatnonzero(counts == 0)]


def fingerprint(names: Sequence[str], labels: Sequence[int], class_names: Sequence[str]) -> str:
    """A fingerprint of a list of images; a job resumes only with the list that it started with."""
    digest = hashlib.sha256(json.dumps(class_names).encode())
    for name, label in zip(names, labels, strict=True):
        digest.update(os.fsencode(f"{name}\t{label}\n"))
    return digest.hexdigest()


def printable(name: str) -> str:
    """The name of a file in a form that is safe for JSON and for a terminal, whatever its bytes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
