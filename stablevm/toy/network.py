"""The small networks of the toy study, from vectors x_t and times to the field."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from stablevm.toy.config import ToyConfig

TIME_FEATURES = 32  # of the published network, half of them sines, half cosines
LOWEST_FREQUENCY = 1 / 1000  # of the sines, relative to the highest, which has one period over t in [0, 1]


class AdaptiveNetwork(nn.Module):
    """The network of the published study: hidden layers whose layer norms are modulated by the time (AdaLN).

    Sines and cosines of the time enter beside x, and modulate each of the `depth` blocks: layer norm, scale and shift,
    linear, GELU, dropout. With 10 dimensions, width 32 and depth 4 it has 14,634 parameters.
    """

    def __init__(self, dimension: int, width: int, depth: int, dropout: float, generator: torch.Generator) -> None:
        """dropout: the share in [0, 1) of hidden values that training sets to 0; generator: draws the initial weights.

        Linear layers are initialised uniformly within +-fan_in**-0.5, PyTorch's default, and the modulations with zero.
        """
        super().__init__()
        self.dropout = dropout
        self.enter = _linear(dimension + TIME_FEATURES, width, generator)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.modulations = nn.ModuleList(_zero_linear(TIME_FEATURES, 2 * width) for _ in range(depth))
        self.layers = nn.ModuleList(_linear(width, width, generator) for _ in range(depth))
        self.leave = _linear(width, dimension, generator)

    def forward(self, x: Tensor, t: Tensor, dropped: torch.Generator | None = None) -> Tensor:
        """x (B, d), t (B,) in [0, 1] to (B, d). Hidden values are dropped only where `dropped` says which."""
        features = time_features(t)
        h = self.enter(torch.cat([x, features], dim=1))
        factors = _dropout_factors((len(self.layers), *h.shape), self.dropout, dropped)
        for norm, modulation, layer, factor in zip(self.norms, self.modulations, self.layers, factors, strict=True):
            scale, shift = modulation(features).chunk(2, dim=1)
            h = _drop(nn.functional.gelu(layer(torch.addcmul(shift, norm(h), 1 + scale))), factor)
        return self.leave(h)


class Perceptron(nn.Module):
    """A perceptron with `depth` hidden layers of `width` and SiLU, from (x, t) to a vector like x."""

    def __init__(self, dimension: int, width: int, depth: int, dropout: float, generator: torch.Generator) -> None:
        """The arguments are those of `AdaptiveNetwork`; initial weights are uniform within +-fan_in**-0.5, biases 0."""
        super().__init__()
        self.width, self.dropout = width, dropout
        sizes = [dimension + 1] + [width] * depth + [dimension]
        self.layers = nn.ModuleList(_linear(*ends, generator, zero_bias=True) for ends in pairwise(sizes))

    def forward(self, x: Tensor, t: Tensor, dropped: torch.Generator | None = None) -> Tensor:
        """x (B, d), t (B,) in [0, 1] to (B, d). Hidden values are dropped only where `dropped` says which."""
        *hidden, last = self.layers
        h = torch.cat([x, t[:, None]], dim=1)
        factors = _dropout_factors((len(hidden), len(x), self.width), self.dropout, dropped)
        for layer, factor in zip(hidden, factors, strict=True):
            h = _drop(nn.functional.silu(layer(h)), factor)
        return last(h)


ToyNetwork = AdaptiveNetwork | Perceptron
NETWORKS: dict[str, type[AdaptiveNetwork] | type[Perceptron]] = {"adaptive": AdaptiveNetwork, "perceptron": Perceptron}


def make_network(config: ToyConfig, generator: torch.Generator) -> ToyNetwork:
    """The network that the options describe, with initial weights from `generator`."""
    return NETWORKS[config.network](config.dimension, config.width, config.depth, config.dropout, generator)


def time_features(t: Tensor) -> Tensor:
    """The features (B, TIME_FEATURES) of times (B,): sines, then cosines, of 2 pi t f for decreasing frequencies f."""
    half = TIME_FEATURES // 2
    frequencies = torch.exp(math.log(LOWEST_FREQUENCY) / half * torch.arange(half, device=t.device))
    angles = 2 * math.pi * t[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _dropout_factors(
    shape: tuple[int, ...], rate: float, generator: torch.Generator | None
) -> Tensor | tuple[None, ...]:
    """Factors of the hidden values of each layer, `shape` (layers, B, width), for inverted dropout: 0 with probability
    `rate`, else 1 / (1 - rate). None for each layer where nothing is dropped.

    They come from a given generator, as PyTorch's dropout draws from the global one; and all at once, as one operation
    takes less time than several.
    """
    if generator is None or rate == 0:
        return (None,) * shape[0]
    return torch.empty(shape).bernoulli_(1 - rate, generator=generator).div_(1 - rate)


def _drop(h: Tensor, factor: Tensor | None) -> Tensor:
    return h if factor is None else h * factor


def _linear(fan_in: int, fan_out: int, generator: torch.Generator, zero_bias: bool = False) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, fan_in, fan_out)
    bound = fan_in**-0.5
    nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
    if zero_bias:
        nn.init.zeros_(layer.bias)
    else:
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    return layer


def _zero_linear(fan_in: int, fan_out: int) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, fan_in, fan_out)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
