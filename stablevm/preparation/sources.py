"""The sources of images to prepare: their images and classes, ordered by name."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stablevm.data.folders import why_no_source
from stablevm.data.listing import LISTING_FILE, Listing, read_listing
from stablevm.data.repa import LATENTS, is_repa_folder
from stablevm.data.storage import FolderStorage, Storage, is_fault_of_file, open_storage
from stablevm.preparation.pictures import is_picture
from stablevm.support.errors import UserError
from stablevm.support.options import some_of

# Suffixes of images. An image that can't be read is skipped, with its cause.
IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".jp2",
     ".avif", ".heic", ".heif", ".jxl", ".tga"]
)  # fmt: skip
# Suffixes of other files that are common beside images. A file with any other suffix is opened to see if it is an
# image.
_OTHER_SUFFIXES = frozenset(
    [".txt", ".json", ".xml", ".csv", ".tsv", ".npy", ".npz", ".md", ".html", ".yaml", ".yml", ".mat", ".cls",
     ".caption"]
)  # fmt: skip
# Hidden files, and files left by operating systems and network disks: macOS (._x, .DS_Store, __MACOSX, Icon), Windows
# (Thumbs.db, desktop.ini, recycle bins), Synology, QNAP and NetApp (@eaDir, #recycle, ~snapshot), Linux (lost+found).
_LEFT_BY_SYSTEMS = re.compile(
    r"(?:^|/)(?:\.[^/]*|(?:__MACOSX|__pycache__|@eaDir|@Recycle|@Recently-Snapshot|#recycle|#snapshot|~snapshot"
    r"|\$RECYCLE\.BIN|RECYCLER|System Volume Information|lost\+found|Network Trash Folder|Temporary Items"
    r"|Thumbs\.db|ehthumbs(?:_vista)?\.db|desktop\.ini|Icon\r))(?:/|$)",
    re.IGNORECASE,
)
_SPLITS = frozenset(["train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"])
_BESIDE_SPLITS = frozenset(["", "image", "images", "img", "imgs", "data", "set", "split"])  # train2017, val_images
OUR_FILES = (LISTING_FILE, "report.json")
ONE_CLASS = ("all",)  # class names of a source without classes


@dataclass(frozen=True)
class Source:
    """A source of images, sorted by name; image i is `names[i]` in the storage and has the class `labels[i]`."""

    storage: Storage
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

    def empty_classes(self) -> list[str]:
        """The names of classes without an image."""
        counts = np.bincount(self.labels, minlength=len(self.class_names))
        return [self.class_names[label] for label in np.flatnonzero(counts == 0)]


def open_source(root: str | Path) -> Source:
    """List the images below `root`, which has class folders, or is a folder or ZIP archive with dataset.json.

    Without dataset.json, the folders directly below `root` are the classes, sorted by name, with images at any depth;
    a single folder that contains all others is skipped. If there are no such folders, or dataset.json has no labels,
    all images have the same class. Raises UserError if this is not a source, or must not be used in its present state.
    """
    storage = open_storage(root)
    root = Path(root)
    if isinstance(storage, FolderStorage) and is_repa_folder(root):
        raise UserError(f"{root}: holds latents already ({LATENTS}); give its folder images, or pack it")
    listing = _listing(storage)
    source = next(found for read in SOURCES if (found := read(storage, listing)) is not None)
    if not len(source):
        raise UserError(f"{root}: no images found; check the path")
    empty = source.empty_classes()
    if empty:
        classes = f"{len(empty):,} of {len(source.class_names):,} classes have no image ({some_of(empty)})"
        source = replace(source, warnings=(*source.warnings, f"{root}: {classes}"))
    return source


def fingerprint(names: Sequence[str], labels: Sequence[int], class_names: Sequence[str]) -> str:
    """A fingerprint of a list of images; a job resumes only with the list that it started with."""
    digest = hashlib.sha256(json.dumps(class_names).encode())
    for name, label in zip(names, labels, strict=True):
        digest.update(os.fsencode(f"{name}\t{label}\n"))
    return digest.hexdigest()


def printable(name: str) -> str:
    """The name of a file in a form that is safe for JSON and for a terminal, whatever its bytes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _listing(storage: Storage) -> Listing | None:
    if storage.exists(LISTING_FILE):
        return read_listing(storage)
    reason = why_no_source(storage.root) if isinstance(storage, FolderStorage) else None
    if reason is not None:
        raise UserError(f"{storage.root}: {reason}")
    return None


def _listed(storage: Storage, listing: Listing | None) -> Source | None:
    """A source whose dataset.json lists the class of each image."""
    if listing is None or listing.labels is None:
        return None
    names = listing.names
    if names[0].endswith(".npy"):
        raise UserError(f"{storage.root}: its {LISTING_FILE} lists latents, such as {names[0]}; give the images")
    labels = np.array([label for _, label in listing.labels or []], np.int64)
    found = _Files.below(storage)
    known = set(names)
    unlisted = [name for name in found.images if name not in known]
    warnings = []
    if unlisted:
        warnings.append(
            f"{storage.root}: {len(unlisted):,} images are not in its {LISTING_FILE} and are left out, the first is "
            f"{printable(unlisted[0])}"
        )
    return Source(
        storage,
        names,
        labels,
        listing.known_class_names,
        listing.facts,
        ignored=len(found.others),
        hidden=found.hidden,
        unlisted=len(unlisted),
        warnings=tuple(warnings),
    )


@dataclass
class _Files:
    """All files of a storage, by kind."""

    images: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    hidden: int = 0

    @classmethod
    def below(cls, storage: Storage) -> "_Files":
        found = cls()
        for name in storage.names():
            if _LEFT_BY_SYSTEMS.search(name):
                found.hidden += 1
            elif _is_image(storage, name):
                found.images.append(name)
            elif name not in OUR_FILES:
                found.others.append(name)
        return found


def _is_image(storage: Storage, name: str) -> bool:
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in IMAGE_SUFFIXES or suffix in _OTHER_SUFFIXES:
        return suffix in IMAGE_SUFFIXES
    try:
        with storage.open(name) as file:
            return is_picture(file)
    except OSError as error:
        if not is_fault_of_file(error):
            raise
        return False


def _walked(storage: Storage, listing: Listing | None) -> Source:
    """A source without a list of labels: its classes are folders, or there is only one if dataset.json says so."""
    classes = listing is None
    found = _Files.below(storage)
    if classes:
        _check_no_listing_below(storage, found)
    images, hidden = sorted(found.images), found.hidden
    facts: dict[str, Any] = {"ignored": len(found.others), "hidden": hidden}
    prefix, names = _class_folders(storage, found) if classes else ("", [])
    if not names:
        return Source(storage, images, np.zeros(len(images), np.int64), ONE_CLASS, **facts)
    numbers = {name: number for number, name in enumerate(names)}
    inside = [name for name in images if "/" in name[len(prefix) :]]
    labels = [numbers[_first_part(name, prefix)] for name in inside]
    return Source(
        storage,
        inside,
        np.array(labels, np.int64),
        tuple(map(printable, names)),
        stray=tuple(name for name in images if "/" not in name[len(prefix) :]),
        warnings=tuple(_doubts(storage, found, prefix, names)),
        **facts,
    )


def _class_folders(storage: Storage, found: _Files) -> tuple[str, list[str]]:
    """The folder that contains the class folders, and their sorted names; none if no image is in a folder.

    An empty folder is a class without images, but a folder with only other files is not a class. A single folder that
    contains only folders is skipped.
    """
    prefix = ""
    while True:
        below = [name for name in found.images if name.startswith(prefix)]
        filled = {_first_part(name, prefix) for name in below if "/" in name[len(prefix) :]}
        others = {_first_part(name, prefix) for name in found.others if name.startswith(prefix)}
        folders = storage.folders(prefix)
        empty = {name for name in folders - filled - others if not _LEFT_BY_SYSTEMS.search(name)}
        candidates = sorted(filled | empty)
        if len(filled) != 1 or len(candidates) != 1 or any("/" not in name[len(prefix) :] for name in below):
            return prefix, candidates if filled else []
        deeper = f"{prefix}{candidates[0]}/"
        if any("/" not in name[len(deeper) :] for name in below):
            return prefix, candidates
        prefix = deeper


def _first_part(name: str, prefix: str) -> str:
    return name[len(prefix) :].split("/", 1)[0]


def _doubts(storage: Storage, found: _Files, prefix: str, names: list[str]) -> Iterator[str]:
    folders = {
        _first_part(name, prefix) for name in found.others if name.startswith(prefix) and "/" in name[len(prefix) :]
    }
    stray = [name for name in found.images if "/" not in name[len(prefix) :]]
    if stray:
        yield (
            f"{storage.root}: {len(stray):,} images are in no class folder and are left out, the first is "
            f"{printable(min(stray))}"
        )
    without = sorted(folders - set(names))
    if without:
        yield f"{storage.root}: no image in {printable(some_of(without))}, so no class of that name"
    if all(map(_is_split, names)):
        yield (
            f"{storage.root}: its classes would be {printable(some_of(names))}, which sound like splits of a data set; "
            "give the folder of one"
        )


def _is_split(name: str) -> bool:
    """Whether the name of a folder is that of a split of a data set, such as train."""
    words = set(re.split(r"[\W\d_]+", name.lower())) - _BESIDE_SPLITS
    return bool(words) and words <= _SPLITS


def _check_no_listing_below(storage: Storage, found: _Files) -> None:
    below = [name for name in found.others if name.endswith(f"/{LISTING_FILE}")]
    if below:
        folder = (storage.root / below[0]).parent
        remedy = f"give that folder, or remove its {LISTING_FILE}"
        if not isinstance(storage, FolderStorage):
            remedy = "unpack the archive and give that folder"
        raise UserError(
            f"{storage.root}: no {LISTING_FILE} here, but in {printable(str(folder))}, which says what is of which "
            f"class: {remedy}"
        )


# Functions that list a source from its storage and dataset.json, one for each form; the first that returns one is used.
SOURCES: list[Callable[[Storage, Listing | None], Source | None]] = [_listed, _walked]
