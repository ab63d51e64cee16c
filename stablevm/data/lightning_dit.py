"""The layout of LightningDiT: safetensors files of latents and labels, with the statistics of the channels beside them.

`latents_rank00_shard000.safetensors` and the like hold `latents` (n, C, h, w), one draw for each image, `labels` (n,)
int64 and perhaps `latents_flip`, those of the mirrored images; `latents_stats.pt` holds `mean` and `std` of each
channel. The order of rows is that of the files' names, as in LightningDiT's own loader.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stablevm.data.dataset import Fingerprint, PreparedDataset, Rows, checked_rows, digest
from stablevm.data.storage import is_fault_of_file
from stablevm.data.tensor_file import Opener, TensorFile, bytes_of, opener
from stablevm.networks.autoencoder import LatentSpec
from stablevm.support import files
from stablevm.support.errors import UserError, arg
from stablevm.support.foreign_weights import read_weights

STATISTICS_FILE = "latents_stats.pt"
# Of LightningDiT's own latents (Yao et al., 2025): the files do not say what made them.
VAVAE, VAVAE_FACTOR = "hustvl/vavae-imagenet256-f16d32-dinov2", 16
LATENTS, FLIPPED, LABELS = "latents", "latents_flip", "labels"
_LARGEST = 65_504  # of float16, in which latents are held
_COMPARED = 256  # rows whose content tells one set from another: evenly spread


def is_lightning_dit_folder(folder: Path) -> bool:
    """Whether the first safetensors file of the folder holds latents and labels under the names of this layout."""
    path = next(iter(_files(folder)), None)
    if path is None:
        return False
    try:
        with safe_open(path, framework="np") as file:
            return {LATENTS, LABELS} <= set(file.keys())
    except (OSError, SafetensorError):
        return False


def read_statistics(path: Path, what: str) -> tuple[Tensor, Tensor]:
    """Mean and deviation (C,) float64 of each channel of latents, from a `latents_stats.pt`.

    what: the argument that gave the file. UserError if it holds no such numbers.
    """
    content = read_weights(path, what)
    found = [content.get(name) for name in ("mean", "std")]
    means, deviations = (
        value.double().flatten() if isinstance(value, Tensor) and value.is_floating_point() else torch.empty(0)
        for value in found
    )
    if not len(means) or len(means) != len(deviations) or not bool(means.isfinite().all()):
        raise UserError(
            f"{path}: expected mean and std, a number for each channel; found {', '.join(map(str, content))}"
        )
    if not bool((deviations > 0).all() and deviations.isfinite().all()):
        raise UserError(f"{path}: expected positive deviations under std")
    return means, deviations


class LightningDiTDataset(PreparedDataset):
    """A folder of that layout. UserError for files that differ from each other in their tensors."""

    layout, has_images = "safetensors of latents (layout of LightningDiT)", False

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._paths, open_file = _files(self.folder), opener()
        self._opened = [self._open(path, open_file) for path in self._paths]
        first = self._opened[0]
        self.has_flips = FLIPPED in first.shapes
        for path, file in zip(self._paths, self._opened, strict=True):
            self._check(path, file, first)
        counts = [file.shapes[LABELS][0] for file in self._opened]
        self._ends = np.cumsum(counts, dtype=np.int64)
        labels = np.concatenate([self._read_whole(number) for number in range(len(counts))])
        if labels.min(initial=0) < 0:
            raise UserError(f"{arg('folder')} {folder}: a label is {labels.min()}, expected 0 or more")
        self._labels = torch.from_numpy(labels.astype(np.int64))
        channels, height, width = first.shapes[LATENTS][1:]
        self._raw = LatentSpec((channels, height, width), 1.0, 0.0, VAVAE, deterministic=True)
        self.resolution = width * VAVAE_FACTOR
        self.class_names = tuple(map(str, range(int(labels.max(initial=0)) + 1)))
        self._statistics = self.folder / STATISTICS_FILE
        self._latent: LatentSpec | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __reduce__(self) -> tuple[type["LightningDiTDataset"], tuple[Path]]:
        return LightningDiTDataset, (self.folder,)

    @property
    def raw_latent(self) -> LatentSpec:
        return self.latent if self._statistics.is_file() else self._raw

    @property
    def latent(self) -> LatentSpec:  # type: ignore[override]
        """UserError without the statistics: public FIDs exceed 130 where latents were not normalised."""
        if self._latent is None:
            self._latent = self._read_latent()
        return self._latent

    def _read_latent(self) -> LatentSpec:
        if not self._statistics.is_file():
            raise UserError(
                f"{arg('folder')} {self.folder}: has no {STATISTICS_FILE}; put that of its preparation there, or run "
                f"stablevm data statistics {self.folder}"
            )
        means, deviations = read_statistics(self._statistics, arg("folder"))
        channels = self._raw.shape[0]
        if len(means) != channels:
            raise UserError(f"{self._statistics}: statistics of {len(means)} channels, the latents have {channels}")
        scale, shift = tuple((1 / deviations).tolist()), tuple(means.tolist())
        return replace(self._raw, scale=scale, shift=shift, measured=True)

    def record(self, latent: LatentSpec) -> None:
        """Write `latents_stats.pt`, as LightningDiT does."""
        assert isinstance(latent.scale, tuple) and isinstance(latent.shift, tuple)
        shape = (1, len(latent.scale), 1, 1)
        content = {
            "mean": torch.tensor(latent.shift, dtype=torch.float64).view(shape),
            "std": 1 / torch.tensor(latent.scale, dtype=torch.float64).view(shape),
        }
        files.write_with(self._statistics, lambda path: torch.save(content, path))
        self._latent = None

    def labels(self) -> Tensor:
        return self._labels

    def index(self) -> Tensor:
        return torch.arange(len(self))

    def moments(self, rows: Rows) -> Tensor:
        return self._read(LATENTS, rows)

    def moments_flip(self, rows: Rows) -> Tensor:
        if not self.has_flips:
            raise UserError(f"{arg('folder')} {self.folder}: holds no latents of mirrored images; train without flips")
        return self._read(FLIPPED, rows)

    def images(self, rows: Rows) -> Tensor:
        raise UserError(
            f"{arg('folder')} {self.folder}: this layout holds no images, which are needed here; prepare them with "
            "stablevm prepare convert and encode"
        )

    def check_images(self) -> None:
        self.images([])

    def describe(self, row: int) -> str:
        file, position = self._place(int(checked_rows([row], len(self))[0]))
        return f"row {row} ({self._paths[file].name}, row {position})"

    def fingerprint(self, *, with_images: bool) -> Fingerprint:
        """The fingerprint of labels, files and the content of some rows; reading all rows would take an epoch."""
        sample = np.unique(np.linspace(0, len(self) - 1, _COMPARED).round().astype(int))
        known = [*(path.name for path in self._paths), *self._ends.tolist(), *self._labels.tolist()]
        content = digest([*known, self.moments(sample).numpy().tobytes()])
        return Fingerprint(len(self), digest(self.class_names), content, "")

    def facts(self) -> list[tuple[str, str]]:
        size = sum(path.stat().st_size for path in self._paths)
        return [("with images", "no"), ("files", f"{len(self._paths):,}, {size / 1e9:.3g} GB")]

    def _open(self, path: Path, open_file: Opener) -> TensorFile:
        try:
            return TensorFile(str(path), path.stat().st_size, open_file)
        except (SafetensorError, OSError) as error:
            raise self._unreadable(path, error) from None

    def _check(self, path: Path, file: TensorFile, first: TensorFile) -> None:
        names = (LATENTS, FLIPPED) if self.has_flips else (LATENTS,)
        rows = file.shapes.get(LABELS, ())
        if len(rows) != 1 or file.dtypes[LABELS].kind != "i":
            raise UserError(f"{path}: expected {LABELS} (n,) of whole numbers")
        for name in names:
            shape, dtype = file.shapes.get(name, ()), file.dtypes.get(name)
            if len(shape) != 4 or shape != (*rows, *first.shapes[LATENTS][1:]) or dtype not in (np.float16, np.float32):
                raise UserError(
                    f"{path}: {name} {shape} {dtype}, expected float16 or float32 of "
                    f"{(*rows, *first.shapes[LATENTS][1:])}, as in {self._paths[0].name}"
                )

    def _place(self, row: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._ends, row, side="right"))
        return file, row - (int(self._ends[file - 1]) if file else 0)

    def _read_whole(self, number: int) -> np.ndarray:
        try:
            return self._opened[number].read(LABELS)
        except OSError as error:
            raise self._unreadable(self._paths[number], error) from None

    def _read(self, name: str, rows: Rows) -> Tensor:
        """float16; UserError for a value beyond its range, which would be infinite in it."""
        chosen, shape = checked_rows(rows, len(self)), self._raw.shape
        values = np.empty((len(chosen), *shape), np.float16)
        for position, row in enumerate(chosen.tolist()):
            number, place = self._place(row)
            file = self._opened[number]
            found = np.empty(shape, file.dtypes[name])
            try:
                file.read_into(name, [(bytes_of(found), place * math.prod(shape) * found.itemsize)])
            except OSError as error:
                raise self._unreadable(self._paths[number], error) from None
            largest = np.abs(found).max(initial=0)
            if np.isfinite(largest) and largest > _LARGEST:
                raise UserError(
                    f"{self._paths[number]}: row {place} holds {largest:g}, latents are kept in float16 up to 65,504"
                )
            with np.errstate(over="ignore"):
                values[position] = found
        return torch.from_numpy(values)

    def _unreadable(self, path: Path, error: Exception) -> Exception:
        if isinstance(error, OSError) and not is_fault_of_file(error):
            return error
        return UserError(f"{arg('folder')} {self.folder}: {path.name} can't be read ({error}); restore it from a copy")


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))
