"""Reading untrusted files of weights: safetensors, or torch files that hold only tensors. No code in them runs."""

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from stablevm.support.errors import UserError
from stablevm.support.text import meant

# Exceptions that the readers of safetensors and torch files raise for damaged files. A damaged pickle can raise nearly
# anything.
UNREADABLE = (
    *(SafetensorError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile, EOFError, LookupError, RuntimeError),
    *(ValueError, TypeError, AttributeError, AssertionError),
)


def read_weights(path: Path, option: str) -> dict[str, Any]:
    """Read the tensors of a file by name, on the CPU; torch files may also hold dictionaries of tensors.

    option: the argument that gave the file, for error messages. UserError if the file is missing or of another kind.
    """
    if not path.is_file():
        raise UserError(f"{option} {path}: no such file{meant(path)}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE:
        raise UserError(f"{option} {path}: not safetensors nor a torch file of only tensors; convert it") from None
    if not isinstance(content, dict):
        raise UserError(f"{option} {path}: expected named tensors, found {type(content).__name__}")
    return content
