"""Random numbers whose seeds belong to samples, never to processes.

A sample is identified by a key such as (global seed, purpose, step, global position). Its generator depends only on the
key, so it gets the same numbers with one process or four, batch size 8 or 64, before or after a resume. Generators run
on the CPU and so give the same numbers for every device.
"""

import hashlib
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed for `key`, the same on every machine and in every Python version."""
    text = "/".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A new CPU generator seeded by `key`."""
    return torch.Generator().manual_seed(derive_seed(*key))


class RowGenerators:
    """One generator for each row of a batch; the functions below accept it in place of a `torch.Generator`."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = list(generators)

    def __repr__(self) -> str:
        return f"RowGenerators({len(self.generators)} rows)"

    @classmethod
    def for_keys(cls, *prefix: int | str, positions: Sequence[int]) -> "RowGenerators":
        """Give row i the generator with the key (*prefix, positions[i])."""
        return cls([generator(*prefix, int(position)) for position in positions])


AnyGenerator = torch.Generator | RowGenerators


def randn(shape: Sequence[int], generator: AnyGenerator, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal values of `shape` (B, ...), float32."""
    return _fill(Tensor.normal_, shape, generator, device)


def rand(shape: Sequence[int], generator: AnyGenerator, device: torch.device | str = "cpu") -> Tensor:
    """Uniform values in [0, 1) of `shape` (B, ...), float32."""
    return _fill(Tensor.uniform_, shape, generator, device)


def _fill(
    fill: Callable[..., Tensor], shape: Sequence[int], generator: AnyGenerator, device: torch.device | str
) -> Tensor:
    pinned = torch.device(device).type == "cuda"
    if isinstance(generator, torch.Generator):
        pinned = pinned and generator.device.type == "cpu"
        values = torch.empty(tuple(shape), dtype=torch.float32, device=generator.device, pin_memory=pinned)
        return to_device(fill(values, generator=generator), device)
    if shape[0] != len(generator.generators):
        raise ValueError(f"{shape[0]} rows requested from {len(generator.generators)} row generators")
    values = torch.empty(tuple(shape), dtype=torch.float32, pin_memory=pinned)
    for row, row_generator in zip(values, generator.generators, strict=True):
        fill(row, generator=row_generator)
    return to_device(values, device)


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """Copy values to a device; the host does not wait for a copy to a GPU, but does wait for one from it.

    The copy to a GPU uses page-locked memory. From other memory the driver may wait until the GPU's queue is empty.
    """
    from_host = values.device.type == "cpu"
    if from_host and torch.device(device).type == "cuda" and not values.is_pinned():
        values = values.pin_memory()
    return values.to(device, non_blocking=from_host)


def warn_if_drawn_alike(generator: AnyGenerator) -> None:
    """Warn if another process of this torch.distributed run is about to draw the same random numbers.

    Each process puts a hash of its generator's state into the run's store, and checks whether it is already there. No
    process waits for another, so it is harmless if not all of them draw.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    if dist.get_backend() == dist.Backend.MPI:  # MPI has no store
        return
    first = generator if isinstance(generator, torch.Generator) else generator.generators[0]
    name = hashlib.blake2b(first.get_state().numpy().tobytes(), digest_size=16).hexdigest()
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    other = int(store.compare_set(f"stablevm/generator/{name}", "", str(rank)))
    if other != rank:
        warnings.warn(
            f"process {rank} draws the same times and noise as process {other}: seed its generator by rank, such as "
            "torch.Generator().manual_seed(rank)",
            stacklevel=5,
        )
