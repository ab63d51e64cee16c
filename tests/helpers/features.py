"""Features of many images, as the tests of metrics need them."""

import torch
from torch import Tensor


def normal(rows: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    """Correlated features with unequal variances."""
    stream = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=stream) / width**0.5
    return torch.randn(rows, width, generator=stream) @ mix + shift
