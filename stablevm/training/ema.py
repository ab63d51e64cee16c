"""The exponential moving average of the weights, with the published warm-up."""

import copy

import torch
from torch import Tensor, nn

from stablevm.training.state import local


class MovingAverage:
    """A float32 copy of `model` that follows it: `average += (1 - d) (model - average)` after each step."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """decay: in [0, 1); after n updates `min(decay, (1 + n) / (10 + n))` is used."""
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int, taken: Tensor | None = None) -> None:
        """Follow `model` after `updates` earlier updates; where `taken`, () bool on its device, is false, stay."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        average = [local(parameter.data) for parameter in self.model.parameters()]
        current = [local(parameter.data) for parameter in model.parameters()]
        if taken is None:
            torch._foreach_lerp_(average, current, 1 - decay)
        else:  # a weight on the device, which nothing waits for
            torch._foreach_lerp_(average, current, [(1 - decay) * taken] * len(current))
