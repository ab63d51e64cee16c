"""The small network that classifies small images: it evaluates generated ones, and is an encoder for them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stablevm.networks.initialisation import materialize, xavier_uniform
from stablevm.support.errors import UserError

FEATURE_DIM = 64
DIGITS_SIDE, DIGITS_CLASSES = 8, 10  # scikit-learn's bundled digits
SMALLEST, LARGEST = 28, 64  # sides of other images in pixels, which are divisible by 4


class SmallNet(nn.Module):
    """Three convolutions and a feature layer over images (B, channels, side, side) in [-1, 1].

    The grid of patches has half the side of digits of 8 pixels, and a quarter of the side of larger images.
    """

    def __init__(
        self,
        generator: torch.Generator | None = None,
        *,
        side: int = DIGITS_SIDE,
        channels: int = 1,
        classes: int = DIGITS_CLASSES,
    ) -> None:
        """Build the network on the default device; parameters are drawn from a CPU generator, by default seeded 0.

        UserError for images of another size than 8 pixels, or 28 to 64 in steps of 4.
        """
        super().__init__()
        if side != DIGITS_SIDE and (side % 4 or not SMALLEST <= side <= LARGEST):
            raise UserError(
                f"images of {side} pixels, expected {DIGITS_SIDE}, or {SMALLEST} to {LARGEST} in steps of 4; larger "
                "ones are evaluated by Inception or a pretrained encoder"
            )
        self.side, self.channels, self.classes, self.dim = side, channels, classes, FEATURE_DIM
        first = 1 if side == DIGITS_SIDE else 2
        self.grid_size = side // (2 * first)
        with torch.device("meta"):
            self.convolutions = nn.Sequential(
                _convolution(channels, 32, stride=first),
                _convolution(32, FEATURE_DIM, stride=2),
                _convolution(FEATURE_DIM, FEATURE_DIM),
            )
            patches = self.grid_size**2
            self.embedding = nn.Sequential(nn.Flatten(), nn.Linear(FEATURE_DIM * patches, FEATURE_DIM), nn.GELU())
            self.head = nn.Linear(FEATURE_DIM, classes)
        materialize(self)
        xavier_uniform(self, generator or torch.Generator().manual_seed(0))

    def forward(self, images: Tensor) -> Tensor:
        """The logits (B, classes) of images (B, channels, side, side) in [-1, 1]."""
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """The features (B, 64) of images (B, channels, side, side), from the layer before the logits."""
        return self.embedding(self.convolutions(images))

    def patches(self, images: Tensor) -> Tensor:
        """The tokens (B, grid_size^2, 64) of images (B, channels, side, side), from the third convolution, by rows."""
        return self.convolutions(images).flatten(2).transpose(1, 2)


DigitsNet = SmallNet  # its name in version 0.1


def net_for(weights: Mapping[str, Any]) -> SmallNet | None:
    """A network of the size of these weights, which are not loaded; None if they are not those of such a network."""
    try:
        channels, width = weights["convolutions.0.0.weight"].shape[1], weights["embedding.1.weight"].shape[1]
        classes = weights["head.weight"].shape[0]
    except (KeyError, AttributeError, IndexError):
        return None
    grid = round((width / FEATURE_DIM) ** 0.5)
    side = DIGITS_SIDE if grid == DIGITS_SIDE // 2 else 4 * grid
    try:
        return SmallNet(side=side, channels=channels, classes=classes)
    except UserError:
        return None


def _convolution(channels: int, width: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.GELU(),
    )
