"""Which of several processes this one is, where they share files and nothing else."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stablevm.support.errors import UserError
from stablevm.support.launcher import Place

POLL_SECONDS = 0.2  # between two looks for files of other processes


@dataclass(frozen=True)
class Process:
    """This process among those that torchrun started: no collective is needed, so no process group either."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def from_environment(cls) -> "Process":
        """As `Place.from_environment`; UserError also where this machine has not as many GPUs as processes."""
        place = Place.from_environment()
        rank, world_size, local_rank = place.rank, place.world_size, place.local_rank
        if not torch.cuda.is_available():
            return cls(rank, world_size, torch.device("cpu"))
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this machine (LOCAL_RANK): there are {torch.cuda.device_count()} GPUs; "
                "start at most that many processes on it"
            )
        return cls(rank, world_size, torch.device("cuda", local_rank))

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def wait_for_files(paths: Sequence[Path], tell: Callable[[int], object]) -> None:
    """Until other processes have made these files; `tell` is called once, with how many are missing, if any are."""
    told = False
    while missing := sum(not path.exists() for path in paths):
        if not told:
            tell(missing)
            told = True
        time.sleep(POLL_SECONDS)
