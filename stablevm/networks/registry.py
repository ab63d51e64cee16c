"""The registry of networks: the names, the configuration and the constructor of each kind.

It imports torch only when a network is built, so that the help of commands is fast.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stablevm.networks.jit_config import MODEL_NAMES as JIT_NAMES
from stablevm.networks.jit_config import JiTConfig, jit_config
from stablevm.networks.lightning_dit_config import MODEL_NAMES as LIGHTNING_DIT_NAMES
from stablevm.networks.lightning_dit_config import LightningDiTConfig, lightning_dit_config
from stablevm.networks.network_config import NetworkConfig
from stablevm.networks.sit_config import MODEL_NAMES as SIT_NAMES
from stablevm.networks.sit_config import SiTConfig, sit_config
from stablevm.support.errors import UserError, arg
from stablevm.support.text import one_of

if TYPE_CHECKING:
    import torch

    from stablevm.networks.backbone import Backbone

DEFAULT_KIND = SiTConfig.kind  # of checkpoints without a kind: version 0.1 had only SiT


@dataclass(frozen=True)
class Network:
    """A kind of network."""

    names: tuple[str, ...]  # of its sizes, as the argument `model` takes them
    config: type[NetworkConfig]  # its `kind` is recorded in checkpoints
    # Makes the configuration from a name, input_size, in_channels, num_classes and other fields of NetworkConfig.
    configure: Callable[..., NetworkConfig]
    # Builds the network; its parameters are drawn from a CPU generator, or if None, from one seeded 0.
    build: Callable[[Any, "torch.Generator | None"], "Backbone"]


def _sit(config: SiTConfig, generator: "torch.Generator | None") -> "Backbone":
    from stablevm.networks.sit import SiT

    return SiT(config, generator)


def _lightning_dit(config: LightningDiTConfig, generator: "torch.Generator | None") -> "Backbone":
    from stablevm.networks.lightning_dit import LightningDiT

    return LightningDiT(config, generator)


def _jit(config: JiTConfig, generator: "torch.Generator | None") -> "Backbone":
    from stablevm.networks.jit import JiT

    return JiT(config, generator)


NETWORKS = [
    Network(SIT_NAMES, SiTConfig, sit_config, _sit),
    Network(LIGHTNING_DIT_NAMES, LightningDiTConfig, lightning_dit_config, _lightning_dit),
    Network(JIT_NAMES, JiTConfig, jit_config, _jit),
]


def network_config(name: str, *, input_size: int, in_channels: int, num_classes: int, **options: Any) -> NetworkConfig:
    """The configuration of the network called `name`, such as "SiT-XL/2".

    Its latents have the shape (in_channels, input_size, input_size). options: other fields of the configuration.
    UserError for a name that is not registered, or values that the network does not support.
    """
    for network in NETWORKS:
        if name in network.names:
            return network.configure(
                name, input_size=input_size, in_channels=in_channels, num_classes=num_classes, **options
            )
    raise UserError(f"{arg('model')} {name}: expected {one_of(name, network_names())}")


def network_names() -> tuple[str, ...]:
    """The names of all sizes of all networks."""
    return tuple(name for network in NETWORKS for name in network.names)


def build_network(config: NetworkConfig, generator: "torch.Generator | None" = None) -> "Backbone":
    """Build the network of `config` on the default device, with initial values drawn from a CPU generator.

    Without a generator, they are drawn from one seeded 0.
    """
    for network in NETWORKS:
        if network.config is type(config):
            return network.build(config, generator)
    raise UserError(f"network of kind {config.kind}: expected one of {', '.join(config_classes())}")


def empty_network(config: NetworkConfig) -> "Backbone":
    """Build the network of `config` without values, on torch's "meta" device, for those that replace them or none."""
    import timm  # noqa: F401  networks need it, and torch 2.7 can't import torchvision, as timm does, in the context below
    import torch

    with torch.device("meta"):
        return build_network(config)


def config_classes() -> dict[str, type[NetworkConfig]]:
    """The classes of configurations, by the kind that a checkpoint's card holds."""
    return {network.config.kind: network.config for network in NETWORKS}
