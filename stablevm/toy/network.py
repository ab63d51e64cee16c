"""The small network of the toy study: a multilayer perceptron on (x, t)."""

from itertools import pairwise

import torch
from torch import Tensor, nn


class Perceptron(nn.Module):
    """`depth` hidden layers of `width` with SiLU; input (x, t), output a vector like x."""

    def __init__(self, dimension: int, width: int, depth: int, stream: torch.Generator) -> None:
        """stream: where the first weights come from (Kaiming-uniform over the fan-in, zero biases)."""
        super().__init__()
        sizes = [dimension + 1] + [width] * depth + [dimension]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            layer = nn.utils.skip_init(nn.Linear, fan_in, fan_out)
            bound = fan_in**-0.5
            nn.init.uniform_(layer.weight, -bound, bound, generator=stream)
            nn.init.zeros_(layer.bias)
            layers += [layer, nn.SiLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x (B, d), t (B,) in [0, 1] to (B, d)."""
        return self.layers(torch.cat([x, t[:, None]], dim=1))
