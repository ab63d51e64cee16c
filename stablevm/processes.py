"""Which of several processes this one is, where they share files and nothing else."""

import os
from dataclasses import dataclass

import torch

from stablevm.errors import UserError


@dataclass(frozen=True)
class Process:
    """This process among those that torchrun started: no collective is needed, so no process group either."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def from_environment(cls) -> "Process":
        """RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them; a single process without them."""
        rank, world_size, local_rank = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        if not torch.cuda.is_available():
            return cls(rank, world_size, torch.device("cpu"))
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this machine (LOCAL_RANK): there are {torch.cuda.device_count()} GPUs; "
                "give torchrun at most that many as --nproc_per_node"
            )
        return cls(rank, world_size, torch.device("cuda", local_rank))

    @property
    def is_first(self) -> bool:
        return self.rank == 0
