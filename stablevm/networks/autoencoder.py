"""Between pixels and latents: the latent's scale and shift, the rounding of pixels, and the autoencoders.

This is the one home of `(z - shift) * scale` and of the conversion between uint8 pixels and [-1, 1].
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
from stablevm.support.extras import need
from stablevm.support.files import sha256
from stablevm.support.hub import check_reachable

IDENTITY = "identity"
# Of Stable Diffusion's autoencoder (Rombach et al., 2022) and its fine-tuned decoders: the latents' scale, and
# pixels to a side of each.
SD_SCALE, SD_FACTOR = 0.18215, 8
SD_AUTOENCODERS = {"mse": "stabilityai/sd-vae-ft-mse", "ema": "stabilityai/sd-vae-ft-ema"}
CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # OWNER/NAME
_PROBE = 4096  # pixels: a side that every factor divides
LARGEST_SIDE = 65_536  # of a latent: a file that says more is damaged
PerChannel = float | tuple[float, ...]  # one number for all channels, or one for each


@dataclass(frozen=True, eq=False)
class LatentSpec:
    """What a latent is: recorded with the prepared data and in each checkpoint, compared when the two meet.

    Two are equal when shape, scale and shift are, and the autoencoder is the same: a folder's by its content, wherever
    it lies and however its path was written.
    """

    shape: tuple[int, int, int]  # channels, height, width
    scale: PerChannel
    shift: PerChannel
    autoencoder: str  # "identity" (latent = pixels), or a diffusers AutoencoderKL's name or folder
    fingerprint: str | None = None  # of a folder's configuration and weights; None for names, and in older files
    measured: bool = False  # whether scale and shift are those of the data, and not of the autoencoder's configuration

    def __post_init__(self) -> None:
        """UserError for a latent that can't be."""
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
        same = (self.shape, self.scale, self.shift) == (other.shape, other.scale, other.shift)
        return same and self.has_autoencoder_of(other)

    def __hash__(self) -> int:
        return hash((self.shape, self.scale, self.shift))

    def has_autoencoder_of(self, other: "LatentSpec") -> bool:
        """Whether the latents of both are of one autoencoder."""
        return same_source(self.autoencoder, self.fingerprint, other.autoencoder, other.fingerprint)

    def is_by(self, name: str) -> bool:
        """Whether the autoencoder called `name` made the latents; reads a folder's files where its content is known."""
        found = fingerprint(name) if self.fingerprint is not None else None
        return same_source(self.autoencoder, self.fingerprint, full_name(name), found)

    @property
    def autoencoder_id(self) -> str:
        """What distinguishes the autoencoder from others: a folder's content where it is known, else the name."""
        return _identity(self.autoencoder, self.fingerprint)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def from_moments(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Draw latents: moments (B, 2C, h, w) hold mean and standard deviation, noise is (B, C, h, w) of N(0, 1)."""
        mean, deviation = moments.float().chunk(2, dim=1)
        return self.normalize(mean + deviation * noise)

    def means(self, moments: Tensor) -> Tensor:
        """The latents' means (B, C, h, w), without their noise."""
        return self.normalize(moments.float().chunk(2, dim=1)[0])

    def normalize(self, raw: Tensor) -> Tensor:
        """The autoencoder's own latents (B, C, h, w) to the space in which the network works."""
        return (raw - _over_pixels(self.shift, raw)) * _over_pixels(self.scale, raw)

    def denormalize(self, latents: Tensor) -> Tensor:
        return latents / _over_pixels(self.scale, latents) + _over_pixels(self.shift, latents)


def _numbers(values: PerChannel) -> tuple[float, ...]:
    return values if isinstance(values, tuple) else (values,)


def _over_pixels(values: PerChannel, latents: Tensor) -> float | Tensor:
    """Numbers of channels as (C, 1, 1), on the device and in the type of the latents."""
    if not isinstance(values, tuple):
        return values
    return torch.tensor(values, device=latents.device, dtype=latents.dtype).view(-1, 1, 1)


def pixels_to_unit(images: Tensor) -> Tensor:
    """uint8 pixels 0..255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def unit_to_pixels(images: Tensor) -> Tensor:
    """Floats in [-1, 1] to uint8, rounded to the nearest level; values outside are clamped."""
    return ((images.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


class Autoencoder(Protocol):
    """Between uint8 images (B, 3, H, W) and latents; frozen, float32, without gradients."""

    latent: LatentSpec

    def encode(self, images: Tensor) -> Tensor:
        """Moments float32 (B, 2C, h, w) of the raw latents: mean, then standard deviation."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) in the network's space to uint8 images (B, 3, H, W) on the CPU."""


class IdentityAutoencoder:
    """The latent is the pixels in [-1, 1]: three channels, or one, which stands for grey."""

    def __init__(self, latent: LatentSpec) -> None:
        if latent.shape[0] not in (1, 3):
            raise UserError(
                f"autoencoder {IDENTITY}: latents of {latent.shape[0]} channels are not pixels (1 or 3 channels); "
                f"give the autoencoder of the data, {latent.autoencoder}"
            )
        self.latent = latent

    def encode(self, images: Tensor) -> Tensor:
        mean = pixels_to_unit(images[:, : self.latent.shape[0]])
        return torch.cat([mean, torch.zeros_like(mean)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        return unit_to_pixels(self.latent.denormalize(latents.float())).expand(-1, 3, -1, -1).cpu()


class KLAutoencoder:
    """A diffusers AutoencoderKL, such as Stable Diffusion's (Rombach et al., 2022)."""

    def __init__(self, latent: LatentSpec, model: Any) -> None:
        self.latent = latent
        self.model = model.float().eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        posterior = self.model.encode(pixels_to_unit(images.to(self.model.device))).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        raw = self.latent.denormalize(latents.to(self.model.device, torch.float32))
        return unit_to_pixels(self.model.decode(raw).sample).cpu()


def load_autoencoder(latent: LatentSpec, *, name: str | None = None, device: torch.device | str = "cpu") -> Autoencoder:
    """The autoencoder of `latent`, or the one called `name` ("identity", "mse", "ema", a hub name, a folder) instead.

    Raises UserError when it can't be loaded, when its channels, scale or shift are not those of `latent`, or when the
    recorded folder has other content than it had.
    """
    source = full_name(name) if name is not None else latent.autoencoder
    return _kind_of(source).load(latent, source, name is None, device)


def latent_spec_of(name: str, resolution: int) -> LatentSpec:
    """The latents that the autoencoder called `name` makes of images of `resolution` x `resolution` pixels.

    Reads the autoencoder's configuration; a folder's weights too, to know them again. Raises UserError when it can't
    be read, or when `resolution` is not a multiple of the autoencoder's downsampling factor.
    """
    source = full_name(name)
    return _kind_of(source).latent(source, resolution)


def downsampling(name: str) -> int:
    """Pixels to a side of one latent pixel, of the autoencoder called `name`; reads its configuration."""
    return _PROBE // latent_spec_of(name, _PROBE).shape[1]


@dataclass(frozen=True)
class AutoencoderKind:
    """Autoencoders of one kind: which names are of it, the latents they make, and how one is loaded."""

    knows: Callable[[str], bool]  # the full name
    latent: Callable[[str, int], LatentSpec]  # of square images with a side of so many pixels
    # For latents: by the name, whether that is the one recorded with them, on the device.
    load: Callable[[LatentSpec, str, bool, torch.device | str], Autoencoder]


def _kind_of(source: str) -> AutoencoderKind:
    return next((kind for kind in AUTOENCODERS if kind.knows(source)), _KL)


def _load_identity(latent: LatentSpec, source: str, recorded: bool, device: torch.device | str) -> Autoencoder:
    return IdentityAutoencoder(latent)


def _identity_latent(source: str, resolution: int) -> LatentSpec:
    return LatentSpec(shape=(3, resolution, resolution), scale=1.0, shift=0.0, autoencoder=IDENTITY)


def _load_autoencoder_kl(latent: LatentSpec, source: str, recorded: bool, device: torch.device | str) -> Autoencoder:
    if recorded and not latent.is_by(source):
        raise UserError(
            f"autoencoder {source}: configuration or weights are others than when the data was encoded; "
            f"give the folder of the earlier ones as {arg('autoencoder')}"
        )
    model = _load_kl(source)
    ours, theirs = (latent.shape[0], latent.scale, latent.shift), _latent_facts(source, model.config)
    if ours[0] != theirs[0] or (ours != theirs and not latent.measured):
        raise UserError(
            f"autoencoder {source}: (channels, scale, shift) of its latents are {theirs}, those of the data and "
            f"the network are {ours}; give the autoencoder that the data was prepared with, {latent.autoencoder}"
        )
    return KLAutoencoder(latent, model.to(device))


def _kl_latent(source: str, resolution: int) -> LatentSpec:
    config = _read_kl_config(source)
    channels, scale, shift = _latent_facts(source, config)
    factor = 2 ** (len(config.block_out_channels) - 1)  # each block of the encoder but the last halves the side
    side, rest = divmod(resolution, factor)
    if rest:
        raise UserError(f"{arg('resolution')} {resolution}: autoencoder {source} needs a multiple of {factor}")
    return LatentSpec((channels, side, side), scale, shift, source, fingerprint(source))


# Those that have names of their own; every other name is a folder's or a hub's, of a KL autoencoder.
AUTOENCODERS = [AutoencoderKind(lambda source: source == IDENTITY, _identity_latent, _load_identity)]
_KL = AutoencoderKind(lambda source: True, _kl_latent, _load_autoencoder_kl)


def _latent_facts(source: str, config: Any) -> tuple[int, PerChannel, PerChannel]:
    """Channels, scale and shift of `(z - shift) * scale`.

    With `latents_mean` m and `latents_std` s of each channel the latent is `(z - m) * scaling_factor / s`, as in
    diffusers' pipelines of Stable Diffusion XL; without them it is `(z - shift_factor) * scaling_factor`. UserError
    for one of m and s without the other, or together with a shift factor, which those pipelines leave out unsaid.
    """
    channels, factor, shift = config.latent_channels, config.scaling_factor, config.shift_factor or 0.0
    means, deviations = config.latents_mean, config.latents_std
    if means is None and deviations is None:
        return channels, factor, shift
    if means is None or deviations is None or shift:
        found = "shift_factor beside latents_mean" if shift else f"latents_{'std' if means is None else 'mean'} alone"
        raise UserError(
            f"autoencoder {source}: its {CONFIG_FILE} has {found}; how its latents are normalised is not defined, "
            "give both latents_mean and latents_std, or neither"
        )
    if not len(means) == len(deviations) == channels or not all(deviations):
        raise UserError(
            f"autoencoder {source}: latents_mean and latents_std have {len(means)} and {len(deviations)} numbers, "
            f"expected {channels} each, none of latents_std 0; correct its {CONFIG_FILE}"
        )
    return channels, tuple(factor / deviation for deviation in deviations), tuple(map(float, means))


def _load_kl(source: str) -> Any:
    kl_class = _autoencoder_kl(source)
    _check_there(source, CONFIG_FILE, WEIGHTS_FILE)
    try:
        model, info = kl_class.from_pretrained(source, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise _load_error(source, error) from None
    if info["missing_keys"]:  # diffusers would leave these at random values and only warn
        raise UserError(
            f"autoencoder {source}: its weights lack {len(info['missing_keys'])} tensors, "
            f"the first {min(info['missing_keys'])}; fetch it again"
        )
    return model


def _read_kl_config(source: str) -> Any:
    """The configuration with defaults filled in: older ones, sd-vae-ft-mse's too, leave out the scaling factor."""
    kl_class = _autoencoder_kl(source)
    _check_there(source, CONFIG_FILE)
    try:
        values = kl_class.load_config(source)
    except (OSError, ValueError) as error:
        raise _load_error(source, error) from None
    with torch.device("meta"):
        return kl_class.from_config(values).config


def _check_there(source: str, *files: str) -> None:
    """Before diffusers looks: a folder is never looked up on a hub, and an unreachable hub is reported at once."""
    if is_folder(source):
        existing_folder(source)
        return
    try:
        for file in files:
            check_reachable(source, file)
    except OSError as error:
        raise _load_error(source, error) from None


def _autoencoder_kl(source: str) -> Any:
    need(f"autoencoder {source}", "diffusers")
    from diffusers import AutoencoderKL

    return AutoencoderKL


def _load_error(source: str, error: Exception) -> UserError:
    cause = str(error).strip().partition("\n")[0].rstrip(".")
    return UserError(
        f"autoencoder {source}: can't be loaded ({cause}); give mse, ema, a hub name, "
        f"or a folder with {CONFIG_FILE} and {WEIGHTS_FILE} as {arg('autoencoder')}"
    )


def is_folder(name: str) -> bool:
    """Whether the name is a folder's: one that exists, or one that no repository of a hub can have."""
    path = Path(name)
    if name in SD_AUTOENCODERS or any(kind.knows(name) for kind in AUTOENCODERS):
        return False
    return path.is_dir() or not _REPOSITORY.fullmatch(name) or path.parent.is_dir()


def full_name(name: str) -> str:
    """The recorded form of a name: a folder's is absolute; "mse" and "ema" are Stability AI's fine-tuned decoders."""
    return str(Path(name).expanduser().resolve()) if is_folder(name) else SD_AUTOENCODERS.get(name, name)


def fingerprint(name: str) -> str | None:
    """SHA-256 of the configuration and the weights in the folder called `name`; None for what is no folder.

    The configuration counts by its values, not by how the file was written, nor by who wrote it (`_class_name`,
    `_diffusers_version` and the like). UserError where there is no such folder, or no autoencoder in it.
    """
    if not is_folder(name):
        return None
    folder = existing_folder(name)
    try:
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        settings = {key: value for key, value in values.items() if not key.startswith("_")}
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"autoencoder {name}: its {CONFIG_FILE} is damaged; fetch it again") from None
    content = {"config": settings, "weights": sha256(folder / WEIGHTS_FILE)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def autoencoder_id(name: str) -> str:
    """What distinguishes the autoencoder called `name` from others, as `LatentSpec.autoencoder_id`."""
    return _identity(full_name(name), fingerprint(name))


def _identity(name: str, digest: str | None) -> str:
    return name if digest is None else f"sha256:{digest}"


def existing_folder(name: str) -> Path:
    """The folder called `name`; UserError where it does not hold an autoencoder. It is never looked for elsewhere."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UserError(f"autoencoder {name}: no such folder; give the folder where it is now as {arg('autoencoder')}")
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise UserError(
                f"autoencoder {name}: no {file} in the folder; "
                f"give one with {CONFIG_FILE} and {WEIGHTS_FILE} as {arg('autoencoder')}"
            )
    return folder


def same_source(name: str, digest: str | None, other: str, other_digest: str | None) -> bool:
    """Whether two recorded names are of one autoencoder: by the digests where both are known, else by the names."""
    if digest is not None and other_digest is not None:
        return digest == other_digest
    return name == other or full_name(name) == full_name(other)
