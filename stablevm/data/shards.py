"""The native layout: safetensors shards, written once, complete or absent, and read by row number.

A data set is `dataset.json` (data/manifest.py) with shards of 8,192 to 16,384 rows. `latents-00000.safetensors` holds
`moments` (n, 2C, h, w) float16 (mean, then standard deviation), `moments_flip` (the same of the mirrored image) where
prepared, `labels` (n,) int64 and `index` (n,) int64, the sample's number in its source. `images-00000.safetensors`
holds `images` (n, 3, H, W) uint8 and the same `index`.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stablevm import files
from stablevm.data.manifest import MANIFEST_FILE, REMEDY, Manifest, Shard, ShardFile, ShardKind
from stablevm.errors import UserError

MIN_ROWS, MAX_ROWS = (
    8_192,
    16_384,
)  # per shard: few enough files for a million samples, small enough to rewrite
Rows = Sequence[int] | np.ndarray | Tensor


def shard_name(kind: ShardKind, number: int) -> str:
    return f"{kind}-{number:05d}.safetensors"


class ShardWriter:
    """Collects rows and writes a shard whenever `rows_per_shard` are there; `finish` writes the rest and the manifest.

    Until `finish` returns the folder holds no manifest, so an interrupted writer leaves nothing that could pass for
    a data set; the next writer replaces its shards. Raises UserError for a folder that holds a data set already, or
    for `rows_per_shard` out of range.
    """

    def __init__(self, folder: str | Path, description: Manifest, rows_per_shard: int = MIN_ROWS) -> None:
        if not MIN_ROWS <= rows_per_shard <= MAX_ROWS:
            raise UserError(f"rows per shard {rows_per_shard}: expected {MIN_ROWS} to {MAX_ROWS}")
        self.folder = Path(folder)
        if (self.folder / MANIFEST_FILE).exists():
            raise UserError(f"{self.folder}: holds a prepared data set already; give another folder or remove it")
        self.description = description
        self.rows_per_shard = rows_per_shard
        kinds: tuple[ShardKind, ...] = ("latents", "images") if description.has_images else ("latents",)
        self._names = {kind: tuple(description.tensors(kind)) for kind in kinds}
        self._buffers = {
            name: torch.from_numpy(np.empty((rows_per_shard, *shape), dtype))
            for kind in kinds
            for name, (shape, dtype) in description.tensors(kind).items()
        }
        self._filled = 0
        self._shards: list[Shard] = []
        self._class_counts = np.zeros(len(description.class_names), np.int64)

    def add(
        self,
        *,
        moments: Tensor,
        labels: Tensor,
        index: Tensor,
        images: Tensor | None = None,
        moments_flip: Tensor | None = None,
    ) -> None:
        """Append n rows, of the shapes in the module's docstring; floating-point moments are stored as float16.

        Raises ValueError for tensors that the description does not announce and labels without a class name.
        """
        optional = {"images": images, "moments_flip": moments_flip}
        rows = {"moments": moments, "labels": labels, "index": index}
        rows |= {name: tensor for name, tensor in optional.items() if tensor is not None}
        if rows.keys() != self._buffers.keys():
            raise ValueError(f"rows of {sorted(rows)} given to a data set of {sorted(self._buffers)}")
        for name, tensor in rows.items():
            expected = (len(index), *self._buffers[name].shape[1:])
            if tensor.shape != expected:
                raise ValueError(f"{name} of shape {tuple(tensor.shape)} given, {expected} expected")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self._class_counts):
            raise ValueError(f"labels {labels.unique().tolist()} given, {len(self._class_counts)} class names")
        begin = 0
        while begin < len(index):
            end = min(len(index), begin + self.rows_per_shard - self._filled)
            for name, tensor in rows.items():
                self._buffers[name][self._filled : self._filled + end - begin] = tensor[begin:end]
            self._filled += end - begin
            begin = end
            if self._filled == self.rows_per_shard:
                self._write_shard()

    def finish(self) -> Manifest:
        """Write the last shard and the manifest, and clear what earlier, interrupted writers left half-written.

        Raises UserError if no row was added, or if moments are not finite (as `add` does when a shard is full).
        """
        if self._filled:
            self._write_shard()
        if not self._shards:
            raise UserError(f"{self.folder}: no samples to write; check the source of the data")
        for path in filter(files.is_temporary, self.folder.iterdir()):
            path.unlink()
        counts = tuple(self._class_counts.tolist())
        manifest = replace(self.description, class_counts=counts, shards=tuple(self._shards))
        manifest.write(self.folder)
        return manifest

    def _write_shard(self) -> None:
        tensors = {name: buffer[: self._filled] for name, buffer in self._buffers.items()}
        for name in ("moments", "moments_flip"):
            if name in tensors and not (finite := tensors[name].isfinite().flatten(1).all(1)).all():
                sample = int(tensors["index"][~finite][0])
                raise UserError(f"{self.folder}: {name} of sample {sample} are not finite; leave that sample out")
        written: dict[ShardKind, ShardFile] = {}
        for kind, names in self._names.items():
            path = self.folder / shard_name(kind, len(self._shards))
            files.write_with(path, partial(save_file, {name: tensors[name] for name in names}))
            written[kind] = ShardFile.of(path)
        self._shards.append(Shard(self._filled, written["latents"], written.get("images")))
        self._class_counts += np.bincount(tensors["labels"].numpy(), minlength=len(self._class_counts))
        self._filled = 0


def dataset_folder(path: str | Path, split: str) -> Path:
    """`path` itself if it holds a data set, else its folder called `split` where there is one."""
    path = Path(path)
    if (path / MANIFEST_FILE).is_file() or not (path / split).is_dir():
        return path
    return path / split


def open_dataset(path: str | Path, split: str = "train") -> "PreparedDataset":
    """Open the data set in `path`, or in `path`/`split` when `path` itself is none.

    Raises UserError for what is no data set, and for shards that are missing or have changed in size.
    """
    return PreparedDataset(dataset_folder(path, split))


class PreparedDataset:
    """A data set on disk. `rows` are positions 0..N-1, in any order; repeated ones are allowed.

    A shard is opened when its first row is asked for, and stays mapped in memory: reading a row is one copy. Files of
    images are neither checked nor opened until images are asked for.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        self.manifest.check_files(self.folder, "latents")
        self.latent = self.manifest.latent
        self.class_names = self.manifest.class_names
        self.num_classes = len(self.class_names)
        self.resolution = self.manifest.resolution
        self.has_images = self.manifest.has_images
        self.has_flips = self.manifest.has_flips
        self._shards = [_MappedShard(self.folder, self.manifest, shard) for shard in self.manifest.shards]
        self._ends = np.cumsum([shard.rows for shard in self.manifest.shards], dtype=np.int64)

    def __len__(self) -> int:
        return self.manifest.count

    def __reduce__(self) -> tuple[type["PreparedDataset"], tuple[Path]]:
        """A spawned worker opens the files anew. A forked one shares the mappings, which have no file position."""
        return PreparedDataset, (self.folder,)

    def labels(self) -> Tensor:
        """Classes (N,) int64 of the whole set; UserError if they are not those that the manifest counts."""
        labels = self._column("labels")
        counts = np.bincount(labels.clip(0), minlength=self.num_classes)
        if labels.min() < 0 or counts.tolist() != list(self.manifest.class_counts):
            raise UserError(
                f"--data-dir {self.folder}: the labels in its shards are not those that {MANIFEST_FILE} counts; "
                f"{REMEDY}"
            )
        return torch.from_numpy(labels)

    def index(self) -> Tensor:
        """Numbers (N,) int64 of the samples in the source that the set was prepared from."""
        return torch.from_numpy(self._column("index"))

    def moments(self, rows: Rows) -> Tensor:
        """Means and standard deviations (n, 2C, h, w) float16."""
        return torch.from_numpy(self._read("latents", "moments", rows))

    def moments_flip(self, rows: Rows) -> Tensor:
        """The same of the mirrored images; the set must have been prepared with them (`has_flips`)."""
        return torch.from_numpy(self._read("latents", "moments_flip", rows))

    def images(self, rows: Rows) -> Tensor:
        """Images (n, 3, H, W) uint8; the set must hold them (`check_images`)."""
        return torch.from_numpy(self._read("images", "images", rows))

    def check_images(self) -> None:
        """UserError if the set was prepared without images, or if one of their files is missing or cut short."""
        if not self.has_images:
            raise UserError(
                f"--data-dir {self.folder}: prepared without images, which are needed here; prepare it with images"
            )
        self.manifest.check_files(self.folder, "images")

    def verify(self) -> list[Path]:
        """Reread every file against its checksum; the damaged ones."""
        return self.manifest.damaged_files(self.folder)

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate([shard.latents[name] for shard in self._shards])

    def _read(self, kind: ShardKind, name: str, rows: Rows) -> np.ndarray:
        """One copy per run of consecutive rows: a random batch row by row, a range shard by shard."""
        rows = np.asarray(rows, np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} asked of a data set of {len(self)} rows")
        shards = np.searchsorted(self._ends, rows, side="right")
        starts = np.flatnonzero((np.diff(rows, prepend=-2) != 1) | (np.diff(shards, prepend=-1) != 0))
        ends = np.append(starts[1:], len(rows))[: len(starts)]
        local = rows - np.append(0, self._ends)[shards]
        shape, dtype = self.manifest.tensors(kind)[name]
        values = np.empty((len(rows), *shape), dtype)
        runs = zip(starts.tolist(), ends.tolist(), shards[starts].tolist(), local[starts].tolist(), strict=True)
        for start, end, shard, first in runs:
            values[start:end] = self._shards[shard].tensors(kind)[name][first : first + end - start]
        return values


class _MappedShard:
    """The files of one shard, each mapped at first use and checked against the manifest then."""

    def __init__(self, folder: Path, manifest: Manifest, shard: Shard) -> None:
        self._folder, self._manifest, self._shard = folder, manifest, shard

    def tensors(self, kind: ShardKind) -> dict[str, np.ndarray]:
        return self.latents if kind == "latents" else self.images

    @cached_property
    def latents(self) -> dict[str, np.ndarray]:
        return self._map("latents")

    @cached_property
    def images(self) -> dict[str, np.ndarray]:
        tensors = self._map("images")
        if not np.array_equal(tensors["index"], self.latents["index"]):
            raise self._error("images", f"holds other samples than {self._shard.latents.name}")
        return tensors

    def _map(self, kind: ShardKind) -> dict[str, np.ndarray]:
        """Arrays on the file's own pages: safetensors maps the file, and torch's view of it is shared by numpy."""
        file = self._shard.file(kind)
        if file is None:
            raise ValueError(f"{self._folder} holds no {kind}")
        try:
            with safe_open(self._folder / file.name, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name).numpy() for name in self._manifest.tensors(kind)}
        except (SafetensorError, OSError) as error:
            raise self._error(kind, f"can't be read ({error})") from None
        for name, (shape, dtype) in self._manifest.tensors(kind).items():
            expected = (self._shard.rows, *shape)
            if tensors[name].shape != expected or tensors[name].dtype != dtype:
                found = f"{tensors[name].dtype} {tensors[name].shape}"
                raise self._error(kind, f"holds {name} of {found} instead of {dtype} {expected}")
        return tensors

    def _error(self, kind: ShardKind, fault: str) -> UserError:
        file = self._shard.file(kind)
        assert file is not None
        return UserError(f"--data-dir {self._folder}: shard {file.name} {fault}; {REMEDY}")
