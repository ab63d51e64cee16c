"""Whether torch.compile can work here."""

import os
import shutil

import torch

from stablevm.support.errors import UserError, arg


def check_compiler(device: torch.device) -> None:
    """UserError where torch.compile would find no compiler: of C++ for a CPU's code, of C for what starts a GPU's."""
    language, variable, known = ("C", "CC", ("gcc", "clang")) if device.type == "cuda" else ("C++", "CXX", ("g++",))
    names = (os.environ[variable],) if variable in os.environ else known
    if not any(shutil.which(name) for name in names):
        raise UserError(
            f"{arg('compile')}: no {language} compiler {' or '.join(names)} here; install one, "
            f"name one in {variable}, or leave it out"
        )
