"""Weights in files that others wrote: safetensors, or torch files of tensors alone. Nothing in them is executed."""

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from stablevm.support.errors import UserError

# What the readers of safetensors and of torch files raise for bytes that they can't make sense of: a pickle of which a
# byte is wrong asks for whatever the wrong byte says.
UNREADABLE = (
    *(SafetensorError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile, EOFError, LookupError, RuntimeError),
    *(ValueError, TypeError, AttributeError, AssertionError),
)


def read_weights(path: Path, option: str) -> dict[str, Any]:
    """The named tensors, on the CPU, of the file that was given as `option`; torch files may hold dictionaries of them.

    UserError where there is no file, or none of that kind.
    """
    if not path.is_file():
        raise UserError(f"{option} {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE:
        raise UserError(f"{option} {path}: neither safetensors nor a torch file of tensors alone; convert it") from None
    if not isinstance(content, dict):
        raise UserError(f"{option} {path}: expected named tensors, found {type(content).__name__}")
    return content
