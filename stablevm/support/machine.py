"""The machine that is measured: its description, and its best rate for matrix products."""

import os
import platform
import time
from pathlib import Path
from statistics import median

import torch

from stablevm.support.precision import DTYPES

CPU = torch.device("cpu")
PRODUCT_SIDE = {"cuda": 8192, "cpu": 2048}  # of square matrices, large enough for the full rate
PRODUCT_REPEATS = {"cuda": 300, "cpu": 5}  # about half a second


def describe_machine(device: torch.device = CPU, processes: int = 1) -> str:
    """One line with the hardware, threads, versions, and the load of the machine."""
    if device.type == "cuda":
        hardware = f"{processes} x {torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        hardware = f"{_processor()}, {processes} x {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{hardware}, {versions}, load {os.getloadavg()[0]:.1f}"


def _processor() -> str:
    """The name of the processor, as Linux reports it."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.processor() or platform.machine()


def product_rate(device: torch.device, mixed_precision: str) -> float:
    """Operations per second (a multiplication and an addition are two) of large matrix products.

    mixed_precision: their precision, by accelerate's name. It is the median of many products, after as many to warm up,
    because a GPU slows down under load.
    """
    side, dtype = PRODUCT_SIDE[device.type], DTYPES[mixed_precision]
    generator = torch.Generator(device).manual_seed(0)
    left, right = torch.randn(2, side, side, generator=generator, device=device).to(dtype)
    times = [_seconds(left, right) for _ in range(2 * PRODUCT_REPEATS[device.type])]
    return 2 * side**3 / median(times[len(times) // 2 :])


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    synchronize(left.device)
    started = time.perf_counter()
    left @ right
    synchronize(left.device)
    return time.perf_counter() - started


def gigabytes(count: int) -> str:
    """Bytes in the unit that people count memory in."""
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
