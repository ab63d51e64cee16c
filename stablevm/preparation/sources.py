"""What there is to prepare: the images of a source with their classes, in an order that only the names decide."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stablevm.data.listing import LISTING_FILE, Listing, read_listing
from stablevm.data.repa import LATENTS, is_repa_folder
from stablevm.data.storage import FolderStorage, Storage, open_storage
from stablevm.errors import UserError

IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".jp2"]
)  # fmt: skip
ONE_CLASS = ("all",)  # of a source without classes


@dataclass(frozen=True)
class Source:
    """Images in the order of their names; image i is `names[i]` in the storage, of class `labels[i]`."""

    storage: Storage
    names: list[str]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)  # what else its dataset.json says, such as its resolution
    stray: tuple[str, ...] = ()  # images outside the class folders
    ignored: int = 0  # files that are no images by their names

    def __len__(self) -> int:
        return len(self.names)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.names, self.labels.tolist(), self.class_names)


def open_source(root: str | Path) -> Source:
    """List the images below `root`: class folders, or a folder or ZIP archive with dataset.json.

    Without dataset.json the folders directly below are the classes, in the order of their names, and hold images at
    any depth; where there are none, all images are of one class. Raises UserError for what is no such source.
    """
    storage = open_storage(root)
    root = Path(root)
    if isinstance(storage, FolderStorage) and is_repa_folder(root):
        raise UserError(f"{root}: holds latents already ({LATENTS}); give its folder images, or pack it")
    if storage.exists(LISTING_FILE):
        listing = read_listing(storage)
        if listing.labels is not None:
            return _listed(storage, listing)
    source = _walked(storage)
    if not len(source):
        raise UserError(f"{root}: no images found (suffixes {', '.join(sorted(IMAGE_SUFFIXES))}); check the path")
    return source


def fingerprint(names: Sequence[str], labels: Sequence[int], class_names: Sequence[str]) -> str:
    """Of a list of images: a job goes on only with the list that it began with."""
    digest = hashlib.sha256(json.dumps(class_names).encode())
    for name, label in zip(names, labels, strict=True):
        digest.update(os.fsencode(f"{name}\t{label}\n"))
    return digest.hexdigest()


def printable(name: str) -> str:
    """A file's name for JSON and for the terminal, whatever bytes it is made of."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _listed(storage: Storage, listing: Listing) -> Source:
    labels = np.array([label for _, label in listing.labels or []], np.int64)
    return Source(storage, listing.names, labels, listing.known_class_names, listing.facts)


def _walked(storage: Storage) -> Source:
    files = [PurePosixPath(name) for name in storage.names()]
    visible = [path for path in files if not any(part.startswith(".") for part in path.parts)]
    images = [path for path in visible if path.suffix.lower() in IMAGE_SUFFIXES]
    classes = sorted({path.parts[0] for path in images if len(path.parts) > 1} | _folders(storage))
    if not any(len(path.parts) > 1 for path in images):
        classes = []
    inside = sorted(str(path) for path in images if not classes or len(path.parts) > 1)
    numbers = {name: number for number, name in enumerate(classes)}
    labels = [numbers[name.split("/")[0]] if classes else 0 for name in inside]
    stray = [str(path) for path in images if classes and len(path.parts) == 1]
    return Source(
        storage,
        inside,
        np.array(labels, np.int64),
        tuple(map(printable, classes)) or ONE_CLASS,
        stray=tuple(stray),
        ignored=len(files) - len(images),
    )


def _folders(storage: Storage) -> set[str]:
    """Folders directly below, empty ones too: an empty class keeps its number."""
    if not isinstance(storage, FolderStorage):
        return set()
    return {path.name for path in storage.root.iterdir() if path.is_dir() and not path.name.startswith(".")}
