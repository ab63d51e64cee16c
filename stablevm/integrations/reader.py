"""Reading an untrusted file, `.pt` or safetensors: only tensors and plain values are loaded; no code in it runs."""

import argparse
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from stablevm.networks.snapshot import Weights
from stablevm.support.errors import UserError
from stablevm.support.foreign_weights import UNREADABLE, read_weights
from stablevm.support.text import meant, shown

SAFE = ".safetensors"
ENDINGS = (".pt", ".pth", ".ckpt", SAFE)  # of such files
COUNTERS = "num_batches_tracked"  # integers of batch normalisations, which are not weights
LATENT_OPTIONS = ("latent_norm", "latent_multiplier")  # of LightningDiT's data: (z - mean) / std * multiplier
# Prefixes that torch's wrappers for several processes and for compilation add to the names of parameters.
WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class PublishedCheckpoint:
    """The contents of a published file, except its optimiser."""

    weights: dict[Weights, dict[str, Tensor]]  # with the names in the file, without wrappers' prefixes
    options: dict[str, Any]  # of the command that trained it; empty if not recorded
    steps: int | None  # None if not recorded

    @property
    def any_weights(self) -> dict[str, Tensor]:
        """One of the sets of weights, which are all of the same network."""
        return next(iter(self.weights.values()))


def read_published(path: Path) -> PublishedCheckpoint:
    """Read a published file, mapped into memory.

    UserError if it is not a checkpoint, is damaged, or holds other objects than tensors, plain values and argparse's
    options.
    """
    content = _load(path)
    sets: dict[Weights, Any] = {name: content[name] for name in get_args(Weights) if name in content}
    if not sets:
        sets = {"ema": content}
    for values in sets.values():
        if not isinstance(values, dict) or not values or not all(isinstance(v, Tensor) for v in values.values()):
            keys = ", ".join(map(str, list(content)[:8]))
            raise UserError(f"{path}: expected named weights, or a dictionary with ema or model; found {keys}")
        for key, value in _without_counters(values).items():
            if fault := _fault(key, value):
                raise UserError(f"{path}: {shown(key)}: {fault}; save plain weights, floating and dense")
    steps = content.get("steps")
    return PublishedCheckpoint(
        weights={
            name: {_plain(key): value for key, value in _without_counters(values).items()}
            for name, values in sets.items()
        },
        options=_options(content),
        steps=steps if isinstance(steps, int) else None,
    )


def _options(content: dict[str, Any]) -> dict[str, Any]:
    """The training options: `args` of StableVelocity and REPA, or `config` of LightningDiT with the same names."""
    options = content.get("args", {})
    if isinstance(options, argparse.Namespace):
        options = vars(options)
    config = content.get("config")
    if not options and isinstance(config, dict):
        known = {"transport": ("path_type", "prediction"), "data": ("num_classes", *LATENT_OPTIONS)}
        parts = {part: config[part] for part in known if isinstance(config.get(part), dict)}
        options = {name: values[name] for part, values in parts.items() for name in known[part] if name in values}
        _check_latent_options(options)
    return options if isinstance(options, dict) else {}


def _check_latent_options(options: dict[str, Any]) -> None:
    norm, multiplier = options.get("latent_norm", True), options.get("latent_multiplier", 1.0)
    if not isinstance(norm, bool) or not isinstance(multiplier, int | float) or not 0 < multiplier < math.inf:
        raise UserError(
            f"the checkpoint records latent_norm {shown(norm)} and latent_multiplier {shown(multiplier)}, expected "
            "true or false, and a positive number; give its weights alone"
        )


def _without_counters(values: dict[Any, Tensor]) -> dict[Any, Tensor]:
    return {key: value for key, value in values.items() if not (isinstance(key, str) and key.endswith(COUNTERS))}


def _fault(key: object, value: Tensor) -> str | None:
    """The reason why a tensor can't be a weight; None if it can."""
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
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give a published checkpoint, a file (.pt or .safetensors)")
    if not path.is_file():
        raise UserError(f"{path}: no such file{meant(path)}; give a published checkpoint (.pt or .safetensors)")
    if path.suffix == SAFE:
        return read_weights(path, "checkpoint")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: not a torch checkpoint (torch 1.6 or later), or truncated; download it again")
    try:
        with safe_globals([argparse.Namespace]):
            refused = get_unsafe_globals_in_checkpoint(path)
            content = None if refused else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UNREADABLE as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path}: not a torch checkpoint, or damaged ({reason}); download it again") from None
    if refused:
        raise UserError(
            f"{path}: refused, because it would load {', '.join(sorted(refused))}, which could run code; if you trust "
            "it, save only its weights (torch.save of the state_dict)"
        )
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected named weights, found {type(content).__name__}")
    return content


def _plain(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name
