"""The machine that is measured: what it is, and how fast it multiplies at best."""

import os
import platform
import time

import torch

from stablevm import rng
from stablevm.precision import DTYPES

PRODUCT_SIDE = {"cuda": 8192, "cpu": 2048}  # of square matrices, large enough for the full rate
PRODUCT_REPEATS = 10


def describe_machine(device: torch.device, processes: int = 1) -> str:
    """One line: hardware, processes, threads and versions."""
    if device.type == "cuda":
        hardware = f"{processes} x {torch.cuda.get_device_name(device)}"
    else:
        hardware = f"{processes} x {torch.get_num_threads()} threads of {os.cpu_count()} cores ({platform.machine()})"
    return f"{hardware}, torch {torch.__version__}, Python {platform.python_version()}"


def product_rate(device: torch.device, mixed_precision: str) -> float:
    """Operations per second (a multiplication and an addition are two) of large matrix products: the best of
    `PRODUCT_REPEATS`, in the precision that accelerate calls `mixed_precision`.
    """
    side, dtype = PRODUCT_SIDE[device.type], DTYPES[mixed_precision]
    left, right = torch.randn(2, side, side, generator=rng.generator("product")).to(device, dtype)
    best = min(_seconds(left, right) for _ in range(1 + PRODUCT_REPEATS))
    return 2 * side**3 / best


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    synchronize(left.device)
    started = time.perf_counter()
    left @ right
    synchronize(left.device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
