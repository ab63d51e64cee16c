"""Writing safetensors files piece by piece, with one piece in memory at a time, and joining such files."""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stablevm.support import files

_FORMAT_NAMES = {
    "float16": "F16",
    "float32": "F32",
    "int64": "I64",
    "uint8": "U8",
}  # names of dtypes in NumPy and in the format
NUMPY_NAMES = {ours: numpy for numpy, ours in _FORMAT_NAMES.items()}
_COPY_BYTES = 2**20


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor to be written in pieces along its first axis, each of which is made when it is written."""

    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Iterable[np.ndarray]

    @classmethod
    def of(cls, values: np.ndarray) -> "StreamedTensor":
        return cls(values.dtype, values.shape, [values])


def write_streamed(
    target: Path, tensors: Mapping[str, StreamedTensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file piece by piece, with one piece in memory at a time.

    The file has the length of the header, the header in JSON padded to a multiple of 8 bytes, and the bytes of the
    tensors. Tensors with the widest dtype come first, so that all are aligned.
    """
    ordered = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name in ordered:
        tensor = tensors[name]
        end = position + tensor.dtype.itemsize * int(np.prod(tensor.shape, dtype=np.int64))
        header[name] = {
            "dtype": _FORMAT_NAMES[tensor.dtype.name],
            "shape": tensor.shape,
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with files.replacing(target) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in ordered:
            for piece in tensors[name].pieces:
                file.write(np.ascontiguousarray(piece).data)


def join_files(parts: Sequence[Path], names: Sequence[str], target: Path) -> None:
    """Concatenate the tensors `names` of several safetensors files along their first axis into one file."""
    headers = list(map(read_header, parts))

    def joined(name: str) -> StreamedTensor:
        entries = [header[name] for header, _ in headers]
        dtype = np.dtype(NUMPY_NAMES[entries[0]["dtype"]])
        spans = [
            (path, start + entry["data_offsets"][0], start + entry["data_offsets"][1])
            for path, (_, start), entry in zip(parts, headers, entries, strict=True)
        ]
        count = sum(entry["shape"][0] for entry in entries)
        pieces = (piece for span in spans for piece in _pieces_of_file(*span))
        return StreamedTensor(dtype, (count, *entries[0]["shape"][1:]), pieces)

    write_streamed(target, {name: joined(name) for name in names})


def read_header(path: str | Path) -> tuple[dict[str, Any], int]:
    """Read the header of a safetensors file, and the offset at which the bytes of its tensors begin."""
    with Path(path).open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), 8 + length


def _pieces_of_file(path: Path, start: int, end: int) -> Iterator[np.ndarray]:
    """Yield bytes `start` to `end` of a file, read into one buffer, which is faster than mapping its pages."""
    buffer = np.empty(min(_COPY_BYTES, end - start), np.uint8)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while start < end:
            count = file.readinto(buffer[: end - start].data)
            if not count:
                raise OSError(f"{path}: ends before byte {end}")
            yield buffer[:count]
            start += count
