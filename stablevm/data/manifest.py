"""`dataset.json`, the manifest of a prepared data set. It is written last, so a folder without it is incomplete."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stablevm.networks.autoencoder import LatentSpec
from stablevm.support import files
from stablevm.support.cards import card_of, check_version, read_object
from stablevm.support.errors import UserError, arg
from stablevm.support.text import meant, shown

MANIFEST_FILE = "dataset.json"
FORMAT_VERSION = 1
_DERIVED = ("format_version", "count")  # written for readers of the file, but not fields of Manifest
REMEDY = "restore it, or remove the folder and prepare the data again"
ShardKind = Literal["latents", "images"]


@dataclass(frozen=True)
class ShardFile:
    """A file of a shard: its name, size and checksum when it was written."""

    name: str
    size: int  # bytes
    sha256: str

    def __post_init__(self) -> None:
        """Raise ValueError for a name that leads out of the data set's folder."""
        if self.name in ("", "..") or Path(self.name).name != self.name:
            raise ValueError(f"{self.name!r} is not the name of a file in its folder")

    @classmethod
    def of(cls, path: Path) -> "ShardFile":
        """The name, size and checksum of an existing file."""
        return cls(path.name, path.stat().st_size, files.sha256(path))

    def is_intact(self, folder: Path) -> bool:
        """Whether the file exists in `folder` and still has the recorded content, which is read again."""
        path = folder / self.name
        return path.is_file() and ShardFile.of(path) == self


@dataclass(frozen=True)
class Shard:
    """The files of consecutive rows; `images` is None if the set has none, `latents` until they are encoded."""

    rows: int
    latents: ShardFile | None
    images: ShardFile | None

    def file(self, kind: ShardKind) -> ShardFile | None:
        return self.latents if kind == "latents" else self.images


@dataclass(frozen=True)
class Manifest:
    """The facts about a data set. A `ShardWriter` takes them without the last two fields, and fills those in."""

    class_names: tuple[str, ...]
    resolution: int  # side of the images, in pixels
    crop: str  # how the images were cropped to squares, such as "center-crop-dhariwal"; "none" if they were square
    latent: LatentSpec
    has_flips: bool  # whether it has moments of the mirrored images, since a latent can't be mirrored
    has_images: bool
    precision: str = "fp32"  # of the autoencoder's arithmetic
    compressed: bool = False  # whether images are stored as PNG files instead of pixels
    class_counts: tuple[int, ...] = ()
    shards: tuple[Shard, ...] = ()

    @property
    def count(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def tensors(self, kind: ShardKind) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """The tensors in each file of a kind: the shape of one row, and the dtype."""
        index = {"index": ((), np.dtype(np.int64))}
        if kind == "images" and self.compressed:
            return index | {"sizes": ((), np.dtype(np.int64)), "png": ((), np.dtype(np.uint8))}
        if kind == "images":
            return index | {"images": ((3, self.resolution, self.resolution), np.dtype(np.uint8))}
        names = ("moments", "moments_flip") if self.has_flips else ("moments",)
        moments = (self.latent.moments_shape, np.dtype(np.float16))
        return index | {"labels": ((), np.dtype(np.int64))} | dict.fromkeys(names, moments)

    def write(self, folder: Path) -> None:
        files.write_json(folder / MANIFEST_FILE, self.to_dict())

    @classmethod
    def read(cls, folder: str | Path) -> "Manifest":
        """Read `folder`/dataset.json, without checking the shards.

        Raises UserError if the folder or the file is missing, or if the file is damaged, has another format version,
        or contradicts itself.
        """
        folder = Path(folder)
        if folder.is_file():
            raise UserError(f"{arg('folder')} {folder}: a file; give the folder of a prepared data set")
        if not folder.is_dir():
            raise UserError(
                f"{arg('folder')} {folder}: no such folder{meant(folder)}; give the folder of a prepared data set"
            )
        if not (folder / MANIFEST_FILE).is_file():
            raise UserError(
                f"{arg('folder')} {folder}: it has no {MANIFEST_FILE}, so it is not a prepared data set, or its "
                "preparation was interrupted; prepare it (stablevm prepare), or run the preparation again"
            )
        where = f"{arg('folder')} {folder}: {MANIFEST_FILE}"
        values = read_object(folder / MANIFEST_FILE, f"{arg('folder')} {folder}", remedy=REMEDY)
        check_version(values, FORMAT_VERSION, where)
        manifest = card_of(cls, {k: v for k, v in values.items() if k not in _DERIVED}, where, remedy=REMEDY)
        manifest._check_complete(values.get("count"), where)
        return manifest

    def check_files(self, folder: Path, kind: ShardKind) -> None:
        """Raise UserError for the first file of `kind` that is missing or does not have the recorded size."""
        for shard in self.shards:
            file = shard.file(kind)
            if file is None:
                continue
            path = folder / file.name
            if not path.is_file():
                raise UserError(f"{arg('folder')} {folder}: shard {file.name} is missing; {REMEDY}")
            if path.stat().st_size != file.size:
                raise UserError(
                    f"{arg('folder')} {folder}: shard {file.name} has {path.stat().st_size:,} bytes instead of "
                    f"{file.size:,}; {REMEDY}"
                )

    def files(self) -> list[ShardFile]:
        """The files of all shards."""
        return [file for shard in self.shards for file in (shard.latents, shard.images) if file]

    def to_dict(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, "count": self.count, **asdict(self)}

    def _check_complete(self, count: Any, where: str) -> None:
        """Raise UserError for a manifest that `write` can't have written; count: the number in the file."""
        fault = None
        if not self.shards:
            fault = "no shards"
        elif not count == self.count == sum(self.class_counts):
            fault = (
                f"count {shown(count)}, rows of shards {self.count}, sum of class_counts {sum(self.class_counts)} "
                "are not equal"
            )
        elif len(self.class_counts) != len(self.class_names):
            fault = f"{len(self.class_names)} class_names, {len(self.class_counts)} class_counts"
        elif any((shard.images is not None) != self.has_images for shard in self.shards):
            fault = f"has_images is {str(self.has_images).lower()}, but the shards say otherwise"
        elif any(shard.latents is None for shard in self.shards):
            fault = "a shard without latents"
        if fault:
            raise UserError(f"{where} is damaged ({fault}); {REMEDY}")
