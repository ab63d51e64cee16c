"""Parts of a safetensors file, read by their position in it.

Nothing is mapped into memory: where a file is cut short while it is in use, mapped pages end the process by SIGBUS
without a word, and in a loader's process that passes for a lack of shared memory. Here it is an error.
"""

import os
from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np
from safetensors import safe_open

from stablevm.data.streaming import NUMPY_NAMES, read_header

MOST_OPEN = 256  # files of a data set at a time: most systems allow a process 1,024


class OpenFile:
    """A descriptor for reading, closed when nobody holds it any more. OSError for a file of another size."""

    def __init__(self, path: str, size: int) -> None:
        self.number = os.open(path, os.O_RDONLY)
        if os.fstat(self.number).st_size != size:
            raise OSError(f"it has {os.fstat(self.number).st_size:,} bytes instead of {size:,}")

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


Opener = Callable[[str, int], OpenFile]


def opener() -> Opener:
    """Opens files by path and size, and keeps the last ones open."""
    return lru_cache(MOST_OPEN)(OpenFile)


class TensorFile:
    """The tensors of one file. Threads and forked processes may share it, as reads have no common position.

    Raises OSError or SafetensorError for a file that is none of the format, or has not the `size` given.
    """

    def __init__(self, path: str, size: int, open_file: Opener) -> None:
        self._path, self._size, self._open = path, size, open_file
        open_file(path, size)
        with safe_open(path, framework="np"):  # checks that the header is sound and fits the file
            header, start = read_header(path)
        header.pop("__metadata__", None)
        self._starts = {name: start + entry["data_offsets"][0] for name, entry in header.items()}
        self.shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        self.dtypes = {name: np.dtype(NUMPY_NAMES.get(entry["dtype"], "V")) for name, entry in header.items()}

    def read(self, name: str) -> np.ndarray:
        """A whole tensor; errors as of `read_into`."""
        values = np.empty(self.shapes[name], self.dtypes[name])
        self.read_into(name, [(bytes_of(values), 0)])
        return values

    def read_into(self, name: str, spans: Iterable[tuple[memoryview, int]]) -> None:
        """Fill each buffer with bytes of a tensor, from the byte beside it on.

        OSError with the file's name, or without a number where the file ends before.
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
    """The bytes of a contiguous array, to write into."""
    return values.reshape(-1).view(np.uint8).data
