"""Frozen image encoders, whose patch tokens are the targets of representation alignment."""

import hashlib
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablevm.networks.autoencoder import pixels_to_unit
from stablevm.networks.masked_net import MaskedNet, masked_net_for
from stablevm.networks.small_net import SmallNet, net_for
from stablevm.support.errors import UserError, arg
from stablevm.support.extras import need
from stablevm.support.foreign_weights import read_weights
from stablevm.support.hub import check_reachable
from stablevm.support.precision import without_autocast
from stablevm.support.text import one_of

# The network of `stablevm extractor`: for digits of 8 pixels, or of any size that its weights have.
DIGITS, EXTRACTOR = "digits", "extractor"
MASKED = "masked"  # the network of `stablevm encoder`
MOCO_PREFIX = "module.base_encoder."  # of the encoder's parameters in a MoCo v3 checkpoint
# Layers with wrong names in MoCo v3 checkpoints, which REPA's loader renames too.
MOCO_MISSPELT = {
    "blocks.13.norm13": "blocks.13.norm1",
    "blocks.13.mlp.fc13": "blocks.13.mlp.fc1",
    "blocks.14.norm14": "blocks.14.norm2",
    "blocks.14.mlp.fc14": "blocks.14.mlp.fc2",
}
FEATURE_PIXELS = 224  # side of the images for pooled features, as for FD-DINOv2 (Stein et al., 2023)
NOT_PLAIN = "not a plain vision transformer with one token per patch; choose one, such as dinov2-vit-b"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # the files that timm looks for in a repository
ERROR_LENGTH = 240  # characters quoted from another library's message


@dataclass(frozen=True)
class TimmEncoderSpec:
    """A network in timm, and how its tokens are read."""

    timm_name: str
    final_norm: bool = True  # REPA reads MAE and CLIP before their last normalisation
    downloadable: bool = True
    num_heads: int | None = None  # if it differs from timm's


# REPA's names (Yu et al., 2024). timm has no MoCo v3, so its weights are loaded into models of the same architecture
# and pixel statistics: MAE's, and for the small one DINO's with 12 heads instead of 6. Of timm's two CLIP models,
# "quickgelu" has the activation that CLIP was trained with.
SHORT_NAMES = {
    "dinov2-vit-s": TimmEncoderSpec("vit_small_patch14_dinov2.lvd142m"),
    "dinov2-vit-b": TimmEncoderSpec("vit_base_patch14_dinov2.lvd142m"),
    "dinov2-vit-l": TimmEncoderSpec("vit_large_patch14_dinov2.lvd142m"),
    "dinov2-vit-g": TimmEncoderSpec("vit_giant_patch14_dinov2.lvd142m"),
    "dinov2reg-vit-s": TimmEncoderSpec("vit_small_patch14_reg4_dinov2.lvd142m"),
    "dinov2reg-vit-b": TimmEncoderSpec("vit_base_patch14_reg4_dinov2.lvd142m"),
    "dinov2reg-vit-l": TimmEncoderSpec("vit_large_patch14_reg4_dinov2.lvd142m"),
    "dinov2reg-vit-g": TimmEncoderSpec("vit_giant_patch14_reg4_dinov2.lvd142m"),
    "dinov1-vit-b": TimmEncoderSpec("vit_base_patch16_224.dino"),
    "mocov3-vit-s": TimmEncoderSpec("vit_small_patch16_224.dino", downloadable=False, num_heads=12),
    "mocov3-vit-b": TimmEncoderSpec("vit_base_patch16_224.mae", downloadable=False),
    "mocov3-vit-l": TimmEncoderSpec("vit_large_patch16_224.mae", downloadable=False),
    "mae-vit-l": TimmEncoderSpec("vit_large_patch16_224.mae", final_norm=False),
    "clip-vit-L": TimmEncoderSpec("vit_large_patch14_clip_quickgelu_224.openai", final_norm=False),
    "jepa-vit-h": TimmEncoderSpec("vit_huge_patch14_gap_224.in1k_ijepa"),
}


class Encoder(nn.Module, ABC):
    """A frozen network that maps images to tokens, without gradients and always in evaluation mode."""

    network: Any  # the frozen network: SmallNet, MaskedNet, or a timm model, which has no useful static type

    def __init__(self, network: nn.Module, *, dim: int, grid_size: int) -> None:
        """Freeze `network`, whose tokens have width `dim` and form a grid of grid_size x grid_size."""
        super().__init__()
        self.network = network
        self.dim = dim
        self.grid_size = grid_size
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Encoder":
        """Stay in evaluation mode, whatever `mode` says."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """The tokens (B, grid_size^2, dim), float32, row by row, of uint8 images (B, 3, H, W) on the same device."""
        with without_autocast(images.device):
            return self._tokens(images).float()

    @torch.no_grad()
    def pooled(self, images: Tensor) -> Tensor:
        """One feature vector per image: (B, dim), float32, by the network's own pooling, such as the class token."""
        with without_autocast(images.device):
            return self._pooled(images).float()

    def fingerprint(self) -> str:
        """SHA-256 of all parameters and buffers with their names, in the precision that the network runs in."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(
                f"{name} {tuple(tensor.shape)}".encode() + tensor.float().cpu().contiguous().numpy().tobytes()
            )
        return digest.hexdigest()

    @abstractmethod
    def _tokens(self, images: Tensor) -> Tensor:
        """The tokens, in the precision that the network runs in."""

    @abstractmethod
    def _pooled(self, images: Tensor) -> Tensor:
        """The feature vectors, in the precision that the network runs in."""


class SmallEncoder(Encoder):
    """The patch tokens of a network of this library, for images of its size: grey ones by their first channel."""

    def __init__(self, network: SmallNet | MaskedNet, dtype: torch.dtype, name: str = EXTRACTOR) -> None:
        super().__init__(network.to(dtype), dim=network.dim, grid_size=network.grid_size)
        self.dtype, self.name = dtype, name

    def _tokens(self, images: Tensor) -> Tensor:
        return self.network.patches(self._input(images))

    def _pooled(self, images: Tensor) -> Tensor:
        return self.network.features(self._input(images))

    def _input(self, images: Tensor) -> Tensor:
        side = self.network.side
        if images.shape[-2:] != (side, side):
            raise UserError(
                f"{arg('encoder')} {self.name}: the data's images have {images.shape[-2]} x {images.shape[-1]} pixels, "
                f"this encoder takes {side} x {side}; choose another encoder"
            )
        return pixels_to_unit(images[:, : self.network.channels]).to(self.dtype)


class TimmEncoder(Encoder):
    """The patch tokens of a vision transformer in timm, for images of any size."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Any, dtype: torch.dtype, antialias: bool = False) -> None:
        """Wrap a timm network that runs in `dtype`; antialias: as in `load_encoder`."""
        grid_size = network.patch_embed.grid_size[0]
        super().__init__(network.to(dtype), dim=network.num_features, grid_size=grid_size)
        self.dtype = dtype
        self.antialias = antialias
        self.input_size = grid_size * _patch_size(network)
        for name in ("mean", "std"):
            statistic = torch.tensor(network.pretrained_cfg[name]).view(3, 1, 1)
            self.register_buffer(name, statistic, persistent=False)

    def _tokens(self, images: Tensor) -> Tensor:
        return self._all_tokens(images)[:, self.network.num_prefix_tokens :]

    def _pooled(self, images: Tensor) -> Tensor:
        return self.network.forward_head(self._all_tokens(images), pre_logits=True)

    def _all_tokens(self, images: Tensor) -> Tensor:
        side = self.input_size
        pixels = F.interpolate(images.float() / 255, size=(side, side), mode="bicubic", antialias=self.antialias)
        inputs = (pixels - self.mean) / self.std
        return self.network.forward_features(inputs.to(self.dtype))


def load_encoder(
    name: str,
    *,
    grid_size: int | None,
    weights: Path | None,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    antialias: bool = False,
) -> Encoder:
    """Load the frozen encoder called `name`, which gives grid_size x grid_size tokens and runs in `dtype` on `device`.

    name: "digits", "extractor", "masked", one of REPA's short names (`SHORT_NAMES`), or a vision transformer's in timm.
    grid_size: if None, an image has as many tokens as one of 224 x 224 pixels.
    weights: a safetensors or torch file in timm's or the authors' layout; if None, timm downloads the pretrained ones.
    antialias: images are resized by bicubic interpolation to the size that gives this many tokens, as in REPA without
    antialiasing, or with it.

    Raises UserError for an unknown name, a file that does not fit, or weights that can't be downloaded.
    """
    if name in (DIGITS, EXTRACTOR, MASKED):
        return _load_small(name, grid_size, weights, dtype).to(device)
    return _load_timm(name, grid_size, weights, dtype, antialias).to(device)


def untrained_encoder(name: str, *, grid_size: int, device: torch.device | str, dtype: torch.dtype) -> Encoder:
    """The encoder called `name` with random weights, to measure its speed and memory.

    UserError for an unknown name, or a network that can't give grid_size x grid_size tokens.
    """
    if name == DIGITS:
        network = SmallNet()
        _check_grid(name, network, grid_size)
        return SmallEncoder(network, dtype, name).to(device)
    return TimmEncoder(_create(name, _spec_of(name), grid_size, pretrained=False), dtype).to(device)


def _check_grid(name: str, network: SmallNet | MaskedNet, grid_size: int | None) -> None:
    own = network.grid_size
    if grid_size not in (None, own):
        raise UserError(
            f"{arg('encoder')} {name}: it gives {own} x {own} tokens, the model has "
            f"{grid_size} x {grid_size}; choose a patch size that gives {own} x {own}"
        )


def _load_small(name: str, grid_size: int | None, weights: Path | None, dtype: torch.dtype) -> Encoder:
    if weights is None:
        if name == DIGITS:
            _check_grid(name, SmallNet(), grid_size)
        raise UserError(f"{arg('encoder')} {name}: give a file (.safetensors) as {arg('weights')}")
    state = read_weights(weights, arg("weights"))
    network = {EXTRACTOR: net_for, MASKED: masked_net_for}.get(name, lambda _: SmallNet())(state)
    if network is None:
        trained_by = "stablevm encoder" if name == MASKED else "stablevm extractor"
        raise UserError(f"{arg('weights')} {weights}: not the weights of a network that {trained_by} trains")
    _check_grid(name, network, grid_size)
    _load_strictly(network, state, name, weights)
    return SmallEncoder(network, dtype, name)


def _load_timm(name: str, grid_size: int | None, weights: Path | None, dtype: torch.dtype, antialias: bool) -> Encoder:
    spec = _spec_of(name)
    if weights is None and not spec.downloadable:
        raise UserError(f"{arg('encoder')} {name}: its weights can't be downloaded; give a file as {arg('weights')}")
    _check_plain(name, spec)
    network = _create(name, spec, grid_size, pretrained=weights is None)
    if weights is not None:
        state = _for_timm(read_weights(weights, arg("weights")), network)
        _load_strictly(network, state, spec.timm_name, weights)
    if not spec.final_norm:
        network.norm = nn.Identity()
    return TimmEncoder(network, dtype, antialias)


def _spec_of(name: str) -> TimmEncoderSpec:
    """The encoder with this short name or timm name, which must exist; timm says whether its weights can be downloaded.

    UserError for any other name.
    """
    need(f"{arg('encoder')} {name}", "timm")
    import timm

    spec = SHORT_NAMES.get(name, TimmEncoderSpec(name))
    try:
        pretrained = timm.get_pretrained_cfg(spec.timm_name)
    except RuntimeError:  # a known architecture with an unknown tag after the dot
        pretrained = None
    if pretrained is None:
        known, others = (DIGITS, EXTRACTOR, MASKED, *SHORT_NAMES), ", or the name of a timm vision transformer"
        raise UserError(f"{arg('encoder')} {name}: expected {one_of(name, known, others)}")
    return replace(spec, downloadable=spec.downloadable and pretrained.has_weights)


def _check_plain(name: str, spec: TimmEncoderSpec) -> None:
    """Raise UserError unless the network has one token per patch of a grid; checked before any weights are loaded.

    In others, such as hybrids with convolutions, the number of tokens does not follow from the size of the patches.
    """
    import timm
    from timm.layers import PatchEmbed

    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        network: Any = timm.create_model(spec.timm_name, pretrained=False, num_classes=0)
    plain = isinstance(getattr(network, "patch_embed", None), PatchEmbed)
    if not (plain and hasattr(network, "num_prefix_tokens") and hasattr(network, "set_input_size")):
        raise UserError(f"{arg('encoder')} {name}: {NOT_PLAIN}")


def _create(name: str, spec: TimmEncoderSpec, grid_size: int | None, pretrained: bool) -> Any:
    """Create timm's network for images of grid_size patches per side; timm resamples the position embedding."""
    import timm

    options: dict[str, Any] = {} if spec.num_heads is None else {"num_heads": spec.num_heads}
    try:
        if pretrained:
            _check_hub(spec.timm_name)
        # timm draws initial values from the global random state, even if weights replace them at once
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            network: Any = timm.create_model(spec.timm_name, pretrained=pretrained, num_classes=0, **options)
    except OSError as error:
        raise UserError(
            f"{arg('encoder')} {name}: {spec.timm_name} can't be downloaded ({_quote(error)}); "
            f"give a file as {arg('weights')}"
        ) from None
    if not hasattr(network, "num_prefix_tokens") or not hasattr(network, "set_input_size"):
        raise UserError(f"{arg('encoder')} {name}: {NOT_PLAIN}")
    side = _patch_size(network) * (grid_size or FEATURE_PIXELS // _patch_size(network))
    network.set_input_size(img_size=(side, side))
    return network


def _check_hub(timm_name: str) -> None:
    """Raise OSError at once if the hub that timm would download from does not answer; timm retries for a long time."""
    import timm

    pretrained = timm.get_pretrained_cfg(timm_name)
    if pretrained is not None and pretrained.hf_hub_id:
        check_reachable(pretrained.hf_hub_id, *WEIGHT_FILES)


def _patch_size(network: Any) -> int:
    height, width = network.patch_embed.patch_size
    assert height == width
    return height


def _for_timm(checkpoint: dict[str, Any], network: nn.Module) -> dict[str, Any]:
    """The parameters with timm's names, resampled to the network's grid, without the classifier."""
    nested = checkpoint.get("state_dict", checkpoint)
    moco = {_moco_name(key): value for key, value in nested.items() if key.startswith(MOCO_PREFIX)}
    state = moco or checkpoint
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        state = convert(state, network)
    return {key: value for key, value in state.items() if not key.startswith("head")}


def _moco_name(key: str) -> str:
    name = key.removeprefix(MOCO_PREFIX)
    layer, _, parameter = name.rpartition(".")
    return f"{MOCO_MISSPELT[layer]}.{parameter}" if layer in MOCO_MISSPELT else name


def _load_strictly(network: nn.Module, state: dict[str, Any], name: str, path: Path) -> None:
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{arg('weights')} {path}: not the weights of {name} ({_quote(error)})") from None


def _quote(error: Exception) -> str:
    return shorten(str(error), ERROR_LENGTH)
