"""`dataset.json`: what a prepared data set holds. It is written last, so a folder without it is incomplete."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stablevm.networks.autoencoder import LatentSpec
from stablevm.support import files
from stablevm.support.cards import card_of, check_version, read_object
from stablevm.support.errors import UserError, arg
from stablevm.support.text import shown

MANIFEST_FILE = "dataset.json"
FORMAT_VERSION = 1
_DERIVED = ("format_version", "count")  # in the file, for people and other programs
REMEDY = "restore it, or remove the folder and prepare the data again"
ShardKind = Literal["latents", "images"]


@dataclass(frozen=True)
class ShardFile:
    """One file, as it was when it was written."""

    name: str
    size: int  # bytes
    sha256: str

    def __post_init__(self) -> None:
        """ValueError for a name that leads out of the data set's folder."""
        if self.name in ("", "..") or Path(self.name).name != self.name:
            raise ValueError(f"{self.name!r} is no name of a file in its folder")

    @classmethod
    def of(cls, path: Path) -> "ShardFile":
        return cls(path.name, path.stat().st_size, files.sha256(path))

    def is_intact(self, folder: Path) -> bool:
        """Whether the file in `folder` is there and has the recorded content, reread."""
        path = folder / self.name
        return path.is_file() and ShardFile.of(path) == self


@dataclass(frozen=True)
class Shard:
    """Consecutive rows of the data set; `images` is None where the set holds none, `latents` before they are made."""

    rows: int
    latents: ShardFile | None
    images: ShardFile | None

    def file(self, kind: ShardKind) -> ShardFile | None:
        return self.latents if kind == "latents" else self.images


@dataclass(frozen=True)
class Manifest:
    """The facts of a data set. A `ShardWriter` gets them without the last two, and fills those in."""

    class_names: tuple[str, ...]
    resolution: int  # side of the images, in pixels
    crop: str  # how the images were cut to squares, such as "center-crop-dhariwal"; "none" if they were square
    latent: LatentSpec
    has_flips: bool  # moments of the mirrored images too: a latent can't be mirrored
    has_images: bool
    precision: str = "fp32"  # in which the autoencoder worked
    compressed: bool = False  # images are PNG files instead of pixels
    class_counts: tuple[int, ...] = ()
    shards: tuple[Shard, ...] = ()

    @property
    def count(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def tensors(self, kind: ShardKind) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """The tensors in each file of a kind: the shape of one row, and the type of its values."""
        index = {"index": ((), np.dtype(np.int64))}
        if kind == "images" and self.compressed:
            return index | {"sizes": ((), np.dtype(np.int64)), "png": ((), np.dtype(np.uint8))}
        if kind == "images":
            return index | {"images": ((3, self.resolution, self.resolution), np.dtype(np.uint8))}
        channels, height, width = self.latent.shape
        names = ("moments", "moments_flip") if self.has_flips else ("moments",)
        moments = ((2 * channels, height, width), np.dtype(np.float16))
        return index | {"labels": ((), np.dtype(np.int64))} | dict.fromkeys(names, moments)

    def write(self, folder: Path) -> None:
        files.write_json(folder / MANIFEST_FILE, self.to_dict())

    @classmethod
    def read(cls, folder: str | Path) -> "Manifest":
        """Parse `folder`/dataset.json, without a look at the shards.

        Raises UserError when the folder or the file is absent, and when the file is damaged, of another format
        version, or contradicts itself.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{arg('folder')} {folder}: no such folder; give the folder of a prepared data set")
        if not (folder / MANIFEST_FILE).is_file():
            raise UserError(
                f"{arg('folder')} {folder}: no {MANIFEST_FILE} in it, so it is no prepared data set or its preparation "
                "was interrupted; run the preparation again"
            )
        where = f"{arg('folder')} {folder}: {MANIFEST_FILE}"
        values = read_object(folder / MANIFEST_FILE, f"{arg('folder')} {folder}", remedy=REMEDY)
        check_version(values, FORMAT_VERSION, where)
        manifest = card_of(cls, {k: v for k, v in values.items() if k not in _DERIVED}, where, remedy=REMEDY)
        manifest._check_complete(values.get("count"), where)
        return manifest

    def check_files(self, folder: Path, kind: ShardKind) -> None:
        """UserError for the first file of `kind` that is absent or has not the recorded size."""
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
        """Of all shards."""
        return [file for shard in self.shards for file in (shard.latents, shard.images) if file]

    def to_dict(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, "count": self.count, **asdict(self)}

    def _check_complete(self, count: Any, where: str) -> None:
        """UserError for a manifest of which `write` made no part, or only one; `count` is the one in the file."""
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
