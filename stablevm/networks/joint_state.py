"""Images with a vector beside them, as one state: a row holds the values of a latent and then the vector's.

REG (Wu et al., 2025) denoises an encoder's class token together with the image. Both take the same path at the same
time with noise of their own, so the pair is one longer state: objectives, banks and solvers treat it like any other.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def joined(latents: Tensor, vectors: Tensor) -> Tensor:
    """The states (B, C h w + D) of latents (B, C, h, w) and vectors (B, D)."""
    return torch.cat([latents.flatten(1), vectors.to(latents)], dim=1)


def parted(states: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The latents (B, *shape) and the vectors (B, D) of states (B, C h w + D), the inverse of `joined`."""
    size = math.prod(shape)
    return states[:, :size].unflatten(1, tuple(shape)), states[:, size:]
