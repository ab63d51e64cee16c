"""Autoencoders between pixels and latents, with the scale and shift of the latents and the rounding of pixels.

Only this module computes `(z - shift) * scale` and converts between uint8 pixels and [-1, 1].
"""

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from stablevm.support.errors import UserError, arg
from stablevm.support.files import sha256

IDENTITY, GREY = "identity", "grey"
# Stable Diffusion's autoencoder (Rombach et al., 2022) and its fine-tuned decoders: the scale of the latents, and the
# number of pixels along the side of one.
SD_SCALE, SD_FACTOR = 0.18215, 8
SD_AUTOENCODERS = {"mse": "stabilityai/sd-vae-ft-mse", "ema": "stabilityai/sd-vae-ft-ema"}
CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # OWNER/NAME
LARGEST_SIDE = 65_536  # of a latent; a file that claims more is damaged
PerChannel = float | tuple[float, ...]  # one number for all channels, or one for each


@dataclass(frozen=True, eq=False)
class LatentSpec:
    """The shape and scale of latents and the autoencoder that makes them.

    It is recorded in prepared data and in each checkpoint, and compared when the two are used together. Two are equal
    if shape, scale, shift, the form of moments and autoencoder are. The autoencoder in a folder is identified by its
    content, not its path.
    """

    shape: tuple[int, int, int]  # channels, height, width
    scale: PerChannel
    shift: PerChannel
    autoencoder: (
        str  # "identity" (latent = pixels), "grey" (latent = grey pixels), or the name or folder of one of diffusers
    )
    fingerprint: str | None = None  # SHA-256 of a folder's configuration and weights; None for names, and in old files
    measured: bool = False  # whether scale and shift were measured on the data, instead of from the configuration
    deterministic: bool = False  # whether moments are means alone, because the encoder gives no standard deviation

    def __post_init__(self) -> None:
        """Raise UserError for impossible values."""
        if len(self.shape) != 3 or not all(1 <= length <= LARGEST_SIDE for length in self.shape):
            raise UserError(f"latent shape {list(self.shape)}, expected 3 lengths of 1 to {LARGEST_SIDE:,}")
        scales, shifts = map(_numbers, (self.scale, self.shift))
        if not all(map(math.isfinite, scales + shifts)) or not all(scales):
            raise UserError(f"latent scale {self.scale} and shift {self.shift}, expected finite numbers, no scale of 0")
        if any(isinstance(each, tuple) and len(each) != self.shape[0] for each in (self.scale, self.shift)):
            raise UserError(
                f"latent scale and shift of {len(scales)} and {len(shifts)} numbers, expected one, or one for each "
                f"of {self.shape[0]} channels"
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LatentSpec):
            return NotImplemented
        ours, theirs = ((each.shape, each.scale, each.shift, each.deterministic) for each in (self, other))
        return ours == theirs and self.has_autoencoder_of(other)

    def __hash__(self) -> int:
        return hash((self.shape, self.scale, self.shift))

    def has_autoencoder_of(self, other: "LatentSpec") -> bool:
        """Whether the latents of both come from the same autoencoder."""
        return same_source(self.autoencoder, self.fingerprint, other.autoencoder, other.fingerprint)

    def is_by(self, name: str) -> bool:
        """Whether the autoencoder called `name` made the latents; reads a folder's files if its content is recorded."""
        found = fingerprint(name) if self.fingerprint is not None else None
        return same_source(self.autoencoder, self.fingerprint, full_name(name), found)

    @property
    def autoencoder_id(self) -> str:
        """An identifier of the autoencoder: the fingerprint of its folder if recorded, else its name."""
        return _identity(self.autoencoder, self.fingerprint)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    @property
    def moments_shape(self) -> tuple[int, int, int]:
        """The shape of one sample's moments: means and standard deviations, or the means alone if deterministic."""
        channels, height, width = self.shape
        return channels * (1 if self.deterministic else 2), height, width

    def from_moments(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Latents (B, C, h, w) sampled from moments (B, *moments_shape).

        noise: (B, C, h, w), standard normal; it has no effect if the encoder is deterministic.
        """
        mean, deviation = self.split(moments)
        return self.normalize(mean if deviation is None else mean + deviation * noise)

    def means(self, moments: Tensor) -> Tensor:
        """The means (B, C, h, w) of the latents with moments (B, *moments_shape)."""
        return self.normalize(self.split(moments)[0])

    def split(self, moments: Tensor) -> tuple[Tensor, Tensor | None]:
        """Means and standard deviations (B, C, h, w), float32, of raw latents; None if the encoder is deterministic."""
        moments = moments.float()
        if self.deterministic:
            return moments, None
        mean, deviation = moments.chunk(2, dim=1)
        return mean, deviation

    def normalize(self, raw: Tensor) -> Tensor:
        """Convert the autoencoder's own latents (B, C, h, w) to those of the network: `(raw - shift) * scale`."""
        return (raw - _over_pixels(self.shift, raw)) * _over_pixels(self.scale, raw)

    def denormalize(self, latents: Tensor) -> Tensor:
        """Convert the network's latents (B, C, h, w) to the autoencoder's own, the inverse of `normalize`."""
        return latents / _over_pixels(self.scale, latents) + _over_pixels(self.shift, latents)


def _numbers(values: PerChannel) -> tuple[float, ...]:
    return values if isinstance(values, tuple) else (values,)


def _over_pixels(values: PerChannel, latents: Tensor) -> float | Tensor:
    """Values per channel as (C, 1, 1), with the device and dtype of the latents; a single number stays a float."""
    if not isinstance(values, tuple):
        return values
    return torch.tensor(values, device=latents.device, dtype=latents.dtype).view(-1, 1, 1)


def pixels_to_unit(images: Tensor) -> Tensor:
    """Convert uint8 pixels (0 to 255) to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def unit_to_pixels(images: Tensor) -> Tensor:
    """Convert floats in [-1, 1] to uint8 pixels, rounded to the nearest level; values outside are clamped."""
    return ((images.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


class Autoencoder(Protocol):
    """A frozen float32 autoencoder, without gradients, between uint8 images (B, 3, H, W) and latents."""

    latent: LatentSpec

    def encode(self, images: Tensor) -> Tensor:
        """The moments (B, *latent.moments_shape), float32, of the autoencoder's own latents."""

    def decode(self, latents: Tensor) -> Tensor:
        """Decode the network's latents (B, C, h, w) to uint8 images (B, 3, H, W) on the CPU."""


class IdentityAutoencoder:
    """The identity: latents are the pixels in [-1, 1], with three channels or, for grey images, one."""

    def __init__(self, latent: LatentSpec) -> None:
        if latent.shape[0] not in (1, 3):
            raise UserError(
                f"autoencoder {IDENTITY}: latents of {latent.shape[0]} channels are not pixels (1 or 3 channels); "
                f"give the autoencoder of the data, {latent.autoencoder}"
            )
        self.latent = latent

    def encode(self, images: Tensor) -> Tensor:
        mean = pixels_to_unit(images[:, : self.latent.shape[0]])
        if self.latent.deterministic:
            return mean
        return torch.cat([mean, torch.zeros_like(mean)], dim=1)  # as version 0.1 stored them, and the digits are

    def decode(self, latents: Tensor) -> Tensor:
        return unit_to_pixels(self.latent.denormalize(latents.float())).expand(-1, 3, -1, -1).cpu()


class GreyAutoencoder:
    """Grey pixels: latents of one channel are the lightness in [-1, 1], and decode to grey images."""

    # of red, green and blue in the lightness, as in ITU-R BT.601; exact for pixels that are grey already
    WEIGHTS = (0.299, 0.587, 0.114)

    def __init__(self, latent: LatentSpec) -> None:
        if latent.shape[0] != 1 or not latent.deterministic:
            raise UserError(
                f"autoencoder {GREY}: latents of {latent.shape[0]} channels are not grey pixels; give the autoencoder "
                f"of the data, {latent.autoencoder}"
            )
        self.latent = latent

    def encode(self, images: Tensor) -> Tensor:
        weights = torch.tensor(self.WEIGHTS, device=images.device).view(3, 1, 1)
        return pixels_to_unit((images.float() * weights).sum(1, keepdim=True).round())

    def decode(self, latents: Tensor) -> Tensor:
        return unit_to_pixels(self.latent.denormalize(latents.float())).expand(-1, 3, -1, -1).cpu()


def load_autoencoder(latent: LatentSpec, *, name: str | None = None, device: torch.device | str = "cpu") -> Autoencoder:
    """Load the autoencoder of `latent`, or the one called `name`: "identity", "grey", "mse", "ema", a hub name or a
    folder.

    Raises UserError if it can't be loaded, if its channels, scale or shift differ from those of `latent`, or if the
    content of the recorded folder has changed.
    """
    source = full_name(name) if name is not None else latent.autoencoder
    return _kind_of(source).load(latent, source, name is None, device)


def latent_spec_of(name: str, resolution: int) -> LatentSpec:
    """Describe the latents that the autoencoder called `name` makes of images with `resolution` x `resolution` pixels.

    It reads the autoencoder's configuration, and in a folder the weights too, for the fingerprint. Raises UserError if
    they can't be read, or if `resolution` is not a multiple of the autoencoder's downsampling factor.
    """
    source = full_name(name)
    return _kind_of(source).latent(source, resolution)


def downsampling(name: str) -> int:
    """The downsampling factor of the autoencoder called `name`, in pixels per latent pixel and side."""
    source = full_name(name)
    return _kind_of(source).factor(source)


@dataclass(frozen=True)
class AutoencoderKind:
    """A kind of autoencoder: how its names are recognised, its latents described, and an autoencoder loaded."""

    knows: Callable[[str], bool]  # whether a full name is of this kind
    latent: Callable[[str, int], LatentSpec]  # the latents, by full name and side of the square images in pixels
    factor: Callable[[str], int]  # pixels along the side of one latent pixel, by full name
    # Loads an autoencoder, by the latents, its full name, whether that is the one recorded with them, and the device.
    load: Callable[[LatentSpec, str, bool, torch.device | str], Autoencoder]


def _kind_of(source: str) -> AutoencoderKind:
    return next((kind for kind in AUTOENCODERS if kind.knows(source)), _OF_DIFFUSERS)


def _load_identity(latent: LatentSpec, source: str, recorded: bool, device: torch.device | str) -> Autoencoder:
    return IdentityAutoencoder(latent)


def _identity_latent(source: str, resolution: int) -> LatentSpec:
    return LatentSpec((3, resolution, resolution), scale=1.0, shift=0.0, autoencoder=IDENTITY, deterministic=True)


def _load_grey(latent: LatentSpec, source: str, recorded: bool, device: torch.device | str) -> Autoencoder:
    return GreyAutoencoder(latent)


def _grey_latent(source: str, resolution: int) -> LatentSpec:
    return LatentSpec((1, resolution, resolution), scale=1.0, shift=0.0, autoencoder=GREY, deterministic=True)


def _latent_of_diffusers(source: str, resolution: int) -> LatentSpec:
    from stablevm.networks.diffusers_autoencoders import latent_of

    return latent_of(source, resolution)


def _factor_of_diffusers(source: str) -> int:
    from stablevm.networks.diffusers_autoencoders import factor_of

    return factor_of(source)


def _load_by_diffusers(latent: LatentSpec, source: str, recorded: bool, device: torch.device | str) -> Autoencoder:
    from stablevm.networks.diffusers_autoencoders import load

    if recorded and not latent.is_by(source):
        raise UserError(
            f"autoencoder {source}: configuration or weights have changed since the data was encoded; "
            f"give the folder with the original ones as {arg('autoencoder')}"
        )
    return load(latent, source, device)


def is_of_diffusers(name: str) -> bool:
    """Whether the autoencoder called `name` is one of diffusers, instead of a kind with a name of its own."""
    return _kind_of(full_name(name)) is _OF_DIFFUSERS


# Kinds that have names of their own; any other name is the folder or the hub name of one of diffusers.
AUTOENCODERS = [
    AutoencoderKind(lambda source: source == IDENTITY, _identity_latent, lambda source: 1, _load_identity),
    AutoencoderKind(lambda source: source == GREY, _grey_latent, lambda source: 1, _load_grey),
]
_OF_DIFFUSERS = AutoencoderKind(lambda source: True, _latent_of_diffusers, _factor_of_diffusers, _load_by_diffusers)


def is_folder(name: str) -> bool:
    """Whether `name` is a folder: it exists, or it can't be the name of a repository on the hub."""
    path = Path(name)
    if name in SD_AUTOENCODERS or any(kind.knows(name) for kind in AUTOENCODERS):
        return False
    return path.is_dir() or not _REPOSITORY.fullmatch(name) or path.parent.is_dir()


def full_name(name: str) -> str:
    """The name as it is recorded: absolute for a folder, and Stability AI's repositories for "mse" and "ema"."""
    return str(Path(name).expanduser().resolve()) if is_folder(name) else SD_AUTOENCODERS.get(name, name)


def fingerprint(name: str) -> str | None:
    """SHA-256 of the configuration and the weights in the folder `name`; None if it is not a folder.

    Only the values of the configuration count, not the file's layout, nor the keys that say what program wrote it
    (`_class_name`, `_diffusers_version` and so on). UserError if there is no such folder, or no autoencoder in it.
    """
    if not is_folder(name):
        return None
    folder = existing_folder(name)
    try:
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        settings = {key: value for key, value in values.items() if not key.startswith("_")}
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"autoencoder {name}: its {CONFIG_FILE} is damaged; download it again") from None
    content = {"config": settings, "weights": sha256(folder / WEIGHTS_FILE)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def autoencoder_id(name: str) -> str:
    """An identifier of the autoencoder called `name`, as `LatentSpec.autoencoder_id`."""
    return _identity(full_name(name), fingerprint(name))


def _identity(name: str, digest: str | None) -> str:
    return name if digest is None else f"sha256:{digest}"


def existing_folder(name: str) -> Path:
    """The folder `name`; UserError if it does not hold an autoencoder."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UserError(f"autoencoder {name}: no such folder; if it was moved, give it as {arg('autoencoder')}")
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise UserError(
                f"autoencoder {name}: no {file} in the folder; "
                f"give one with {CONFIG_FILE} and {WEIGHTS_FILE} as {arg('autoencoder')}"
            )
    return folder


def same_source(name: str, digest: str | None, other: str, other_digest: str | None) -> bool:
    """Whether two recorded names mean the same autoencoder: by the digests if both are known, else by the names."""
    if digest is not None and other_digest is not None:
        return digest == other_digest
    return name == other or full_name(name) == full_name(other)
