"""Between pixels and latents: the latent's scale and shift, the rounding of pixels, and the autoencoders.

This is the one home of `(z - shift) * scale` and of the conversion between uint8 pixels and [-1, 1].
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from stablevm.errors import UserError

IDENTITY = "identity"
LARGEST_SIDE = 65_536  # of a latent: a file that says more is damaged
SHORT_NAMES = {"mse": "stabilityai/sd-vae-ft-mse", "ema": "stabilityai/sd-vae-ft-ema"}


@dataclass(frozen=True)
class LatentSpec:
    """What a latent is: recorded with the prepared data and in each checkpoint, compared when the two meet."""

    shape: tuple[int, int, int]  # channels, height, width
    scale: float
    shift: float
    autoencoder: str  # "identity" (latent = pixels), or a diffusers AutoencoderKL's name or folder

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __post_init__(self) -> None:
        """UserError for a latent that can't be."""
        if len(self.shape) != 3 or not all(1 <= length <= LARGEST_SIDE for length in self.shape):
            raise UserError(f"latent shape {list(self.shape)}, expected 3 lengths of 1 to {LARGEST_SIDE:,}")
        if not (math.isfinite(self.shift) and math.isfinite(self.scale) and self.scale):
            raise UserError(f"latent scale {self.scale} and shift {self.shift}, expected finite numbers, no scale of 0")

    def from_moments(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Draw latents: moments (B, 2C, h, w) hold mean and standard deviation, noise is (B, C, h, w) of N(0, 1)."""
        mean, deviation = moments.float().chunk(2, dim=1)
        return self.normalize(mean + deviation * noise)

    def means(self, moments: Tensor) -> Tensor:
        """The latents' means (B, C, h, w), without their noise."""
        return self.normalize(moments.float().chunk(2, dim=1)[0])

    def normalize(self, raw: Tensor) -> Tensor:
        """The autoencoder's own latents to the space in which the network works."""
        return (raw - self.shift) * self.scale

    def denormalize(self, latents: Tensor) -> Tensor:
        return latents / self.scale + self.shift


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

    Raises UserError when it can't be loaded, or when its channels, scale or shift are not those of `latent`.
    """
    source = full_name(name or latent.autoencoder)
    if source == IDENTITY:
        return IdentityAutoencoder(latent)
    model = _load_kl(source)
    ours, theirs = (latent.shape[0], latent.scale, latent.shift), _latent_facts(model.config)
    if ours != theirs:
        raise UserError(
            f"autoencoder {source}: (channels, scale, shift) of its latents are {theirs}, those of the data and "
            f"the network are {ours}; give the autoencoder that the data was prepared with, {latent.autoencoder}"
        )
    return KLAutoencoder(latent, model.to(device))


def latent_spec_of(name: str, resolution: int) -> LatentSpec:
    """The latents that the autoencoder called `name` makes of images of `resolution` x `resolution` pixels.

    Reads the autoencoder's configuration, not its weights. Raises UserError when it can't be read, or when
    `resolution` is not a multiple of the autoencoder's downsampling factor.
    """
    source = full_name(name)
    if source == IDENTITY:
        return LatentSpec(shape=(3, resolution, resolution), scale=1.0, shift=0.0, autoencoder=IDENTITY)
    config = _read_kl_config(source)
    channels, scale, shift = _latent_facts(config)
    factor = 2 ** (len(config.block_out_channels) - 1)  # each block of the encoder but the last halves the side
    side, rest = divmod(resolution, factor)
    if rest:
        raise UserError(f"--resolution {resolution}: autoencoder {source} needs a multiple of {factor}")
    return LatentSpec(shape=(channels, side, side), scale=scale, shift=shift, autoencoder=source)


def full_name(name: str) -> str:
    """The recorded form of a name: "mse" and "ema" are short for Stability AI's fine-tuned decoders."""
    return SHORT_NAMES.get(name, name)


def _latent_facts(config: Any) -> tuple[int, float, float]:
    return config.latent_channels, config.scaling_factor, config.shift_factor or 0.0


def _load_kl(source: str) -> Any:
    kl_class = _autoencoder_kl(source)
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
    try:
        values = kl_class.load_config(source)
    except (OSError, ValueError) as error:
        raise _load_error(source, error) from None
    with torch.device("meta"):
        return kl_class.from_config(values).config


def _autoencoder_kl(source: str) -> Any:
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise UserError(
            f"autoencoder {source}: the package diffusers is missing; install it (pip install 'stablevm[vae]')"
        ) from None
    return AutoencoderKL


def _load_error(source: str, error: Exception) -> UserError:
    cause = str(error).strip().partition("\n")[0].rstrip(".")
    return UserError(
        f"autoencoder {source}: can't be loaded ({cause}); give mse, ema, a hub name, "
        "or a folder with config.json and diffusion_pytorch_model.safetensors"
    )
