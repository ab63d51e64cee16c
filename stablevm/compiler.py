"""Whether torch.compile can work here."""

import os
import shutil

import torch

from stablevm.errors import UserError


def check_compiler(device: torch.device) -> None:
    """UserError where torch.compile would find no C++ compiler, which it needs for code of a CPU."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(f"--compile: no C++ compiler {compiler} here; install one, name one in CXX, or leave it out")
