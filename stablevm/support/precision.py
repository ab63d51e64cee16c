"""The precision of float32 products: full where the mathematics needs it, TF32 where the user allows it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

# By the values of options; "no" is accelerate's name for float32.
DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def _switches() -> list[Any]:
    """The torch backends whose `fp32_precision` decides how float32 matrices are multiplied."""
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    return [backend for backend in backends if hasattr(backend, "fp32_precision")]


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Turn autocast off inside the block, so that operations run in the precision of their inputs."""
    if not torch.amp.is_autocast_available(device.type):  # such as "meta": there is nothing to turn off
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Turn autocast, TF32 and reduced-precision float32 products off inside the block, and restore them afterwards.

    The switches for products are global to the process, so other threads that multiply are affected too.
    """
    switches, common = _switches(), _common_precision()
    before = [switch.fp32_precision for switch in switches]
    with without_autocast(device):
        try:
            if common is not None:
                torch.set_float32_matmul_precision("highest")
            for switch in switches:
                switch.fp32_precision = "ieee"
            yield
        finally:
            if common is not None:
                torch.set_float32_matmul_precision(common)
            for switch, value in zip(switches, before, strict=True):
                switch.fp32_precision = value


def _common_precision() -> str | None:
    """The value of torch's older switch for all products, which must agree with the newer ones when it is read.

    None if it can't be read, because the newer ones have been set to different values.
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to `dtype` inside the block, whatever the outer setting; for float32, turn autocast off."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in float32 products and convolutions; PyTorch's default allows it in convolutions."""
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = allowed
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value
