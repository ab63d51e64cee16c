"""Random data with the shape and size of ImageNet, which needs no preparation; few distinct samples are repeated."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from stablevm.data.dataset import Fingerprint, PreparedDataset, Rows, checked_rows
from stablevm.networks.autoencoder import SD_AUTOENCODERS, SD_FACTOR, SD_SCALE, LatentSpec
from stablevm.support import rng
from stablevm.support.errors import UserError

IMAGENET_IMAGES = 1_281_167
DISTINCT = 512  # distinct samples; more would only take memory
CHANNELS = 4  # of Stable Diffusion's autoencoder
COARSENESS = 2  # latents of images are smooth; here over this many pixels
DEVIATION = 0.3  # of the autoencoder's posterior, small compared with that of its means, 1 / SD_SCALE


class RandomDataset(PreparedDataset):
    """A data set with as many rows as ImageNet, in `num_classes` classes of equal size.

    Row r has the values of row r modulo `DISTINCT`.
    """

    def __init__(self, num_classes: int, resolution: int) -> None:
        """resolution: side of the images in pixels."""
        side = resolution // SD_FACTOR
        self.folder, self.layout = Path("random data"), "random"
        self.latent = LatentSpec((CHANNELS, side, side), SD_SCALE, 0.0, SD_AUTOENCODERS["ema"])
        self.class_names = tuple(map(str, range(num_classes)))
        self.resolution = resolution
        self.has_images, self.has_flips = True, False
        generator = rng.generator("random data")
        coarse = torch.randn(DISTINCT, CHANNELS, side // COARSENESS, side // COARSENESS, generator=generator)
        means = F.interpolate(coarse, size=(side, side), mode="bilinear")
        means *= 1 / (SD_SCALE * means.std())  # so that the network's latents have unit variance
        self._moments = torch.cat([means, torch.full_like(means, DEVIATION)], dim=1).half()
        self._images = torch.randint(
            0, 256, (DISTINCT, 3, resolution, resolution), dtype=torch.uint8, generator=generator
        )

    def __len__(self) -> int:
        return IMAGENET_IMAGES

    def labels(self) -> Tensor:
        return torch.arange(len(self)) % self.num_classes

    def index(self) -> Tensor:
        return torch.arange(len(self))

    def moments(self, rows: Rows) -> Tensor:
        return self._moments[checked_rows(rows, len(self)) % DISTINCT]

    def moments_flip(self, rows: Rows) -> Tensor:
        raise UserError("the random data of a benchmark hold no mirrored images")

    def images(self, rows: Rows) -> Tensor:
        return self._images[checked_rows(rows, len(self)) % DISTINCT]

    def describe(self, row: int) -> str:
        return f"row {row} of random data"

    def fingerprint(self, *, with_images: bool) -> Fingerprint:
        return Fingerprint(len(self), "numbers", f"random {self.latent.shape}", "random" if with_images else "")

    def check_images(self) -> None:
        """Do nothing, because every row has an image."""
