"""Reading parts of a safetensors file by their offset.

Files are not mapped into memory. If a mapped file is truncated while in use, the process is killed by SIGBUS without a
message, and in a loader's worker that looks like a lack of shared memory. Here it raises an error.
"""

import os
from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np
from safetensors import safe_open

from stablevm.data.streaming import NUMPY_NAMES, read_header

MOST_OPEN = 256  # open files of a data set; most systems allow 1,024 for a process


class OpenFile:
    """A file descriptor for reading, closed when it is no longer used. OSError if the file has another size."""

    def __init__(self, path: str, size: int) -> None:
        self.number = os.open(path, os.O_RDONLY)
        if os.fstat(self.number).st_size != size:
            raise OSError(f"it has {os.fstat(self.number).st_size:,} bytes instead of {size:,}")

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


Opener = Callable[[str, int], OpenFile]


def opener() -> Opener:
    """A function that opens files by path and size, and keeps the most recent ones open."""
    return lru_cache(MOST_OPEN)(OpenFile)


class TensorFile:
    """The tensors of a safetensors file. Threads and forked processes can share it, since reads do not move a position.

    Raises OSError or SafetensorError if the file has another format or size.
    """

    def __init__(self, path: str, size: int, open_file: Opener) -> None:
        self._path, self._size, self._open = path, size, open_file
        open_file(path, size)
        with safe_open(path, framework="np"):  # checks that the header is valid and fits the file
            header, start = read_header(path)
        header.pop("__metadata__", None)
        self._starts = {name: start + entry["data_offsets"][0] for name, entry in header.items()}
        self.shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        self.dtypes = {name: np.dtype(NUMPY_NAMES.get(entry["dtype"], "V")) for name, entry in header.items()}

    def read(self, name: str) -> np.ndarray:
        """Read a whole tensor; errors as in `read_into`."""
        values = np.empty(self.shapes[name], self.dtypes[name])
        self.read_into(name, [(bytes_of(values), 0)])
        return values

    def read_into(self, name: str, spans: Iterable[tuple[memoryview, int]]) -> None:
        """Fill each buffer with bytes of a tensor, beginning at the offset given with it.

        OSError with the file's name, or without an error number if the file is too short.
        """
        file = self._open(self._path, self._size)  # held while it is read, so that no other thread closes it
        first = self._starts[name]
        for buffer, start in spans:
            try:
                count = more = os.preadv(file.number, [buffer], first + start)
                while more and count < len(buffer):  # a call reads 2 GB at most
                    more = os.preadv(file.number, [buffer[count:]], first + start + count)
                    count += more
            except OSError as error:
                error.filename = self._path
                raise
            if count < len(buffer):
                raise OSError(f"it ends at byte {os.fstat(file.number).st_size:,} of {self._size:,}")


def bytes_of(values: np.ndarray) -> memoryview:
    """A writable view of the bytes of a contiguous array."""
    return values.reshape(-1).view(np.uint8).data
