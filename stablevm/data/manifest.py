"""`dataset.json`: what a prepared data set holds. It is written last, so a folder without it is incomplete."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stablevm import files
from stablevm.autoencoder import LatentSpec
from stablevm.errors import UserError

MANIFEST_FILE = "dataset.json"
FORMAT_VERSION = 1
REMEDY = "restore it, or remove the folder and prepare the data again"
ShardKind = Literal["latents", "images"]


@dataclass(frozen=True)
class ShardFile:
    """One file, as it was when it was written."""

    name: str
    size: int  # bytes
    sha256: str

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

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Shard":
        images = values["images"]
        return cls(
            rows=values["rows"],
            latents=ShardFile(**values["latents"]),
            images=None if images is None else ShardFile(**images),
        )


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
            raise UserError(f"--data-dir {folder}: no such folder; give the folder of a prepared data set")
        if not (folder / MANIFEST_FILE).is_file():
            raise UserError(
                f"--data-dir {folder}: no {MANIFEST_FILE} in it, so it is no prepared data set or its preparation "
                "was interrupted; run the preparation again"
            )
        values = files.read_json(folder / MANIFEST_FILE, f"--data-dir {folder}")
        version = values.get("format_version") if isinstance(values, dict) else None
        if version != FORMAT_VERSION:
            raise UserError(
                f"--data-dir {folder}: {MANIFEST_FILE} has format version {version}, this program reads "
                f"{FORMAT_VERSION}; prepare the data again or use the program that wrote it"
            )
        try:
            return cls.from_dict(values)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"--data-dir {folder}: {MANIFEST_FILE} is damaged ({type(error).__name__}: {error}); {REMEDY}"
            ) from None

    def check_files(self, folder: Path, kind: ShardKind) -> None:
        """UserError for the first file of `kind` that is absent or has not the recorded size."""
        for shard in self.shards:
            file = shard.file(kind)
            if file is None:
                continue
            path = folder / file.name
            if not path.is_file():
                raise UserError(f"--data-dir {folder}: shard {file.name} is missing; {REMEDY}")
            if path.stat().st_size != file.size:
                raise UserError(
                    f"--data-dir {folder}: shard {file.name} has {path.stat().st_size:,} bytes instead of "
                    f"{file.size:,}; {REMEDY}"
                )

    def files(self) -> list[ShardFile]:
        """Of all shards."""
        return [file for shard in self.shards for file in (shard.latents, shard.images) if file]

    def to_dict(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, "count": self.count, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Manifest":
        """Raises KeyError, TypeError or ValueError for values that `to_dict` can't have made."""
        manifest = cls(
            class_names=tuple(values["class_names"]),
            resolution=values["resolution"],
            crop=values["crop"],
            latent=LatentSpec.from_dict(values["latent"]),
            has_flips=values["has_flips"],
            has_images=values["has_images"],
            precision=values.get("precision", cls.precision),
            compressed=values.get("compressed", cls.compressed),
            class_counts=tuple(values["class_counts"]),
            shards=tuple(map(Shard.from_dict, values["shards"])),
        )
        if not manifest.shards:
            raise ValueError("no shards")
        if not values["count"] == manifest.count == sum(manifest.class_counts):
            raise ValueError(
                f"count {values['count']}, rows of shards {manifest.count}, sum of class_counts "
                f"{sum(manifest.class_counts)} are not equal"
            )
        if len(manifest.class_counts) != len(manifest.class_names):
            raise ValueError(f"{len(manifest.class_names)} class_names, {len(manifest.class_counts)} class_counts")
        if any((shard.images is not None) != manifest.has_images for shard in manifest.shards):
            raise ValueError(f"has_images is {manifest.has_images}, but the shards say otherwise")
        return manifest
