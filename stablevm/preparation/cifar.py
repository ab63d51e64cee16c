"""Images in the binary files of CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): labels, then red, green and blue planes."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stablevm.preparation.records import AGAIN, RecordFile, RecordPictures, colour_picture
from stablevm.preparation.source import Source
from stablevm.support.errors import UserError

_SIDE = 32
_VALUES = 3 * _SIDE**2
_NAMES = {10: "batches.meta.txt", 100: "fine_label_names.txt"}
_TRAIN, _TEST = tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"
_PICKLE = b"\x80"  # how the files of the Python version begin
_PICKLED = frozenset({"data_batch_1", "test_batch", "batches.meta", "train", "test", "meta"})


def splits_of(files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of each split, by the names of files; UserError for those of the Python version, which are pickles."""
    by_name = {path.name: path for path in files}
    for name in sorted(_PICKLED & by_name.keys()):
        with by_name[name].open("rb") as file:
            if file.read(1) == _PICKLE:
                raise UserError(
                    f"{by_name[name]}: a pickle, which can run any program when it is read; download CIFAR's binary "
                    "version (cifar-10-binary.tar.gz or cifar-100-binary.tar.gz) instead"
                )
    found = {"train": [by_name[name] for name in _TRAIN if name in by_name]}
    found |= {split: [by_name[name]] for split, name in (("test", _TEST),) if name in by_name}
    if len(files) > 1 and 0 < len(found["train"]) < len(_TRAIN):
        missing = next(name for name in _TRAIN if name not in by_name)
        raise UserError(f"{found['train'][0].parent}: {missing} is missing; {AGAIN}")
    if not any(found.values()) and (_NAMES[100] in by_name or len(files) == 1):
        found = {split: [by_name[f"{split}.bin"]] for split in ("train", "test") if f"{split}.bin" in by_name}
    return {split: paths for split, paths in found.items() if paths}


def open_cifar(root: Path, files: Sequence[Path]) -> Source:
    """The images and labels of files with `splits_of`'s names; of CIFAR-100 the fine ones. UserError for damaged files.

    The names of the classes are in a file beside them.
    """
    classes = 100 if files[0].name in ("train.bin", "test.bin") else 10
    before = classes // 100 + 1  # bytes before the pixels: CIFAR-100 has the coarse label first, then the fine one
    records = [RecordFile(path, 0, before + _VALUES, _count(path, before + _VALUES)) for path in files]
    labels = np.concatenate([_labels(file, before - 1) for file in records])
    wrong = labels >= classes
    if wrong.any():
        raise UserError(f"{files[0].parent}: holds the label {labels[wrong][0]}, expected 0 to {classes - 1}; {AGAIN}")
    pictures = RecordPictures(root, records, partial(_picture, before=before))
    names = [name for file in records for name in file.names()]
    return Source(pictures, names, labels, _class_names(files[0].with_name(_NAMES[classes]), classes))


def _count(path: Path, length: int) -> int:
    size = path.stat().st_size
    if not size or size % length:
        raise UserError(f"{path}: {size:,} bytes are no multiple of an image's {length:,}; {AGAIN}")
    return size // length


def _labels(file: RecordFile, column: int) -> NDArray[np.int64]:
    rows = np.memmap(file.path, np.uint8, "r").reshape(file.count, file.length)
    return rows[:, column].astype(np.int64)


def _picture(record: bytes, before: int) -> bytes:
    planes = np.frombuffer(record, np.uint8, offset=before).reshape(3, _SIDE, _SIDE)
    return colour_picture(planes.transpose(1, 2, 0).tobytes(), _SIDE, _SIDE)


def _class_names(path: Path, classes: int) -> tuple[str, ...]:
    """The names in the file, or the numbers of the classes without it."""
    if not path.is_file():
        return tuple(map(str, range(classes)))
    names = tuple(path.read_text(encoding="utf-8", errors="replace").split())
    if len(names) != classes:
        raise UserError(f"{path}: {len(names)} names of classes, expected {classes}; {AGAIN}")
    return names
