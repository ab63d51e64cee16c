"""Files of many images of one size without compression, each at a multiple of the same number of bytes."""

import errno
import gzip
import io
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from stablevm.support.errors import UserError

_BLOCK = 2**20  # bytes
AGAIN = "download it again"


@dataclass(frozen=True)
class RecordFile:
    """A file of `count` records of `length` bytes, the first at the byte `start`; a name in .gz is unpacked."""

    path: Path
    start: int
    length: int
    count: int

    @property
    def size(self) -> int:
        """The number of bytes, unpacked."""
        return self.start + self.length * self.count

    def names(self) -> list[str]:
        """A name for each record, in their order."""
        return [f"{self.path.name}/{number:08d}" for number in range(self.count)]


class RecordPictures:
    """The images in files of records; `picture` makes the file of an image from a record.

    A packed file is unpacked once, into a temporary file that vanishes with the process. Worker processes inherit it.
    """

    def __init__(self, root: Path, files: Sequence[RecordFile], picture: Callable[[bytes], bytes]) -> None:
        """UserError for a file that has not the size of its records."""
        self.root = root
        self.files, self.picture = {file.path.name: file for file in files}, picture
        self._opened = {name: unpacked(file.path, file.size) for name, file in self.files.items()}

    def open(self, name: str) -> IO[bytes]:
        """The file of one image; OSError if the records have become fewer since they were counted."""
        path = PurePosixPath(name)
        file, number = self.files[path.parts[0]], int(path.name)
        # `pread` does not use the file's position, which processes share after a fork
        record = os.pread(self._opened[path.parts[0]].fileno(), file.length, file.start + number * file.length)
        if len(record) != file.length:
            raise OSError(errno.ESTALE, "has become shorter while it was read; restore it", str(file.path))
        return io.BytesIO(self.picture(record))

    def __reduce__(self) -> "tuple[type[RecordPictures], tuple[Path, list[RecordFile], Callable[[bytes], bytes]]]":
        return RecordPictures, (self.root, list(self.files.values()), self.picture)


def grey_picture(values: bytes, width: int, height: int) -> bytes:
    """The PGM file of grey values, row by row."""
    return b"P5 %d %d 255\n" % (width, height) + values


def colour_picture(values: bytes, width: int, height: int) -> bytes:
    """The PPM file of red, green and blue values of each pixel, row by row."""
    return b"P6 %d %d 255\n" % (width, height) + values


def unpacked(path: Path, size: int) -> IO[bytes]:
    """The file, or its unpacked copy; UserError unless its content has `size` bytes.

    At most one byte more is unpacked, whatever the packed file holds.
    """
    if not is_packed(path):
        found = path.stat().st_size
        if found != size:
            raise UserError(f"{path}: has {found:,} bytes, but {size:,} by its header; {AGAIN}")
        return path.open("rb")
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (it is returned open)
    for block in _unpacked_blocks(path, size + 1):
        copy.write(block)
    copy.flush()
    if copy.tell() != size:
        found_text = "more" if copy.tell() > size else f"{copy.tell():,}"
        raise UserError(f"{path}: unpacks to {found_text} bytes, but to {size:,} by its header; {AGAIN}")
    return copy


def beginning(path: Path, count: int) -> bytes:
    """The first `count` bytes, unpacked, or all of a shorter file; UserError for one that can't be unpacked."""
    if is_packed(path):
        return b"".join(_unpacked_blocks(path, count))
    with path.open("rb") as file:
        return file.read(count)


def is_packed(path: Path) -> bool:
    """Whether the file is packed with gzip, by its name."""
    return path.suffix.lower() == ".gz"


def _unpacked_blocks(path: Path, limit: int) -> Iterator[bytes]:
    """The unpacked content in blocks, at most `limit` bytes of it."""
    try:
        with gzip.open(path) as file:
            while limit and (block := file.read(min(limit, _BLOCK))):
                yield block
                limit -= len(block)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: can't be unpacked ({str(error).lower().rstrip('.')}); {AGAIN}") from None
