"""Initial values of parameters, drawn from a CPU generator, so that they are the same on every device.

The global random state is neither used nor changed. Parameters on the meta device are skipped. Results of functions in
`nn.init` are not used: diffusers replaces them by functions without a result before it loads weights.
"""

import torch
from torch import Tensor, nn


@torch.no_grad()
def materialize(network: nn.Module) -> None:
    """Move a network from the meta device to the default device; normalisations become identities, all else zero."""
    network.to_empty(device=torch.empty(0).device)  # up to torch 2.7 get_default_device knows no `with torch.device()`
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.zero_()
    for module in network.modules():
        if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.BatchNorm2d):
            module.reset_parameters()


def xavier_uniform(network: nn.Module, generator: torch.Generator) -> None:
    """Draw the weights of all linear layers and convolutions of `network` from Xavier's uniform distribution.

    A weight (out, in, ...) is treated as a matrix (out, rest), as in DiT's patch embedding. Biases are not changed.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.is_meta:
            matrix = _on_cpu(module.weight).flatten(1)
            nn.init.xavier_uniform_(matrix, generator=generator)
            _copy(matrix, module.weight)


def normal(weight: Tensor, std: float, generator: torch.Generator) -> None:
    """Draw `weight` from N(0, std^2)."""
    if not weight.is_meta:
        values = _on_cpu(weight)
        nn.init.normal_(values, std=std, generator=generator)
        _copy(values, weight)


def _on_cpu(weight: Tensor) -> Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device="cpu")


@torch.no_grad()
def _copy(values: Tensor, weight: Tensor) -> None:
    weight.copy_(values.view(weight.shape))
