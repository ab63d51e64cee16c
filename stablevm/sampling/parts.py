"""Generated images on their way into one archive: a folder of small files, each complete or absent."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stablevm.cards import read_object
from stablevm.errors import UserError
from stablevm.files import remove_temporary, write_json, write_with
from stablevm.sampling.archive import write_npy
from stablevm.sampling.protocol import Protocol, check_same

# A property of the folder, not an option: whatever the batch size and the number of processes, a part holds the same
# images, so that a run may go on with others. Small, as an interruption loses at most this much beyond a batch.
PART_LENGTH = 16
PROTOCOL_FILE = "protocol.json"


class PartFolder:
    """Images 0 to `num_images - 1` as files START-STOP.npy, uint8 (n, H, W, 3), beside the protocol they follow."""

    def __init__(self, folder: Path, num_images: int) -> None:
        self.folder = folder
        self.num_images = num_images

    def open(self, protocol: Protocol) -> None:
        """Make the folder, or go on in it; UserError when its images follow another protocol."""
        record = self.folder / PROTOCOL_FILE
        if record.exists():
            check_same(protocol, read_object(record, "--sample-dir", remedy="move the folder away"), self.folder)
        elif self.folder.exists() and any(self.folder.glob("*.npy")):
            raise UserError(f"{self.folder} holds parts without {PROTOCOL_FILE}; move the folder away")
        else:
            write_json(record, protocol)

    def missing(self, rank: int = 0, world_size: int = 1) -> list[range]:
        """Indices of the images of each absent part, of those that fall to process `rank` of `world_size`."""
        present = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
        return [part for part in self._parts()[rank::world_size] if self._path(part).name not in present]

    def num_present(self) -> int:
        """Number of images in the folder."""
        return self.num_images - sum(len(part) for part in self.missing())

    def write(self, part: range, images: NDArray[np.uint8]) -> None:
        def save(temporary: Path) -> None:
            with temporary.open("wb") as file:
                write_npy(file, [images], len(images))

        write_with(self._path(part), save)

    def chunks(self) -> Iterator[NDArray[np.uint8]]:
        """All images in order, part by part."""
        for part in self._parts():
            yield np.load(self._path(part))

    def pick(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """The images at `indices`, uint8 (len(indices), H, W, 3)."""
        parts = self._parts()
        files = [self._path(parts[index // PART_LENGTH]) for index in indices]
        return np.stack([np.load(file)[index % PART_LENGTH] for file, index in zip(files, indices, strict=True)])

    def sweep(self) -> None:
        """Remove what killed processes left of files they were writing; for when all parts are there."""
        remove_temporary(self.folder)

    def remove(self) -> None:
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def _parts(self) -> list[range]:
        indices = range(self.num_images)
        return [indices[start : start + PART_LENGTH] for start in indices[::PART_LENGTH]]

    def _path(self, part: range) -> Path:
        return self.folder / f"{part.start:06d}-{part.stop:06d}.npy"
