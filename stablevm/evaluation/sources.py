"""Sources of images to evaluate: memory, a compressed archive, a data set, image files."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stablevm.data.dataset import PreparedDataset
from stablevm.preparation.pictures import TRANSFORMS, BadPictureError, Size, pixels, read_picture
from stablevm.preparation.source import Source
from stablevm.support.errors import UserError
from stablevm.support.files import sha256

TELLING = ("dataset.json", "*/dataset.json", "extractor.json", "extractor.safetensors")


class ImageSource(Protocol):
    """Images in a fixed order."""

    def __len__(self) -> int: ...

    def key(self, part: range) -> str:
        """A key for the images of a part; if keys are equal, so are the images."""

    def images(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """The images uint8 (n, H, W, 3) at `indices`, in that order."""


def content_sha256(path: Path) -> str:
    """What tells a reference or an extractor from another, wherever it lies: the SHA-256 of a file's content, and of a
    folder's that of the cards of its data sets or its extractor. Of a folder without these only its place is known.
    """
    if path.is_file():
        return sha256(path)
    files = [file for pattern in TELLING for file in sorted(path.glob(pattern))]
    known = {file.relative_to(path).as_posix(): sha256(file) for file in files} or str(path.resolve())
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def pixels_key(images: NDArray[np.uint8]) -> str:
    """A hash of the pixels of images uint8 (n, H, W, 3)."""
    return hashlib.sha256(str(images.shape).encode() + images.tobytes()).hexdigest()


def image_size(source: ImageSource) -> tuple[int, int]:
    """The height and width of the first image, in pixels."""
    height, width, _ = source.images([0]).shape[1:]
    return height, width


@dataclass(frozen=True)
class ArraySource:
    """Images in memory, or mapped from a file; their key is a hash of their pixels."""

    array: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.array)

    def key(self, part: range) -> str:
        return pixels_key(self.images(part))

    def images(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        return self.array[np.asarray(indices, np.int64)]


@dataclass
class StreamedSource:
    """Images that are read from the first to the last, in memory for those requested.

    A request for an image before the last one read starts again from the first, so request many at once, in order.
    """

    shape: tuple[int, ...]  # (N, H, W, 3)
    read: Callable[[], Iterator[bytes]]  # yields all images one after another, in pieces of any length
    _pieces: Iterator[bytes] = field(default=iter(()), repr=False)
    _rest: bytes = field(default=b"", repr=False)  # of the last piece
    _next: int | None = field(default=None, repr=False)  # the index of the next image; None before the first reading
    _keys: dict[range, str] = field(default_factory=dict, repr=False)
    # A part is asked for its key and then for its images: they are read once.
    _last: tuple[Sequence[int], NDArray[np.uint8]] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return self.shape[0]

    def key(self, part: range) -> str:
        if part not in self._keys:
            self._keys[part] = pixels_key(self.images(part))
        return self._keys[part]

    def images(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        if self._last is None or self._last[0] != indices:
            distinct, places = np.unique(np.asarray(indices, np.int64), return_inverse=True)
            found = np.empty((len(distinct), *self.shape[1:]), np.uint8)
            for image, index in zip(found, distinct.tolist(), strict=True):
                self._go_to(index)
                self._read_into(image)
            self._last = indices, found[places.reshape(-1)]
        return self._last[1]

    def _go_to(self, index: int) -> None:
        if self._next is None or index < self._next:
            self._pieces, self._rest, self._next = self.read(), b"", 0
        skipped = np.empty(self.shape[1:], np.uint8)
        while self._next < index:
            self._read_into(skipped)

    def _read_into(self, image: NDArray[np.uint8]) -> None:
        """Read the next image into `image`."""
        assert self._next is not None
        flat, filled = image.reshape(-1), 0
        while filled < len(flat):
            piece = self._rest or next(self._pieces)
            taken = piece[: len(flat) - filled]
            flat[filled : filled + len(taken)] = np.frombuffer(taken, np.uint8)
            filled, self._rest = filled + len(taken), piece[len(taken) :]
        self._next += 1
        if self._next == len(self):
            assert next(self._pieces, None) is None  # which compares checksums
            self._next = None


@dataclass
class DatasetSource:
    """The images of a prepared data set."""

    dataset: PreparedDataset
    # A part is asked for its key and then for its images: they are read once.
    _last: tuple[Sequence[int], NDArray[np.uint8]] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.dataset)

    def key(self, part: range) -> str:
        return pixels_key(self.images(part))

    def images(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        if self._last is None or self._last[0] != indices:
            self._last = indices, self.dataset.images(indices).permute(0, 2, 3, 1).contiguous().numpy()
        return self._last[1]


@dataclass
class FolderSource:
    """Image files, cropped to one size; their key is a hash of the files, so known files need not be decoded."""

    source: Source
    transform: str
    size: Size

    def __len__(self) -> int:
        return len(self.source)

    def key(self, part: range) -> str:
        digest = hashlib.sha256(f"{self.transform} {self.size}".encode())
        for index in part:
            with self.source.storage.open(self.source.names[index]) as file:
                digest.update(hashlib.sha256(file.read()).digest())
        return digest.hexdigest()

    def images(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """The images at `indices`; UserError for any file that can't be read or has another size."""
        return np.stack([self._image(self.source.names[index]) for index in indices])

    def _image(self, name: str) -> NDArray[np.uint8]:
        try:
            picture, _ = read_picture(partial(self.source.storage.open, name))
            return pixels(TRANSFORMS[self.transform](picture, self.size))
        except BadPictureError as error:
            raise UserError(
                f"{self.source.storage.root}/{name}: {error}; remove it, or leave bad files out with stablevm prepare "
                "convert"
            ) from None
