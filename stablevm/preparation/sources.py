"""The sources of images to prepare: their images and classes, ordered by name."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from stablevm.data.folders import why_no_source
from stablevm.data.listing import LISTING_FILE, Listing, read_listing
from stablevm.data.repa import LATENTS, is_repa_folder
from stablevm.data.storage import FolderStorage, Storage, is_fault_of_file, open_storage
from stablevm.preparation.config import ConvertConfig
from stablevm.preparation.packed import open_packed
from stablevm.preparation.pictures import IMAGE_SUFFIXES, is_picture
from stablevm.preparation.source import ONE_CLASS, Source, printable
from stablevm.support.errors import UserError, arg
from stablevm.support.options import some_of

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


def open_source(root: str | Path, split: str | None = None) -> Source:
    """List the images below `root`, which has class folders, or is a folder or ZIP archive with dataset.json.

    Or it is a file, or a folder of files, that holds many images (`packed.PACKED`); split: which of its splits.
    Without dataset.json, the folders directly below `root` are the classes, sorted by name, with images at any depth;
    a single folder that contains all others is skipped. If there are no such folders, or dataset.json has no labels,
    all images have the same class. Raises UserError if this is not a source, or must not be used in its present state.
    """
    root = Path(root)
    source = open_packed(root, split)
    if source is None:
        source = _open_pictures(root)
        if split is not None:
            raise UserError(f"{arg('split')} {split}: {root} has no splits that are known; give the folder of one")
    if not len(source):
        raise UserError(f"{root}: no images found; check the path")
    empty = source.empty_classes()
    if empty:
        classes = f"{len(empty):,} of {len(source.class_names):,} classes have no image ({some_of(empty)})"
        source = replace(source, warnings=(*source.warnings, f"{root}: {classes}"))
    return source


def select(config: ConvertConfig) -> Source:
    """The images of a source that are to be converted, with the names of classes that the options give."""
    source = open_source(config.source, config.split)
    names = config.names_of_classes()
    if names is not None:
        source = source.renamed(names)
    return source.part(*config.part_of_whole).first(config.max_images)


def _open_pictures(root: Path) -> Source:
    if root.is_file() and root.suffix.lower() != ".zip":
        raise UserError(
            f"{root}: it is a file of no kind that is read; give a folder, a .zip archive, or a file of IDX "
            "(...-images-idx3-ubyte), CIFAR (.bin), Parquet (.parquet) or tar (.tar)"
        )
    storage = open_storage(root)
    if isinstance(storage, FolderStorage) and is_repa_folder(root):
        raise UserError(f"{root}: holds latents already ({LATENTS}); give its folder images, or pack it")
    return read_storage(storage)


def read_storage(storage: Storage) -> Source:
    """The source in a storage, by the first of `SOURCES` that knows its form."""
    listing = _listing(storage)
    return next(found for read in SOURCES if (found := read(storage, listing)) is not None)


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
