"""Images in IDX files (LeCun, 1998), packed or not: MNIST, Fashion-MNIST, KMNIST, EMNIST and others of their form."""

import re
import struct
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stablevm.preparation.config import MAX_SIDE
from stablevm.preparation.records import AGAIN, RecordFile, RecordPictures, beginning, grey_picture, unpacked
from stablevm.preparation.source import ONE_CLASS, Source
from stablevm.support.errors import UserError

# The header is two zeros, the type of values, the number of lengths, and these lengths; unsigned bytes have type 8.
_IMAGES, _LABELS = b"\0\0\x08\x03", b"\0\0\x08\x01"
_NAME = re.compile(r"(?P<split>.*?)[-_.]?images?[-_.]idx3[-_.]ubyte(?P<packed>\.gz)?", re.IGNORECASE)
_TEST = re.compile(r"(.*[-_.])?t10k", re.IGNORECASE)  # what MNIST calls its test split, of ten thousand images


def splits_of(files: Sequence[Path]) -> dict[str, list[Path]]:
    """The file of images of each split, by the names of files; one that is there unpacked too is not taken packed."""
    found: dict[str, list[Path]] = {}
    for path in files:  # sorted by name, so an unpacked file comes first
        match = _NAME.fullmatch(path.name)
        if match is not None:
            found.setdefault(_split_name(match["split"]), [path])
    return found


def open_idx(root: Path, files: Sequence[Path]) -> Source:
    """The images of a file and their labels, in the file beside it whose name has "labels" for "images".

    Without such a file all images have one class. UserError for files that are damaged or do not belong together.
    """
    (path,) = files
    count, height, width = _lengths(path, _IMAGES)
    if not count or not 1 <= min(height, width) <= max(height, width) <= MAX_SIDE:
        raise UserError(f"{path}: {count:,} images of {height:,} x {width:,} pixels by its header; {AGAIN}")
    records = RecordFile(path, 4 + 4 * 3, height * width, count)
    pictures = RecordPictures(root, [records], partial(grey_picture, width=width, height=height))
    beside = _labels_beside(path)
    if beside is None:
        line = f"{path}: no labels beside it, so all images have one class"
        return Source(pictures, records.names(), np.zeros(count, np.int64), ONE_CLASS, warnings=(line,))
    labels = _labels(beside, path, count)
    return Source(pictures, records.names(), labels, tuple(map(str, range(int(labels.max()) + 1))))


def _split_name(found: str) -> str:
    if _TEST.fullmatch(found):
        return "test"
    return found or "all"


def _labels_beside(path: Path) -> Path | None:
    name = re.sub("idx3", "idx1", re.sub("image", "label", path.name, flags=re.IGNORECASE), flags=re.IGNORECASE)
    plain = name.removesuffix(".gz")
    return next((each for each in (path.with_name(plain), path.with_name(f"{plain}.gz")) if each.is_file()), None)


def _labels(path: Path, images: Path, count: int) -> NDArray[np.int64]:
    (labels,) = _lengths(path, _LABELS)
    if labels != count:
        raise UserError(f"{path}: {labels:,} labels, but {images.name} has {count:,} images; {AGAIN}")
    with unpacked(path, 8 + count) as file:
        file.seek(8)
        return np.frombuffer(file.read(count), np.uint8).astype(np.int64)


def _lengths(path: Path, mark: bytes) -> tuple[int, ...]:
    """The lengths in the header of a file that begins with `mark`."""
    dimensions = mark[3]
    header = beginning(path, 4 + 4 * dimensions)
    if header[:4] != mark or len(header) != 4 + 4 * dimensions:
        what = "images" if dimensions == 3 else "labels"
        raise UserError(
            f"{path}: begins with {header[:4].hex(' ') or 'nothing'}, but IDX files of {what} in bytes begin with "
            f"{mark.hex(' ')}; {AGAIN}"
        )
    return struct.unpack(f">{dimensions}I", header[4:])
