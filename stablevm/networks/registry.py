"""The kinds of networks that there are: their names, their configurations, and what builds them.

Free of torch until one is built, so that a command's help stays quick.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stablevm.networks.lightning_dit_config import MODEL_NAMES as LIGHTNING_DIT_NAMES
from stablevm.networks.lightning_dit_config import LightningDiTConfig, lightning_dit_config
from stablevm.networks.network_config import NetworkConfig
from stablevm.networks.sit_config import MODEL_NAMES as SIT_NAMES
from stablevm.networks.sit_config import SiTConfig, sit_config
from stablevm.support.errors import UserError, arg

if TYPE_CHECKING:
    import torch

    from stablevm.networks.backbone import Backbone

DEFAULT_KIND = SiTConfig.kind  # of checkpoints that don't name theirs: version 0.1 knew SiT alone


@dataclass(frozen=True)
class Network:
    """One kind of network."""

    names: tuple[str, ...]  # of its sizes, as the option `model` has them
    config: type[NetworkConfig]  # whose `kind` checkpoints record
    # From a name, and input_size, in_channels, num_classes and other fields of NetworkConfig, to the configuration.
    configure: Callable[..., NetworkConfig]
    # First values are drawn from the generator, one on the CPU; without one, from a generator seeded 0.
    build: Callable[[Any, "torch.Generator | None"], "Backbone"]


def _sit(config: SiTConfig, generator: "torch.Generator | None") -> "Backbone":
    from stablevm.networks.sit import SiT

    return SiT(config, generator)


def _lightning_dit(config: LightningDiTConfig, generator: "torch.Generator | None") -> "Backbone":
    from stablevm.networks.lightning_dit import LightningDiT

    return LightningDiT(config, generator)


NETWORKS = [
    Network(SIT_NAMES, SiTConfig, sit_config, _sit),
    Network(LIGHTNING_DIT_NAMES, LightningDiTConfig, lightning_dit_config, _lightning_dit),
]


def network_config(name: str, *, input_size: int, in_channels: int, num_classes: int, **options: Any) -> NetworkConfig:
    """The configuration of the network called `name`, for latents (in_channels, input_size, input_size).

    UserError for a name that is not registered, and as the kind's own function raises it.
    """
    for network in NETWORKS:
        if name in network.names:
            return network.configure(
                name, input_size=input_size, in_channels=in_channels, num_classes=num_classes, **options
            )
    raise UserError(f"{arg('model')} {name}: expected one of {', '.join(network_names())}")


def network_names() -> tuple[str, ...]:
    """The names of all sizes of all networks."""
    return tuple(name for network in NETWORKS for name in network.names)


def build_network(config: NetworkConfig, generator: "torch.Generator | None" = None) -> "Backbone":
    """The network of `config` on the default device, with its first values."""
    for network in NETWORKS:
        if network.config is type(config):
            return network.build(config, generator)
    raise UserError(f"a network of the kind {config.kind}: expected one of {', '.join(config_classes())}")


def config_classes() -> dict[str, type[NetworkConfig]]:
    """The configurations by the word that a checkpoint's card holds."""
    return {network.config.kind: network.config for network in NETWORKS}
