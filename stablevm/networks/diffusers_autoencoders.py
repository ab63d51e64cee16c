"""The autoencoders of diffusers: how each class encodes, decodes and normalises. `FORMS` lists the classes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stablevm.networks.autoencoder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Autoencoder,
    LatentSpec,
    PerChannel,
    existing_folder,
    fingerprint,
    is_folder,
    pixels_to_unit,
    unit_to_pixels,
)
from stablevm.support.errors import UserError, arg
from stablevm.support.extras import need
from stablevm.support.hub import check_reachable, downloaded
from stablevm.support.text import shown


@dataclass(frozen=True)
class Facts:
    """The facts about latents, `(raw - shift) * scale`, that a configuration holds."""

    channels: int
    factor: int  # downsampling factor, in pixels per latent pixel and side
    scale: PerChannel = 1.0
    shift: PerChannel = 0.0
    resolution: int | None = None  # the only side of images that it accepts; None for any multiple of the factor

    @property
    def normalisation(self) -> tuple[int, PerChannel, PerChannel]:
        return self.channels, self.scale, self.shift


@dataclass(frozen=True)
class Form:
    """The functions for one class of autoencoders; their models are frozen and float32."""

    facts: Callable[[str, Any], Facts]  # from the name and the whole configuration
    moments: Callable[[Any, Tensor], Tensor]  # images (B, 3, H, W) in [-1, 1] to moments of raw latents
    images: Callable[[Any, Tensor], Tensor]  # raw latents (B, C, h, w) to images in about [-1, 1]
    deterministic: bool = False
    packages: tuple[str, ...] = ("diffusers",)


class DiffusersAutoencoder:
    """An autoencoder of diffusers, such as Stable Diffusion's AutoencoderKL (Rombach et al., 2022)."""

    def __init__(self, latent: LatentSpec, model: Any, form: Form, device: torch.device | str | None = None) -> None:
        """device: where it computes, if its weights come there only then (offloading); otherwise where they are."""
        self.latent, self.form, self.model, self._device = latent, form, model, device

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return self.form.moments(self.model, pixels_to_unit(images.to(self.device)).to(self.model.dtype)).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        raw = self.latent.denormalize(latents.to(self.device, torch.float32))
        return unit_to_pixels(self.form.images(self.model, raw.to(self.model.dtype))).cpu()

    @property
    def device(self) -> torch.device | str:
        return self._device or self.model.device


def around(latent: LatentSpec, model: Any, device: torch.device | str) -> DiffusersAutoencoder:
    """The autoencoder of a model of diffusers, which computes on `device` in the model's dtype.

    UserError for a class without a line in `FORMS`.
    """
    form = FORMS.get(type(model).__name__)
    if form is None:
        raise UserError(f"{arg('vae')} {type(model).__name__}: expected one of {', '.join(FORMS)}")
    return DiffusersAutoencoder(latent, model, form, device)


def latent_of(source: str, resolution: int) -> LatentSpec:
    """Describe the latents of images with side `resolution`; UserError if the autoencoder does not accept that size."""
    form, config = _read(source)
    facts = form.facts(source, config)
    if facts.resolution not in (None, resolution):
        raise UserError(
            f"{arg('resolution')} {resolution}: autoencoder {source} takes images of {facts.resolution} pixels; "
            "convert them to that size"
        )
    side, rest = divmod(resolution, facts.factor)
    if rest:
        raise UserError(f"{arg('resolution')} {resolution}: autoencoder {source} needs a multiple of {facts.factor}")
    shape = (facts.channels, side, side)
    return LatentSpec(shape, facts.scale, facts.shift, source, fingerprint(source), deterministic=form.deterministic)


def factor_of(source: str) -> int:
    """The downsampling factor, in pixels per latent pixel and side."""
    form, config = _read(source)
    return form.facts(source, config).factor


def load(latent: LatentSpec, source: str, device: torch.device | str) -> Autoencoder:
    """Load the autoencoder; UserError if it can't be loaded or makes other latents than `latent`.

    A scale and shift that were measured on the data are not compared with the configuration; then only the number of
    channels tells autoencoders apart, and commands warn of another one (`decoding_notes`).
    """
    form, config = _read(source)
    model = _load(source, config)
    facts = form.facts(source, model.config)
    ours, theirs = (latent.shape[0], latent.scale, latent.shift), facts.normalisation
    if ours[0] != theirs[0] or (ours != theirs and not latent.measured):
        raise UserError(
            f"autoencoder {source}: (channels, scale, shift) of its latents are {theirs}, but data and network have "
            f"{ours}; give the autoencoder that the data was prepared with, {latent.autoencoder}"
        )
    if facts.resolution not in (None, latent.shape[1] * facts.factor):
        raise UserError(
            f"autoencoder {source}: decodes latents with a side of {facts.resolution // facts.factor}, but these have "
            f"{latent.shape[1]}; give the autoencoder of the data"
        )
    return DiffusersAutoencoder(latent, model.to(device).float().eval().requires_grad_(False), form)


# The classes


def _kl_facts(source: str, config: Any) -> Facts:
    """If the configuration has `latents_mean` m and `latents_std` s for each channel, the latent is
    `(z - m) * scaling_factor / s`, as in diffusers' pipelines for Stable Diffusion XL; otherwise it is
    `(z - shift_factor) * scaling_factor`. UserError if it has only one of m and s, or both with a shift factor, which
    those pipelines silently ignore.
    """
    channels, scale, shift = config.latent_channels, config.scaling_factor, config.shift_factor or 0.0
    factor = 2 ** (len(config.block_out_channels) - 1)  # every block of the encoder except the last halves the side
    means, deviations = config.latents_mean, config.latents_std
    if means is None and deviations is None:
        return Facts(channels, factor, scale, shift)
    if means is None or deviations is None or shift:
        found = "shift_factor beside latents_mean" if shift else f"latents_{'std' if means is None else 'mean'} alone"
        raise UserError(
            f"autoencoder {source}: its {CONFIG_FILE} has {found}, which does not define how latents are normalised; "
            "give both latents_mean and latents_std without shift_factor, or neither"
        )
    return Facts(channels, factor, *_statistics(source, channels, means, deviations, scale))


def _statistics(
    source: str, channels: int, means: Any, deviations: Any, factor: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scale and shift of each channel."""
    if not len(means) == len(deviations) == channels or not all(deviations):
        raise UserError(
            f"autoencoder {source}: latents_mean and latents_std have {len(means)} and {len(deviations)} numbers, "
            f"expected {channels} each, none of latents_std 0; correct its {CONFIG_FILE}"
        )
    return tuple(factor / deviation for deviation in deviations), tuple(map(float, means))


def _kl_moments(model: Any, images: Tensor) -> Tensor:
    posterior = model.encode(images).latent_dist
    return torch.cat([posterior.mean, posterior.std], dim=1)


def _decoded(model: Any, raw: Tensor) -> Tensor:
    return model.decode(raw).sample


def _dc_facts(source: str, config: Any) -> Facts:
    factor = 2 ** (len(config.encoder_block_out_channels) - 1)
    return Facts(config.latent_channels, factor, config.scaling_factor)


def _latent(model: Any, images: Tensor) -> Tensor:
    return model.encode(images).latent


def _rae_facts(source: str, config: Any) -> Facts:
    """RAE's own normalisation, by statistics among its weights, is part of encoding and decoding."""
    side = config.encoder_input_size // config.encoder_patch_size
    return Facts(config.encoder_hidden_size, config.patch_size, resolution=side * config.patch_size)


def _rae_moments(model: Any, images: Tensor) -> Tensor:
    return model.encode((images + 1) / 2).latent  # its pixels are in [0, 1]


def _rae_images(model: Any, raw: Tensor) -> Tensor:
    return 2 * model.decode(raw).sample - 1


def _qwen_facts(source: str, config: Any) -> Facts:
    statistics = _statistics(source, config.z_dim, config.latents_mean, config.latents_std, 1.0)
    return Facts(config.z_dim, 2 ** len(config.temperal_downsample), *statistics)


def _qwen_moments(model: Any, images: Tensor) -> Tensor:
    """An image is a film of one picture."""
    posterior = model.encode(images[:, :, None]).latent_dist
    return torch.cat([posterior.mean, posterior.std], dim=1)[:, :, 0]


def _qwen_images(model: Any, raw: Tensor) -> Tensor:
    return model.decode(raw[:, :, None]).sample[:, :, 0]


def _flux2_facts(source: str, config: Any) -> Facts:
    """Flux 2's network sees patches of the encoder's latents, normalised by statistics among the weights."""
    side = config.patch_size[0]
    means, variances = _tensors(source, "bn.running_mean", "bn.running_var")
    scale = (variances + config.batch_norm_eps).rsqrt()
    factor = side * 2 ** (len(config.block_out_channels) - 1)
    return Facts(config.latent_channels * side**2, factor, tuple(scale.tolist()), tuple(means.tolist()))


def _flux2_moments(model: Any, images: Tensor) -> Tensor:
    posterior, side = model.encode(images).latent_dist, model.config.patch_size[0]
    return torch.cat([F.pixel_unshuffle(part, side) for part in (posterior.mean, posterior.std)], dim=1)


def _flux2_images(model: Any, raw: Tensor) -> Tensor:
    return model.decode(F.pixel_shuffle(raw, model.config.patch_size[0])).sample


_DEFAULT_CLASS = "AutoencoderKL"  # of configurations that name none
FORMS = {
    _DEFAULT_CLASS: Form(_kl_facts, _kl_moments, _decoded),
    "AutoencoderDC": Form(_dc_facts, _latent, _decoded, deterministic=True),
    "AutoencoderRAE": Form(
        _rae_facts, _rae_moments, _rae_images, deterministic=True, packages=("diffusers", "transformers")
    ),
    "AutoencoderKLQwenImage": Form(_qwen_facts, _qwen_moments, _qwen_images),
    "AutoencoderKLFlux2": Form(_flux2_facts, _flux2_moments, _flux2_images),
}


# Reading


def _read(source: str) -> tuple[Form, Any]:
    """The form, and the configuration with default values filled in; old ones, such as sd-vae-ft-mse's, lack the
    scaling factor.
    """
    values = _configuration(source)
    name = values.get("_class_name", _DEFAULT_CLASS)
    form = FORMS.get(name)
    if form is None:
        raise UserError(f"autoencoder {source}: {shown(name)} of diffusers, expected one of {', '.join(FORMS)}")
    kind = _class(source, name)
    try:
        with torch.device("meta"):
            return form, kind.from_config(values).config
    except (ValueError, TypeError, AttributeError) as error:  # the last of diffusers and transformers at odds
        raise _load_error(source, error) from None


def _configuration(source: str) -> dict[str, Any]:
    kind = _class(source, _DEFAULT_CLASS)
    _check_there(source, CONFIG_FILE)
    try:
        return kind.load_config(source)
    except (OSError, ValueError) as error:
        raise _load_error(source, error) from None


def _class(source: str, name: str) -> Any:
    need(f"autoencoder {source}", *FORMS[name].packages)
    import diffusers

    kind = getattr(diffusers, name, None)
    if kind is None:
        raise UserError(f"autoencoder {source}: diffusers {diffusers.__version__} has no {name}; install a newer one")
    return kind


def _load(source: str, config: Any) -> Any:
    _check_there(source, CONFIG_FILE, WEIGHTS_FILE)
    kind = _class(source, config.get("_class_name", _DEFAULT_CLASS))
    try:
        with torch.random.fork_rng(devices=[]):  # RAE's encoder is first filled with random values
            model, info = kind.from_pretrained(source, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise _load_error(source, error) from None
    if info["missing_keys"]:  # diffusers would leave them random, with only a warning
        raise UserError(
            f"autoencoder {source}: {len(info['missing_keys'])} tensors are missing from its weights, "
            f"the first {min(info['missing_keys'])}; download it again"
        )
    return model


def _tensors(source: str, *names: str) -> list[Tensor]:
    """Tensors among the weights, without the others."""
    _check_there(source, WEIGHTS_FILE)
    try:
        with safe_open(_weights_file(source), framework="pt") as file:
            return [file.get_tensor(name).float() for name in names]
    except (OSError, SafetensorError) as error:
        raise _load_error(source, error) from None


def _weights_file(source: str) -> Path:
    if is_folder(source):
        return Path(source) / WEIGHTS_FILE
    return downloaded(source, WEIGHTS_FILE)


def _check_there(source: str, *files: str) -> None:
    """Check the source before diffusers does: a folder is never looked up on the hub, and an unreachable hub is
    reported at once.
    """
    if is_folder(source):
        existing_folder(source)
        return
    try:
        for file in files:
            check_reachable(source, file)
    except OSError as error:
        raise _load_error(source, error) from None


def _load_error(source: str, error: Exception) -> UserError:
    cause = str(error).strip().partition("\n")[0].rstrip(".")
    return UserError(
        f"autoencoder {source}: can't be loaded ({cause}); give mse, ema, a hub name, "
        f"or a folder with {CONFIG_FILE} and {WEIGHTS_FILE} as {arg('autoencoder')}"
    )
