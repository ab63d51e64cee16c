"""Tensors of a network and its optimiser, whole, where they lie on one device, on each (DDP) or in shards (FSDP)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

_WHOLE = StateDictOptions(full_state_dict=True)
_ON_MAIN = StateDictOptions(full_state_dict=True, cpu_offload=True)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Weights by their plain names, on the host of the main process. All processes take part; the others get none."""
    tensors: dict[str, Any] = get_model_state_dict(model, options=_ON_MAIN)
    return tensors


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Take over whole weights; every process gives all of them and keeps its part."""
    set_model_state_dict(model, dict(tensors), options=_WHOLE)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state as "NAME.exp_avg" and the like, as `model_tensors` gives the weights."""
    found: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_ON_MAIN)
    return {f"{name}.{key}": value for name, state in found.get("state", {}).items() for key, value in state.items()}


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; settings such as the rate stay this run's."""
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parameter, key = name.rsplit(".", 1)
        states.setdefault(parameter, {})[key] = value
    (group,) = optimizer.param_groups
    settings = {key: value for key, value in group.items() if key != "params"}
    state: dict[str, Any] = {"state": states, "param_groups": [{**settings, "params": list(states)}]}
    set_optimizer_state_dict(model, optimizer, state, options=_WHOLE)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
