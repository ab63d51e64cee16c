"""Writing shards: rows are collected into files, each complete or absent."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stablevm.data.manifest import MANIFEST_FILE, Manifest, Shard, ShardFile, ShardKind
from stablevm.support import files
from stablevm.support.errors import UserError
from stablevm.support.tensor_files import save_tensors

MIN_ROWS, MAX_ROWS = 8_192, 16_384  # per shard: not too many files for a million samples, but small ones


def shard_name(kind: ShardKind, number: int) -> str:
    return f"{kind}-{number:05d}.safetensors"


class ShardWriter:
    """Collects rows and writes a shard after every `rows_per_shard`; `finish` writes the rest and the manifest.

    The manifest is written last, so an interrupted writer leaves nothing that looks like a data set, and the next
    writer replaces its shards. Raises UserError if the folder already holds a data set, or if `rows_per_shard` is out
    of range.
    """

    def __init__(self, folder: str | Path, description: Manifest, rows_per_shard: int = MIN_ROWS) -> None:
        if not MIN_ROWS <= rows_per_shard <= MAX_ROWS:
            raise UserError(f"rows per shard {rows_per_shard}: expected {MIN_ROWS} to {MAX_ROWS}")
        self.folder = Path(folder)
        if (self.folder / MANIFEST_FILE).exists():
            raise UserError(f"{self.folder}: already holds a prepared data set; give another folder or remove it")
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
        """Append n rows, with the shapes described in data/shards.py; moments are stored as float16.

        Raises ValueError for tensors that do not fit the description, or labels without a class name.
        """
        optional = {"images": images, "moments_flip": moments_flip}
        rows = {"moments": moments, "labels": labels, "index": index}
        rows |= {name: tensor for name, tensor in optional.items() if tensor is not None}
        if rows.keys() != self._buffers.keys():
            raise ValueError(f"rows have {sorted(rows)}, but the data set has {sorted(self._buffers)}")
        for name, tensor in rows.items():
            expected = (len(index), *self._buffers[name].shape[1:])
            if tensor.shape != expected:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self._class_counts):
            raise ValueError(f"labels are {labels.unique().tolist()}, but there are {len(self._class_counts)} classes")
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
        """Write the last shard and the manifest, and remove temporary files of earlier, interrupted writers.

        Raises UserError if no row was added, or if moments are not finite (`add` raises it too, for a full shard).
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
            save_tensors(path, {name: tensors[name] for name in names})
            written[kind] = ShardFile.of(path)
        self._shards.append(Shard(self._filled, written["latents"], written.get("images")))
        self._class_counts += np.bincount(tensors["labels"].numpy(), minlength=len(self._class_counts))
        self._filled = 0
