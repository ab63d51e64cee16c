"""Networks that turn images into features: what they have in common, and timm's encoders among them."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from stablevm.networks.encoders import Encoder, load_encoder
from stablevm.support.precision import full_precision, tf32


class FeatureExtractor(Protocol):
    """uint8 images (B, 3, H, W) to named features, float32 (B, width) each; `pool` is always among them."""

    @property
    def name(self) -> str:
        """Shown beside every number."""

    @property
    def fingerprint(self) -> str:
        """Of its weights, in hexadecimal: features of equal fingerprints compare."""

    @property
    def feature_names(self) -> tuple[str, ...]: ...

    @property
    def section(self) -> str:
        """Of the results, under which its numbers stand."""

    @property
    def published(self) -> bool:
        """Whether it is the published Inception, whose distances alone are called FID, sFID and KID."""

    @property
    def has_stored_statistics(self) -> bool:
        """Whether the statistics that reference files store are of its features (`Reference.check_extractor`)."""

    @property
    def logits(self) -> Callable[[Tensor], Tensor] | None:
        """From pool features (n, width) to classes (n, classes), both on the CPU; None without."""

    def __call__(self, images: Tensor) -> dict[str, Tensor]: ...


class EncoderExtractor:
    """One vector per image from a frozen encoder: its class token, or its own mean over patches."""

    feature_names = ("pool",)
    section = "encoder"
    published = has_stored_statistics = False
    logits = None

    def __init__(self, encoder: Encoder, name: str, device: torch.device | str) -> None:
        self.name = name
        self.fingerprint = fingerprint(encoder)
        self._encoder = encoder
        self._device = device

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        with full_precision(torch.device(self._device)), tf32(False):
            return {"pool": self._encoder.pooled(images.to(self._device))}


def load_encoder_extractor(name: str, weights: Path | None, device: torch.device | str) -> EncoderExtractor:
    """By the names of --enc-type; images are scaled to 224 x 224 pixels, with antialiasing as for FD-DINOv2.

    Raises UserError as `load_encoder` does.
    """
    encoder = load_encoder(name, grid_size=None, weights=weights, device=device, antialias=True)
    return EncoderExtractor(encoder, name, device)


def fingerprint(network: nn.Module) -> str:
    """SHA-256 of the network's parameters and buffers with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data if tensor.ndim else b"")
    return digest.hexdigest()
