"""Writing and reading `.npz` files: the one writer, and the one reader.

The files may be untrusted: the header of an array must agree with the length in the archive, and each member is checked
against its CRC.
"""

import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from stablevm.support.errors import UserError
from stablevm.support.text import meant, printable

GENERATED = "give the .npz that generation wrote"
WHOLE_BYTES = 2**30  # maximum size of an array that is read as a whole, which images are not
TEXT_BYTES = 2**24
# Exceptions that zipfile, its decompressors and NumPy raise for damaged data, and for unknown kinds of compression and
# encryption.
UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, struct.error, RuntimeError),
    *(ValueError, TypeError, SyntaxError, LookupError, ArithmeticError, MemoryError, tokenize.TokenError),
)


@dataclass(frozen=True)
class Header:
    """The header of an array in an archive."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran_order: bool
    length: int  # bytes before the array

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class NpzFile:
    """An .npz file, whose arrays are read one by one.

    remedy, repair: the last words of the messages for what is not an .npz file, and for a damaged one.
    """

    def __init__(self, path: Path, remedy: str = GENERATED, repair: str = "make it again") -> None:
        """Open the file; UserError if it is not a readable .npz file."""
        if path.is_dir():
            raise UserError(f"{path}: a folder, not an .npz file; {remedy}")
        if not path.is_file():
            raise UserError(f"{path}: no such file{meant(path)}; {remedy}")
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path}: not an .npz file, or cut short; {remedy}")
        self.path, self._repair = path, repair
        with self._reading("its directory"), zipfile.ZipFile(path) as archive:
            self._members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def header(self, name: str) -> Header:
        """The header of an array; UserError if it contradicts the length of the member."""
        with self._reading(name), self.opened(name) as member:
            return self._read_header(member, name)

    def array(self, name: str, largest: int = WHOLE_BYTES) -> NDArray[Any]:
        """A whole array of at most `largest` bytes, in the machine's byte order; UserError if it is damaged."""
        with self._reading(name), self.opened(name) as member:
            header = self._read_header(member, name)
            if header.nbytes > largest:
                raise UserError(
                    f"{self.path}: {name} has {header.nbytes:,} bytes, expected at most {largest:,}; {self._repair}"
                )
            content = b"".join(pieces(member, header.nbytes, self._members[name]))
            finish(member)
            flat = np.frombuffer(content, header.dtype, math.prod(header.shape))
            array = flat.reshape(header.shape, order="F" if header.fortran_order else "C")
            return array.astype(header.dtype.newbyteorder("="))

    @contextmanager
    def opened(self, name: str) -> Iterator[IO[bytes]]:
        """Open a member for reading, which decompresses its bytes."""
        with zipfile.ZipFile(self.path) as archive, archive.open(self._members[name]) as member:
            yield member

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Turn exceptions for damaged files into UserError."""
        try:
            yield
        except UserError:
            raise
        except (*UNREADABLE, OSError) as error:
            if isinstance(error, OSError) and error.filename is not None:
                raise  # due to the machine, such as a missing permission; the file may be intact
            cause = printable(" ".join(str(error).split())) or type(error).__name__
            raise UserError(f"{self.path}: {name} is damaged or can't be read ({cause}); {self._repair}") from None

    def _read_header(self, member: IO[bytes], name: str) -> Header:
        read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        major, _ = np.lib.format.read_magic(member)
        if major not in read_header:
            raise ValueError(f"an array of .npy version {major}")
        shape, fortran_order, dtype = read_header[major](member)
        if dtype.hasobject:
            raise ValueError("an array of Python objects")
        if any(size < 0 for size in shape):
            raise ValueError(f"an array of shape {shape}")
        header = Header(shape, dtype, fortran_order, member.tell())
        if header.length + header.nbytes != self._members[name].file_size:
            raise ValueError(
                f"its header says {dtype} {shape}, {header.nbytes:,} bytes, but it has "
                f"{self._members[name].file_size - header.length:,}"
            )
        return header

    def text(self, name: str) -> str:
        """A member that holds one text; UserError for another."""
        header = self.header(name)
        if header.dtype.kind != "U" or header.shape != ():
            raise UserError(f"{self.path}: {name} holds {header.dtype} {header.shape}, expected text; {self._repair}")
        return str(self.array(name, TEXT_BYTES).item())


def pieces(member: IO[bytes], count: int, info: zipfile.ZipInfo) -> Iterator[bytes]:
    """Yield the next `count` bytes of a member in pieces that need little memory, however well they are compressed.

    EOFError if the member ends before.
    """
    # zipfile limits the output of deflate; with other methods it decompresses at once all compressed bytes requested
    at_once = 2**20 if info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) else 2**12
    while count:
        piece = member.read(min(count, at_once))
        if not piece:
            raise EOFError(f"{count:,} bytes are missing")
        count -= len(piece)
        yield piece


def finish(member: IO[bytes]) -> None:
    """Read the end of a member, so that zipfile checks its CRC."""
    if member.read(1):
        raise ValueError("it is longer than its header says")


def write_npz(
    path: Path, name: str, chunks: Iterable[NDArray[np.uint8]], rows: int, arrays: Mapping[str, NDArray[Any]]
) -> None:
    """Write an array `name` of `rows` rows, in chunks of which one is in memory at a time, and then whole arrays.

    The bytes of the file depend only on its contents: all members have zip's default date.
    """
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
            write_npy(member, chunks, rows)
        for each, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{each}.npy"), "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def write_npy(file: IO[bytes], chunks: Iterable[NDArray[np.uint8]], rows: int) -> None:
    """Write chunks of a uint8 array with `rows` rows in all as one array, in NumPy's format.

    If the disk is full it raises OSError with ENOSPC, whereas the error of `np.save` has no number.
    """
    chunks = iter(chunks)
    first = next(chunks)
    shape = (rows, *first.shape[1:])
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    for chunk in chain([first], chunks):
        file.write(np.ascontiguousarray(chunk).data)
