"""The native layout: safetensors shards, read by row number.

A data set is a `dataset.json` (data/manifest.py) with shards of 8,192 to 16,384 rows. `latents-00000.safetensors` holds
`moments` (n, 2C, h, w) float16 (means, then standard deviations), optionally `moments_flip` (those of the mirrored
images), `labels` (n,) int64, and `index` (n,) int64, the samples' numbers in their source. `images-00000.safetensors`
holds `images` (n, 3, H, W) uint8 and the same `index`. If compressed, it holds instead of `images` the bytes of n PNG
files one after another, `png`, and their `sizes` (n,) int64.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from stablevm.data.dataset import Fingerprint, PreparedDataset, Rows, checked_rows, digest
from stablevm.data.manifest import MANIFEST_FILE, REMEDY, Manifest, Shard, ShardKind
from stablevm.data.png import decode_png
from stablevm.data.storage import READ_ERRORS, is_fault_of_file
from stablevm.data.tensor_file import Opener, TensorFile, bytes_of, opener
from stablevm.networks.autoencoder import LatentSpec
from stablevm.support.errors import UserError, arg


class ShardDataset(PreparedDataset):
    """A data set in shards.

    A shard is opened when its first row is requested; reading a row is one copy. Raises UserError for a folder without
    a readable manifest, and for files that are missing or have changed in size.
    """

    layout = "shards"

    def __init__(self, folder: str | Path, manifest: Manifest | None = None) -> None:
        """Open the folder; manifest: its manifest, if not yet written into it."""
        self.folder = Path(folder)
        self._given = manifest
        self.manifest = manifest or Manifest.read(self.folder)
        self.manifest.check_files(self.folder, "latents")
        self.latent = self.manifest.latent
        self.class_names = self.manifest.class_names
        self.resolution = self.manifest.resolution
        self.has_images = self.manifest.has_images
        self.has_flips = self.manifest.has_flips
        files = opener()
        self._shards = [_OpenShard(self.folder, self.manifest, shard, files) for shard in self.manifest.shards]
        self._ends = np.cumsum([shard.rows for shard in self.manifest.shards], dtype=np.int64)

    def __len__(self) -> int:
        return self.manifest.count

    def __reduce__(self) -> tuple[type["ShardDataset"], tuple[Path, Manifest | None]]:
        """Let a spawned worker open the files itself; a forked one shares them, since reads do not move a position."""
        return ShardDataset, (self.folder, self._given)

    def labels(self) -> Tensor:
        """The classes (N,) int64 of all samples; UserError if they contradict the counts in the manifest."""
        labels = self._column("labels")
        counts = np.bincount(labels.clip(0), minlength=self.num_classes)
        if labels.min() < 0 or counts.tolist() != list(self.manifest.class_counts):
            raise UserError(
                f"{arg('folder')} {self.folder}: the labels in its shards contradict the counts in {MANIFEST_FILE}; "
                f"{REMEDY}"
            )
        return torch.from_numpy(labels)

    def index(self) -> Tensor:
        return torch.from_numpy(self._column("index"))

    def image_index(self) -> Tensor:
        """The samples' numbers (N,) int64 in the source, as recorded in the shards of images."""
        return torch.from_numpy(np.concatenate([shard.read("images", "index") for shard in self._shards]))

    def moments(self, rows: Rows) -> Tensor:
        return torch.from_numpy(self._read("latents", "moments", rows))

    def moments_flip(self, rows: Rows) -> Tensor:
        return torch.from_numpy(self._read("latents", "moments_flip", rows))

    def images(self, rows: Rows) -> Tensor:
        if not self.manifest.compressed:
            return torch.from_numpy(self._read("images", "images", rows))
        rows = checked_rows(rows, len(self))
        values = np.empty((len(rows), 3, self.resolution, self.resolution), np.uint8)
        for row, (shard, local) in enumerate(zip(*self._locate(rows), strict=True)):
            values[row] = self._shards[shard].image(local)
        return torch.from_numpy(values)

    def describe(self, row: int) -> str:
        (shard,), _ = self._locate(checked_rows([row], len(self)))
        file = self.manifest.shards[shard].latents
        return f"row {row} (image {self.index()[row]} of the source{f', in {file.name}' if file else ''})"

    def fingerprint(self, *, with_images: bool) -> Fingerprint:
        """The fingerprint from the checksums in the manifest, without reading shards."""
        files = [(shard.rows, shard.latents, shard.images) for shard in self.manifest.shards]
        return Fingerprint(
            rows=len(self),
            class_names=digest(self.class_names),
            latents=digest(part for rows, latents, _ in files for part in (rows, latents and latents.sha256)),
            images=digest(images and images.sha256 for *_, images in files) if with_images else "",
        )

    def facts(self) -> list[tuple[str, str]]:
        manifest = self.manifest
        kind = ", compressed" if manifest.compressed else ""
        size = sum(file.size for file in manifest.files())
        return [
            ("crop", manifest.crop),
            ("encoded in", manifest.precision),
            ("with images", ("yes" if self.has_images else "no") + kind),
            ("shards", f"{len(manifest.shards):,}, {len(manifest.files()):,} files, {size / 1e9:.3g} GB"),
        ]

    def record(self, latent: LatentSpec) -> None:
        manifest = replace(self.manifest, latent=latent)
        manifest.write(self.folder)
        self.manifest, self.latent = manifest, latent

    def check_images(self) -> None:
        if not self.has_images:
            raise UserError(
                f"{arg('folder')} {self.folder}: prepared without images, which are needed here; prepare it with images"
            )
        self.manifest.check_files(self.folder, "images")

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate([shard.read("latents", name) for shard in self._shards])

    def _locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard of each row, and the row's position in it."""
        shards = np.searchsorted(self._ends, rows, side="right")
        return shards, rows - np.append(0, self._ends)[shards]

    def _read(self, kind: ShardKind, name: str, rows: Rows) -> np.ndarray:
        rows = checked_rows(rows, len(self))
        shape, dtype = self.manifest.tensors(kind)[name]
        values = np.empty((len(rows), *shape), dtype)
        buffer, size = bytes_of(values), math.prod(shape) * dtype.itemsize
        spans: dict[int, list[tuple[memoryview, int]]] = {}
        for start, end, shard, first in self._runs(rows):
            spans.setdefault(shard, []).append((buffer[start * size : end * size], first * size))
        for shard, wanted in spans.items():
            self._shards[shard].read_into(kind, name, wanted)
        return values

    def _runs(self, rows: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
        """Yield runs of consecutive rows, each of which is read by one copy.

        A run is its start and end in `rows`, its shard, and its first row in the shard.
        """
        shards, local = self._locate(rows)
        starts = np.flatnonzero((np.diff(rows, prepend=-2) != 1) | (np.diff(shards, prepend=-1) != 0))
        ends = np.append(starts[1:], len(rows))[: len(starts)]
        yield from zip(starts.tolist(), ends.tolist(), shards[starts].tolist(), local[starts].tolist(), strict=True)


class _OpenShard:
    """The files of one shard, each opened at first use and then checked against the manifest.

    UserError, naming the file, if it can't be read, is truncated, or does not hold the tensors of the manifest.
    """

    def __init__(self, folder: Path, manifest: Manifest, shard: Shard, files: Opener) -> None:
        self._folder, self._manifest, self._shard, self._open = folder, manifest, shard, files

    def read(self, kind: ShardKind, name: str) -> np.ndarray:
        """Read a whole tensor of the shard."""
        try:
            return self._file(kind).read(name)
        except OSError as error:
            raise self._unreadable(kind, error) from None

    def read_into(self, kind: ShardKind, name: str, spans: list[tuple[memoryview, int]]) -> None:
        """Fill each buffer with bytes of a tensor, beginning at the offset given with it."""
        try:
            self._file(kind).read_into(name, spans)
        except OSError as error:
            raise self._unreadable(kind, error) from None

    def image(self, row: int) -> np.ndarray:
        """Read an image of a compressed shard, uint8 (3, H, W)."""
        start, end = self._png_starts[row : row + 2].tolist()
        content = bytearray(end - start)
        self.read_into("images", "png", [(memoryview(content), start)])
        try:
            return decode_png(bytes(content)).transpose(2, 0, 1)
        except READ_ERRORS as error:
            raise self._error("images", f"holds an image that can't be read ({error})") from None

    @cached_property
    def _png_starts(self) -> np.ndarray:
        sizes = self.read("images", "sizes")
        starts = np.append(0, sizes.cumsum())
        if starts[-1] != self._images.shapes["png"][0] or (sizes < 1).any():
            raise self._error("images", "holds sizes of images that do not add up to its bytes")
        return starts

    def _file(self, kind: ShardKind) -> TensorFile:
        return self._latents if kind == "latents" else self._images

    @cached_property
    def _latents(self) -> TensorFile:
        return self._opened("latents")

    @cached_property
    def _images(self) -> TensorFile:
        opened = self._opened("images")
        latents = self._shard.latents
        if latents is not None and not np.array_equal(opened.read("index"), self.read("latents", "index")):
            raise self._error("images", f"does not hold the samples of {latents.name}")
        return opened

    def _opened(self, kind: ShardKind) -> TensorFile:
        file = self._shard.file(kind)
        if file is None:
            raise ValueError(f"{self._folder} holds no {kind}")
        try:
            opened = TensorFile(str(self._folder / file.name), file.size, self._open)
        except (SafetensorError, OSError) as error:
            raise self._unreadable(kind, error) from None
        for name, (shape, dtype) in self._manifest.tensors(kind).items():
            if name not in opened.shapes:
                raise self._error(kind, f"holds no {name}")
            found = f"{opened.dtypes[name]} {opened.shapes[name]}"
            rows = opened.shapes[name][:1] if name == "png" else (self._shard.rows,)  # bytes, not images
            if opened.shapes[name] != (*rows, *shape) or opened.dtypes[name] != dtype:
                raise self._error(kind, f"holds {name} of {found} instead of {dtype} {(*rows, *shape)}")
        return opened

    def _unreadable(self, kind: ShardKind, error: Exception) -> Exception:
        """The exception for an error in reading the file: the same one if due to the machine, otherwise UserError."""
        if isinstance(error, OSError) and not is_fault_of_file(error):
            return error
        return self._error(kind, f"can't be read ({error})")

    def _error(self, kind: ShardKind, fault: str) -> UserError:
        file = self._shard.file(kind)
        assert file is not None
        return UserError(f"{arg('folder')} {self._folder}: shard {file.name} {fault}; {REMEDY}")
