"""Encoding images as moments of latents, on the device of the process."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stablevm.networks.autoencoder import Autoencoder, LatentSpec, load_autoencoder
from stablevm.support.errors import UserError
from stablevm.support.precision import DTYPES, autocast, tf32
from stablevm.support.processes import Process


@dataclass(frozen=True)
class BatchEncoder:
    """Encodes batches of images; results depend on the size of the batch only by rounding."""

    autoencoder: Autoencoder
    device: torch.device
    dtype: torch.dtype

    def __call__(self, images: Tensor, names: Sequence[str]) -> Tensor:
        """Images (B, 3, H, W) uint8 to moments (B, 2C, h, w) float32 on the CPU: mean, then standard deviation.

        Raises UserError, naming the image, where they are not finite, also once they are rounded to float16.
        """
        with tf32(False), autocast(self.device, self.dtype), torch.no_grad():
            moments = self.autoencoder.encode(images.to(self.device).contiguous()).float().cpu().contiguous()
        finite = moments.half().isfinite().flatten(1).all(1)
        if not finite.all():
            name = names[int((~finite).nonzero()[0])]
            raise UserError(f"the latent of {name} is not finite; give --precision fp32, or leave that image out")
        return moments


def make_encoder(latent: LatentSpec, precision: str, process: Process) -> BatchEncoder:
    """Raises UserError where the autoencoder can't be loaded."""
    return BatchEncoder(load_autoencoder(latent, device=process.device), process.device, DTYPES[precision])
