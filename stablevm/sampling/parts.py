"""The folder of small files that holds generated images until all are complete."""

import hashlib
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stablevm.sampling.provenance import Provenance, check_same
from stablevm.support.cards import read_object
from stablevm.support.errors import UserError
from stablevm.support.files import remove_temporary, write_json, write_with
from stablevm.support.npz import write_npy

# Fixed, not an option: a part holds the same images for any batch size and number of processes, so that both may change
# when a run resumes. Small, because an interruption loses at most this much beyond a batch.
PART_LENGTH = 16
PROTOCOL_FILE = "protocol.json"
_CHECKSUM_BYTES = 32


class PartFolder:
    """A folder with images 0 to `num_images - 1` as files START-STOP.npy, uint8 (n, H, W, 3), and their provenance.

    After its array each file has a checksum of the provenance, the images' numbers and the array, by which a damaged
    part, or one with other images, is detected.
    """

    def __init__(self, folder: Path, num_images: int, provenance: Provenance) -> None:
        self.folder = folder
        self.num_images = num_images
        self.provenance = provenance

    def open(self) -> None:
        """Make the folder, or resume in it; UserError if its images have another provenance."""
        if not self._is_ours():
            write_json(self.folder / PROTOCOL_FILE, self.provenance)

    def missing(self, rank: int = 0, world_size: int = 1) -> list[range]:
        """The indices of the images of each missing part that belongs to process `rank` of `world_size`."""
        present = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
        return [part for part in self._parts()[rank::world_size] if self._path(part).name not in present]

    def drop_damaged(self, rank: int = 0, world_size: int = 1) -> list[range]:
        """Remove parts of this process that are damaged or hold other images, and return them.

        UserError if the folder's images have another provenance.
        """
        damaged = []
        for part in self._parts()[rank::world_size] if self._is_ours() else ():
            path = self._path(part)
            if path.exists() and self._content(part) is None:
                path.unlink(missing_ok=True)
                damaged.append(part)
        return damaged

    def num_present(self) -> int:
        """The number of images in the folder."""
        return self.num_images - sum(len(part) for part in self.missing())

    def write(self, part: range, images: NDArray[np.uint8]) -> None:
        array = io.BytesIO()
        write_npy(array, [images], len(images))
        content = array.getvalue()
        write_with(self._path(part), lambda temporary: temporary.write_bytes(content + self._checksum(part, content)))

    def chunks(self) -> Iterator[NDArray[np.uint8]]:
        """Yield all images in order, part by part; UserError for a damaged part."""
        for part in self._parts():
            yield self._read(part)

    def pick(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """The images at `indices`: uint8 (len(indices), H, W, 3); UserError for a damaged part."""
        parts, numbers = self._parts(), [index // PART_LENGTH for index in indices]
        read = {number: self._read(parts[number]) for number in dict.fromkeys(numbers)}
        return np.stack([read[number][index % PART_LENGTH] for number, index in zip(numbers, indices, strict=True)])

    def sweep(self) -> None:
        """Remove temporary files of killed processes; call it when all parts are complete."""
        remove_temporary(self.folder)

    def remove(self) -> None:
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def _is_ours(self) -> bool:
        """Whether the folder has been started; UserError if with another provenance."""
        record = self.folder / PROTOCOL_FILE
        if record.exists():
            check_same(self.provenance, read_object(record, "--sample-dir", remedy="move the folder away"), self.folder)
            return True
        if self.folder.exists() and any(self.folder.glob("*.npy")):
            raise UserError(f"{self.folder} holds parts without {PROTOCOL_FILE}; move the folder away")
        return False

    def _read(self, part: range) -> NDArray[np.uint8]:
        content = self._content(part)
        if content is None:
            raise UserError(f"{self._path(part)}: damaged; run the same command again, which makes its images again")
        return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)

    def _content(self, part: range) -> bytes | None:
        """The bytes of the part's array; None if the file is not what `write` made of these images."""
        content = self._path(part).read_bytes()
        array, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
        return array if checksum == self._checksum(part, array) else None

    def _checksum(self, part: range, array: bytes) -> bytes:
        of_what = json.dumps([self.provenance, part.start, part.stop], sort_keys=True)
        return hashlib.sha256(of_what.encode() + hashlib.sha256(array).digest()).digest()

    def _parts(self) -> list[range]:
        indices = range(self.num_images)
        return [indices[start : start + PART_LENGTH] for start in indices[::PART_LENGTH]]

    def _path(self, part: range) -> Path:
        return self.folder / f"{part.start:06d}-{part.stop:06d}.npy"
