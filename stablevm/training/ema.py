"""The exponential moving average of the weights, with the warm-up of the published training or without."""

import copy

import torch
from torch import Tensor, nn

from stablevm.training.state import local


class MovingAverage:
    """A float32 copy of `model` that follows it: `average += (1 - d) (model - average)` after each step."""

    def __init__(self, model: nn.Module, decay: float, *, warm_up: bool = True) -> None:
        """decay: in [0, 1); with `warm_up`, `min(decay, (1 + n) / (10 + n))` is used after n updates."""
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.warm_up = decay, warm_up

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int, taken: Tensor | None = None) -> None:
        """Follow `model` after `updates` earlier updates; where `taken`, () bool on its device, is false, stay."""
        decay = min(self.decay, (1 + updates) / (10 + updates)) if self.warm_up else self.decay
        average = [local(parameter.data) for parameter in self.model.parameters()]
        current = [local(parameter.data) for parameter in model.parameters()]
        if taken is None:
            torch._foreach_lerp_(average, current, 1 - decay)
        else:  # a weight on the device, which nothing waits for
            torch._foreach_lerp_(average, current, [(1 - decay) * taken] * len(current))
