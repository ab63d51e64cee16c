"""Your own network, trained and sampled by the ordinary commands: a class, a configuration and a line.

    stablevm prepare digits digits
    python examples/own_network.py train --exp-name mixer --data-dir digits --model Mixer-S --max-train-steps 3000
    python examples/own_network.py generate --ckpt exps/mixer/checkpoints/0003000 --grid

Once registered, it works with resuming, evaluation and alignment too. See docs/extending.md.
"""

import sys
from dataclasses import dataclass

import torch
from torch import nn

from stablevm import cli
from stablevm.networks.backbone import Backbone
from stablevm.networks.initialisation import materialize, xavier_uniform
from stablevm.networks.network_config import NetworkConfig
from stablevm.networks.projectors import build_projector
from stablevm.networks.registry import NETWORKS, Network
from stablevm.support.errors import UserError


@dataclass(frozen=True, kw_only=True)
class MixerConfig(NetworkConfig):
    kind, label_table = "mixer", "labels.weight"  # the word in checkpoints; the weight with a row for each class
    width: int

    @property
    def grid_size(self):  # a token for each patch of 2 x 2
        return self.input_size // 2


class Mixer(Backbone):
    """Alternating convolutions over positions and over channels, with residual connections."""

    def __init__(self, config, generator=None):
        super().__init__()
        self.config, width = config, config.width
        sizes = {"hidden_size": width, "projector_hidden": config.projector_hidden, "grid_size": config.grid_size}
        with torch.device("meta"):  # memory and first values come below, from a generator
            self.labels, self.time = nn.Embedding(config.num_classes + 1, width), nn.Linear(1, width)
            self.first = nn.Conv2d(config.in_channels, width, 2, stride=2)
            self.last = nn.ConvTranspose2d(width, config.in_channels, 2, stride=2)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 1))
                for _ in range(config.depth)
            )
            self.projectors = nn.ModuleList(
                build_projector(config.projector_kind, feature_dim=dim, **sizes) for dim in config.projector_dims
            )
        materialize(self)
        xavier_uniform(self, generator or torch.Generator().manual_seed(0))

    def forward(self, x, t, y, *, features=False):
        hidden = self.first(x) + (self.labels(y) + self.time(t[:, None].to(x)))[..., None, None]
        projected = []
        for number, block in enumerate(self.blocks, start=1):
            hidden = hidden + block(hidden)
            if features and number == self.config.encoder_depth:
                projected = [projector(hidden.flatten(2).mT) for projector in self.projectors]
        return (self.last(hidden), projected) if features else self.last(hidden)

    def compile_blocks(self):
        for block in self.blocks:
            block.compile()


def configure(name, **options):
    if options.get("qk_norm"):
        raise UserError(f"{name} has no queries and keys to normalise")
    return MixerConfig(name=name, depth=4, width=64, **options)


NETWORKS.append(Network(("Mixer-S",), MixerConfig, configure, Mixer))

if __name__ == "__main__":
    sys.exit(cli.main())
