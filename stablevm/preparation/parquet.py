"""Images in Parquet files, as data sets of the Hugging Face hub have them: bytes of image files, and labels."""

import errno
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from stablevm.data.listing import MAX_UNNAMED_CLASSES
from stablevm.preparation.records import AGAIN
from stablevm.preparation.source import ONE_CLASS, Source, printable
from stablevm.preparation.splits import split_in
from stablevm.support.errors import UserError
from stablevm.support.extras import need
from stablevm.support.options import some_of

_LARGEST_GROUP = 2**32  # bytes of a row group, of which one is in memory at a time
_LABELS = ("label", "labels", "fine_label", "class")  # names of columns of labels, without metadata that tell
_NONE = -1  # the label of images whose class is not told, in test splits


def splits_of(files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of each split, by their names."""
    found: dict[str, list[Path]] = {}
    for path in files:
        if path.suffix.lower() == ".parquet":
            found.setdefault(split_in(path.name), []).append(path)
    return found


def open_parquet(root: Path, files: Sequence[Path]) -> Source:
    """The images and labels of files of one split, which have the same columns; UserError for damaged files.

    The column of images holds bytes, or structures with `bytes`, as the library datasets writes them. The column of
    labels is called `label`, or is one that the metadata call a ClassLabel; they have the names of the classes.
    """
    need("a source of Parquet files", "pyarrow")
    tables = [_Table(path) for path in files]
    first = tables[0]
    for table in tables:
        if (table.image, table.label) != (first.image, first.label):
            raise UserError(f"{table.path}: other columns than {first.path.name} has; give files of one data set")
    names = [f"{table.path.name}/{row:08d}" for table in tables for row in range(table.rows)]
    pictures = ParquetPictures(root, files)
    if first.label is None:
        line = f"{root}: no column of labels, so all images have one class"
        return Source(pictures, names, np.zeros(len(names), np.int64), ONE_CLASS, warnings=(line,))
    values = [value for table in tables for value in table.labels()]
    if all(value in (None, _NONE) for value in values):
        line = f"{root}: its labels are not told, so all images have one class"
        return Source(pictures, names, np.zeros(len(names), np.int64), ONE_CLASS, warnings=(line,))
    labels, class_names = _numbered(values, first.class_names, names, root)
    return Source(pictures, names, labels, class_names)


class ParquetPictures:
    """The images in the rows of Parquet files. Each process keeps one row group in memory."""

    def __init__(self, root: Path, files: Sequence[Path]) -> None:
        self.root, self.files = root, {path.name: path for path in files}
        self._tables: dict[str, _Table] = {}
        self._group: tuple[str, int, Any] | None = None  # the file, the group's number, and its column of images

    def open(self, name: str) -> IO[bytes]:
        """The file of one image; OSError for a row without bytes."""
        path = PurePosixPath(name)
        table = self._tables.setdefault(path.parts[0], _Table(self.files[path.parts[0]]))
        number, row = table.group_of(int(path.name))
        if self._group is None or self._group[:2] != (path.parts[0], number):
            self._group = None  # so that only one is in memory
            self._group = (path.parts[0], number, table.images(number))
        content = self._group[2][row].as_py()
        if isinstance(content, Mapping):
            content = content.get("bytes")
        if not isinstance(content, bytes):
            raise OSError(errno.EINVAL, "no bytes of an image in this row", name)
        return io.BytesIO(content)

    def __reduce__(self) -> "tuple[type[ParquetPictures], tuple[Path, list[Path]]]":
        return ParquetPictures, (self.root, list(self.files.values()))


class _Table:
    """A Parquet file: its columns of images and labels, and where its rows are."""

    def __init__(self, path: Path) -> None:
        import pyarrow
        from pyarrow.parquet import ParquetFile

        self.path = path
        try:
            self._file = ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a readable Parquet file ({_first_line(error)}); {AGAIN}") from None
        schema, metadata = self._file.schema_arrow, self._file.metadata
        features = _features(schema.metadata or {})
        self.image = self._image_column(schema, features)
        self.label = self._label_column(schema, features)
        names = features.get(self.label or "", {}).get("names")
        self.class_names = tuple(map(printable, names)) if names and _are_texts(names) else None
        sizes = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        if any(group.total_byte_size > _LARGEST_GROUP for group in sizes):
            raise UserError(f"{path}: a row group of more than {_LARGEST_GROUP:,} bytes; write it in smaller groups")
        self._ends = np.cumsum([group.num_rows for group in sizes], dtype=np.int64)

    @property
    def rows(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def group_of(self, row: int) -> tuple[int, int]:
        """The number of the group that holds a row, and the row's number in it."""
        number = int(np.searchsorted(self._ends, row, side="right"))
        return number, row - (int(self._ends[number - 1]) if number else 0)

    def images(self, group: int) -> Any:
        """The column of images of one group."""
        return self._column(group, self.image).combine_chunks()

    def labels(self) -> Iterator[Any]:
        """The labels of all rows, as the file has them."""
        for group in range(len(self._ends)):
            yield from self._column(group, self.label).to_pylist()

    def _column(self, group: int, name: str | None) -> Any:
        import pyarrow

        try:
            return self._file.read_row_group(group, columns=[name]).column(0)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{self.path}: damaged ({_first_line(error)}); {AGAIN}") from None

    def _image_column(self, schema: Any, features: Mapping[str, Mapping[str, Any]]) -> str:
        told = [field.name for field in schema if features.get(field.name, {}).get("_type") == "Image"]
        found = told or [field.name for field in schema if _holds_bytes(field.type)]
        if len(found) == 1:
            return found[0]
        which = f"several columns of bytes ({some_of(found)})" if found else "no column of bytes"
        raise UserError(f"{self.path}: {which} among {some_of(schema.names)}; expected one column of image files")

    def _label_column(self, schema: Any, features: Mapping[str, Mapping[str, Any]]) -> str | None:
        told = [field.name for field in schema if features.get(field.name, {}).get("_type") == "ClassLabel"]
        return next((name for name in (*_LABELS, *told) if name in schema.names), None)


def _features(metadata: Mapping[bytes, bytes]) -> dict[str, Mapping[str, Any]]:
    """What the library datasets says of the columns; empty without it."""
    try:
        found = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return {name: what for name, what in found.items() if isinstance(what, Mapping)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _are_texts(names: Any) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def _numbered(
    values: Sequence[Any], class_names: tuple[str, ...] | None, names: Sequence[str], root: Path
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels and the names of classes; UserError for a label that is no class."""
    if class_names is None and all(isinstance(value, str) for value in values):
        texts = sorted(set(values))
        numbers = {text: number for number, text in enumerate(texts)}
        return np.array([numbers[value] for value in values], np.int64), tuple(map(printable, texts))
    limit = len(class_names) if class_names is not None else max(MAX_UNNAMED_CLASSES, len(values))
    for value, name in zip(values, names, strict=True):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < limit:
            shown = printable(str(value))[:40]
            raise UserError(f"{root}: {name} has the label {shown}, expected a class of 0 to {limit - 1:,}")
    labels = np.array(values, np.int64)
    return labels, class_names or tuple(map(str, range(int(labels.max()) + 1)))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
