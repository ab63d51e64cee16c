"""Images in tar archives: WebDataset's shards, whose samples have a class beside the image, and archives of folders."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from stablevm.data.listing import MAX_UNNAMED_CLASSES
from stablevm.data.storage import TarStorage
from stablevm.preparation.pictures import IMAGE_SUFFIXES
from stablevm.preparation.source import Source, printable
from stablevm.preparation.splits import split_in
from stablevm.support.errors import UserError

CLASS = "cls"  # WebDataset's ending of the file that holds a sample's class
NAMES_FILE = "classnames.txt"  # the names of the classes, one a line, beside the shards
_LARGEST_CLASS = 4096  # bytes of the file of a class
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def splits_of(files: Sequence[Path]) -> dict[str, list[Path]]:
    """The archives of each split, by their names; UserError where there are only compressed ones."""
    found: dict[str, list[Path]] = {}
    for path in files:
        if path.suffix.lower() == ".tar":
            found.setdefault(split_in(path.name), []).append(path)
    packed = [path for path in files if path.name.lower().endswith(_COMPRESSED)]
    if packed and len(packed) == len(files):
        raise UserError(f"{packed[0]}: a compressed archive, whose images can't be reached one by one; unpack it")
    return found


def open_tars(root: Path, files: Sequence[Path]) -> Source:
    """The images of archives: of samples with their classes, or of class folders; UserError for damaged archives.

    An archive with a member outside it, or with links, is refused. Nothing is ever unpacked.
    """
    storage = TarStorage(root, files)
    if any(name.endswith(f".{CLASS}") for name in storage.names()):
        return _samples(storage, files[0].with_name(NAMES_FILE))
    from stablevm.preparation.sources import read_storage

    return read_storage(storage)


def _samples(storage: TarStorage, names_file: Path) -> Source:
    """The samples of WebDataset: files whose names agree up to the first dot of the last part belong together."""
    pictures: dict[str, str] = {}
    classes: dict[str, str] = {}
    others = 0
    for name in storage.names():
        path = PurePosixPath(name)
        stem, _, ending = path.name.partition(".")
        key = str(path.with_name(stem)) if stem else ""
        if ending.lower() == CLASS:
            classes[key] = storage.read(name, _LARGEST_CLASS).decode("utf-8", "replace").strip()
        elif f".{ending.lower()}" in IMAGE_SUFFIXES and key not in pictures:
            pictures[key] = name
        else:
            others += 1
    missing = next((key for key in pictures if not classes.get(key)), None)
    if missing is not None:
        raise UserError(f"{storage.root}: {printable(pictures[missing])} has no class in a file .{CLASS}; leave it out")
    keys = sorted(pictures)
    labels, class_names = _numbered([classes[key] for key in keys], names_file, storage.root)
    return Source(storage, [pictures[key] for key in keys], labels, class_names, ignored=others)


def _numbered(classes: Sequence[str], names_file: Path, root: Path) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels and names of classes that are given as numbers, or as names."""
    if not all(each.isascii() and each.isdigit() and len(each) < 10 for each in classes):
        names = sorted(set(classes))
        numbers = {name: number for number, name in enumerate(names)}
        return np.array([numbers[each] for each in classes], np.int64), tuple(map(printable, names))
    labels = np.array(list(map(int, classes)), np.int64)
    count = int(labels.max()) + 1 if len(labels) else 0
    if names_file.is_file():
        found = tuple(line.strip() for line in names_file.read_text("utf-8", "replace").splitlines() if line.strip())
        if len(found) < count:
            raise UserError(f"{names_file}: {len(found)} names of classes, but class {count - 1} occurs; remake it")
        return labels, found
    if count > max(MAX_UNNAMED_CLASSES, len(labels)):
        raise UserError(f"{root}: class {count - 1} would make {count:,} classes; number them from 0 without gaps")
    return labels, tuple(map(str, range(count)))
