"""The layout of REPA and its successors: `DATA/images/**.png` with `DATA/vae-sd/**.npy`.

`vae-sd/dataset.json` lists latents and classes. Images and latents are paired by name: `00000/img00000012.png` with
`00000/img-mean-std-00000012.npy`, and any other image with the latent of the same name. Either folder may be a ZIP
archive.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stablevm.data.dataset import Fingerprint, PreparedDataset, Rows, checked_rows, digest
from stablevm.data.listing import LISTING_FILE, read_listing
from stablevm.data.storage import READ_ERRORS, Storage, is_fault_of_file, open_storage
from stablevm.networks.autoencoder import SD_AUTOENCODERS, SD_FACTOR, SD_SCALE, LatentSpec, downsampling, latent_spec_of
from stablevm.support.cards import card_of
from stablevm.support.errors import UserError, arg

LATENTS, IMAGES = "vae-sd", "images"
# Assumed for folders that do not record them: the autoencoder and scale of REPA's own preparation.
ASSUMED_AUTOENCODER, ASSUMED_SCALE, ASSUMED_FACTOR = SD_AUTOENCODERS["mse"], SD_SCALE, SD_FACTOR
_BEYOND = 65_520  # the smallest number that float16 rounds to infinity
_COMPARED = 256  # evenly spaced files whose content enters the fingerprint
_IMAGE_STEM, _LATENT_STEM = "img", "img-mean-std-"


def latent_name(image: str) -> str:
    """The name of the latent that belongs to an image."""
    path = PurePosixPath(image)
    return str(path.with_name(re.sub(rf"^{_IMAGE_STEM}(?=\d+$)", _LATENT_STEM, path.stem) + ".npy"))


def is_repa_folder(folder: Path) -> bool:
    """Whether the folder has the layout of REPA, that is, holds vae-sd or vae-sd.zip."""
    return _part(folder, LATENTS) is not None


class RepaDataset(PreparedDataset):
    """A data set in the layout of REPA. Names and classes are read once; files are opened when rows are requested.

    Raises UserError if the listing can't be read, or if the latents were made by another autoencoder than `vae`.
    """

    layout = "one file per image (layout of REPA)"
    has_flips = False

    def __init__(self, folder: str | Path, vae: str | None = None) -> None:
        self.folder, self._vae = Path(folder), vae
        latents, images = _part(self.folder, LATENTS), _part(self.folder, IMAGES)
        if latents is None:
            raise UserError(f"{arg('folder')} {folder}: it has no {LATENTS}; give a folder with {LATENTS} and {IMAGES}")
        self._latents = open_storage(latents)
        self._images = None if images is None else open_storage(images)
        listing = read_listing(self._latents)
        if listing.labels is None:
            raise UserError(f"{latents}/{LISTING_FILE}: it lists no labels; remake it with encode")
        self.names = listing.names
        self._labels = torch.tensor([label for _, label in listing.labels])
        self.class_names = listing.known_class_names
        self.crop = str(listing.facts.get("crop", "unknown"))
        self.has_images = images is not None
        self.precision = str(listing.facts.get("precision", "unknown"))
        self.moments_shape = _load(self._latents, self.names[0]).shape
        self.latent = self._latent_spec(listing.facts.get("latent"))
        self.resolution = self._side(listing.facts.get("resolution"))

    def __len__(self) -> int:
        return len(self.names)

    def __reduce__(self) -> tuple[type["RepaDataset"], tuple[Path, str | None]]:
        return RepaDataset, (self.folder, self._vae)

    def labels(self) -> Tensor:
        return self._labels

    def index(self) -> Tensor:
        """The numbers at the end of the names, as convert writes them; row numbers if the names have none."""
        numbers = [int(match[0]) for name in self.names if (match := re.search(r"\d+(?=\.npy$)", name))]
        return torch.tensor(numbers) if len(set(numbers)) == len(self) else torch.arange(len(self))

    def moments(self, rows: Rows) -> Tensor:
        """The moments of these rows; UserError, naming the file, for values that would be infinite in float16."""
        names = [self.names[row] for row in checked_rows(rows, len(self))]
        values = np.empty((len(names), *self.moments_shape), np.float16)
        for row, name in enumerate(names):
            found = _load(self._latents, name)
            if found.shape != self.moments_shape:
                raise UserError(f"{self._latents.root}/{name}: shape {found.shape} instead of {self.moments_shape}")
            largest = np.abs(found).max(initial=0)
            if np.isfinite(largest) and largest >= _BEYOND:
                raise UserError(
                    f"{self._latents.root}/{name}: holds {largest:g}, but latents are stored in float16, up to "
                    "65,504; encode that image again or leave it out"
                )
            with np.errstate(over="ignore"):
                values[row] = found
        return torch.from_numpy(values)

    def moments_flip(self, rows: Rows) -> Tensor:
        raise UserError(f"{arg('folder')} {self.folder}: holds no latents of mirrored images; train without flips")

    def images(self, rows: Rows) -> Tensor:
        side = self.resolution
        chosen = checked_rows(rows, len(self))
        values = np.empty((len(chosen), 3, side, side), np.uint8)
        for row, source in enumerate(chosen):
            values[row] = self._image(self.image_names[source])
        return torch.from_numpy(values)

    def describe(self, row: int) -> str:
        return f"row {row} ({self._latents.root}/{self.names[row]})"

    def fingerprint(self, *, with_images: bool) -> Fingerprint:
        """The fingerprint of names, labels and the content of some files; reading all files would take an epoch."""
        sample = np.unique(np.linspace(0, len(self) - 1, _COMPARED).round().astype(int))
        latents = (_load(self._latents, self.names[row]).tobytes() for row in sample)
        images = (self.images([row]).numpy().tobytes() for row in sample)
        return Fingerprint(
            rows=len(self),
            class_names=digest(self.class_names),
            latents=digest([*self.names, *self._labels.tolist(), *latents]),
            images=digest([*self.image_names, *images]) if with_images else "",
        )

    def check_images(self) -> None:
        """Raise UserError if there are no images, or a latent has none; files are checked only when they are read."""
        if self._images is None:
            raise UserError(
                f"{arg('folder')} {self.folder}: has no {IMAGES}, which are needed here; put them beside {LATENTS}"
            )
        len(self.image_names)  # raises an error for a latent without an image

    def facts(self) -> list[tuple[str, str]]:
        images = "yes" if self.has_images else "no"
        return [("crop", self.crop), ("encoded in", self.precision), ("with images", images)]

    def faults(self) -> Iterator[str]:
        """Latents and images in the folders that do not belong to the set: one line for each kind."""
        listed = set(self.names)
        extra = [name for name in self._latents.names() if name.endswith(".npy") and name not in listed]
        if extra:
            yield f"{self._latents.root}: {len(extra):,} latents are not in {LISTING_FILE}, the first is {extra[0]}"
        if self._images is not None:
            paired = set(self.image_names)
            alone = [name for name in self._images.names() if name.endswith(".png") and name not in paired]
            if alone:
                yield f"{self._images.root}: {len(alone):,} images have no latent, the first is {alone[0]}"

    @cached_property
    def image_names(self) -> list[str]:
        """The name of each latent's image; UserError for a latent without one."""
        assert self._images is not None
        suffixes = {}
        if self._images.exists(LISTING_FILE):
            listed = read_listing(self._images).names
            suffixes = {latent_name(name): name for name in listed}
            missing = [name for name in self.names if name not in suffixes]
            if missing:
                raise UserError(
                    f"{arg('folder')} {self.folder}: {len(missing):,} latents have no image in "
                    f"{self._images.root.name}/{LISTING_FILE}, the first {missing[0]}; convert or encode again"
                )
        return [suffixes.get(name) or _image_name(name) for name in self.names]

    def _image(self, name: str) -> np.ndarray:
        """Read an image as uint8 (3, H, W)."""
        assert self._images is not None
        side = self.resolution
        with _told(self._images, name, "convert"), self._images.open(name) as file, Image.open(file) as picture:
            size, mode = picture.size, picture.mode
            if size == (side, side) and mode in ("RGB", "L"):
                return np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
        raise UserError(
            f"{self._images.root}/{name}: {mode} of {size[0]} x {size[1]} pixels, "
            f"expected RGB or grey of {side} x {side}; convert the images again"
        )

    def _latent_spec(self, recorded: Any) -> LatentSpec:
        channels, height, width = self.moments_shape
        if recorded is not None:
            spec = self._recorded_spec(recorded)
            if self._vae is not None and not spec.is_by(self._vae):
                raise UserError(
                    f"{arg('autoencoder')} {self._vae}: {self._latents.root}/{LISTING_FILE} records latents of "
                    f"{spec.autoencoder}; leave the argument out, or encode the images again"
                )
        elif self._vae is not None:
            spec = latent_spec_of(self._vae, height * downsampling(self._vae))
        elif channels % 2 or height != width:
            raise UserError(
                f"{self._latents.root}/{self.names[0]}: shape {self.moments_shape}, expected (2C, side, side): "
                "mean and standard deviation"
            )
        else:
            spec = LatentSpec((channels // 2, height, width), ASSUMED_SCALE, 0.0, ASSUMED_AUTOENCODER)
        if spec.moments_shape != self.moments_shape:
            raise UserError(
                f"{arg('folder')} {self.folder}: {spec.autoencoder} makes moments of shape "
                f"{spec.moments_shape}, but {self.names[0]} has {self.moments_shape}; name the autoencoder that made it"
            )
        return spec

    def _recorded_spec(self, recorded: Any) -> LatentSpec:
        where = f"{self._latents.root}/{LISTING_FILE}: latent"
        return card_of(LatentSpec, recorded, where, remedy="correct or remove the entry")

    def _side(self, recorded: Any) -> int:
        match recorded:
            case int(side) | [int(side), *_]:
                return side
            case None:
                return self._side_of_images()
        raise UserError(
            f"{self._latents.root}/{LISTING_FILE}: its resolution {recorded} is not [WIDTH, HEIGHT]; "
            "correct or remove the entry"
        )

    def _side_of_images(self) -> int:
        if self._images is None:
            if self._vae is None or self.latent.autoencoder == ASSUMED_AUTOENCODER:
                return self.moments_shape[1] * ASSUMED_FACTOR
            return self.moments_shape[1] * downsampling(self._vae)
        name = self.image_names[0]
        with _told(self._images, name, "convert"), self._images.open(name) as file, Image.open(file) as picture:
            return picture.width


def _part(folder: Path, name: str) -> Path | None:
    candidates = (folder / name, folder / f"{name}.zip")
    return next((path for path in candidates if path.exists()), None)


def _image_name(latent: str) -> str:
    path = PurePosixPath(latent)
    return str(path.with_name(path.stem.replace(_LATENT_STEM, _IMAGE_STEM) + ".png"))


@contextmanager
def _told(storage: Storage, name: str, maker: str) -> Iterator[None]:
    """Turn errors of a missing or damaged file into UserError; errors of the machine are raised unchanged."""
    try:
        yield
    except (*READ_ERRORS, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and not is_fault_of_file(error):
            raise
        raise UserError(f"{storage.root}/{name}: can't be read ({error}); {maker} it again") from None


def _load(storage: Storage, name: str) -> np.ndarray:
    """The moments (2C, h, w), or (C, h, w) if deterministic, in a file; its array may have a leading dimension of 1."""
    with _told(storage, name, "encode"), storage.open(name) as file:
        values = np.lib.format.read_array(file, allow_pickle=False)
    if values.ndim == 4 and len(values) == 1:
        values = values[0]
    if values.ndim != 3 or values.dtype.kind != "f":
        raise UserError(f"{storage.root}/{name}: {values.dtype} {values.shape}, expected floats of three dimensions")
    return values
