"""The check that torch.compile finds a compiler."""

import os
import shutil

import torch

from stablevm.support.errors import UserError, arg


def check_compiler(device: torch.device) -> None:
    """Raise UserError if torch.compile would find no compiler: it needs C++ for a CPU, and C to launch GPU kernels."""
    language, variable, known = ("C", "CC", ("gcc", "clang")) if device.type == "cuda" else ("C++", "CXX", ("g++",))
    names = (os.environ[variable],) if variable in os.environ else known
    if not any(shutil.which(name) for name in names):
        raise UserError(
            f"{arg('compile')}: found no {language} compiler ({' or '.join(names)}); install one, "
            f"set {variable} to one, or leave {arg('compile')} out"
        )
