"""Reading a foreign `.pt` file: tensors and plain values only, nothing in it is executed."""

import argparse
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from stablevm.networks.snapshot import Weights
from stablevm.support.errors import UserError
from stablevm.support.foreign_weights import UNREADABLE
from stablevm.support.text import shown

# Put before parameters' names by torch's wrappers for several processes and for compilation.
WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class PublishedCheckpoint:
    """What a published file holds, apart from its optimiser."""

    weights: dict[Weights, dict[str, Tensor]]  # under the names in the file, without wrappers' prefixes
    options: dict[str, Any]  # of the command that trained it; empty where not recorded
    steps: int | None  # None where not recorded

    @property
    def any_weights(self) -> dict[str, Tensor]:
        """One of the sets of weights: all are of the same network."""
        return next(iter(self.weights.values()))


def read_published(path: Path) -> PublishedCheckpoint:
    """Read the file, mapped rather than loaded. UserError when it is no checkpoint, is damaged, or holds objects other
    than tensors, plain values and argparse's options.
    """
    content = _load(path)
    sets: dict[Weights, Any] = {name: content[name] for name in get_args(Weights) if name in content}
    if not sets:
        sets = {"ema": content}
    for values in sets.values():
        if not isinstance(values, dict) or not values or not all(isinstance(v, Tensor) for v in values.values()):
            keys = ", ".join(map(str, list(content)[:8]))
            raise UserError(f"{path}: expected named weights, or a dictionary with ema or model; found {keys}")
        for key, value in values.items():
            if fault := _fault(key, value):
                raise UserError(f"{path}: {shown(key)}: {fault}; save plain weights, floating and dense")
    options = content.get("args", {})
    if isinstance(options, argparse.Namespace):
        options = vars(options)
    steps = content.get("steps")
    return PublishedCheckpoint(
        weights={name: {_plain(key): value for key, value in values.items()} for name, values in sets.items()},
        options=options if isinstance(options, dict) else {},
        steps=steps if isinstance(steps, int) else None,
    )


def _fault(key: object, value: Tensor) -> str | None:
    """Why a tensor can't be a weight; None where it can."""
    if not isinstance(key, str):
        return "is a key, expected a name"
    if value.is_meta:
        return "a tensor without values (meta)"
    if value.is_quantized:
        return "a quantised tensor"
    if value.layout != torch.strided:
        return "a sparse tensor"
    if not value.is_floating_point():
        return f"a tensor of {str(value.dtype).removeprefix('torch.')}"
    return None if bool(value.isfinite().all()) else "holds values that are not finite"


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a published checkpoint (.pt)")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: not a torch checkpoint (torch 1.6 or later), or cut short; fetch it again")
    try:
        with safe_globals([argparse.Namespace]):
            refused = get_unsafe_globals_in_checkpoint(path)
            content = None if refused else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UNREADABLE as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path}: not a torch checkpoint, or damaged ({reason}); fetch it again") from None
    if refused:
        raise UserError(
            f"{path}: refused, it asks to load {', '.join(sorted(refused))}, which could run code; save its weights "
            "alone (torch.save of the state_dict) where you trust it"
        )
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected named weights, found {type(content).__name__}")
    return content


def _plain(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name
