"""The small network that classifies handwritten digits: it evaluates generated digits, and is an encoder for them."""

import torch
from torch import Tensor, nn

from stablevm.networks.initialisation import materialize, xavier_uniform

IMAGE_SIZE = 8  # scikit-learn's bundled digits are 8 x 8
GRID_SIZE = 4  # patches per side: the second convolution halves the image
FEATURE_DIM = 64
CLASSES = 10


class DigitsNet(nn.Module):
    """Three convolutions and a feature layer over grey images (B, 1, 8, 8) in [-1, 1]."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        """Build the network on the default device; parameters are drawn from a CPU generator, by default seeded 0."""
        super().__init__()
        with torch.device("meta"):
            self.convolutions = nn.Sequential(
                _convolution(1, 32), _convolution(32, FEATURE_DIM, stride=2), _convolution(FEATURE_DIM, FEATURE_DIM)
            )
            self.embedding = nn.Sequential(nn.Flatten(), nn.Linear(FEATURE_DIM * GRID_SIZE**2, FEATURE_DIM), nn.GELU())
            self.head = nn.Linear(FEATURE_DIM, CLASSES)
        materialize(self)
        xavier_uniform(self, generator or torch.Generator().manual_seed(0))

    def forward(self, images: Tensor) -> Tensor:
        """The logits (B, 10) of images (B, 1, 8, 8) in [-1, 1]."""
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """The features (B, 64) of images (B, 1, 8, 8), from the layer before the logits."""
        return self.embedding(self.convolutions(images))

    def patches(self, images: Tensor) -> Tensor:
        """The tokens (B, 16, 64) of images (B, 1, 8, 8), from the third convolution, row by row."""
        return self.convolutions(images).flatten(2).transpose(1, 2)


def _convolution(channels: int, width: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.GELU(),
    )
