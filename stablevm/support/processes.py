"""Processes that share files but do not communicate otherwise."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stablevm.support.errors import UserError
from stablevm.support.launcher import Place

POLL_SECONDS = 0.2  # between two checks for files of other processes


@dataclass(frozen=True)
class Process:
    """This process among those that torchrun started, without a process group, as no collectives are needed."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def from_environment(cls) -> "Process":
        """Like `Place.from_environment`; UserError also if this machine has fewer GPUs than processes."""
        place = Place.from_environment()
        rank, world_size, local_rank = place.rank, place.world_size, place.local_rank
        if not torch.cuda.is_available():
            return cls(rank, world_size, torch.device("cpu"))
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK={local_rank}: this machine has {torch.cuda.device_count()} GPUs; "
                "start at most that many processes on it"
            )
        return cls(rank, world_size, torch.device("cuda", local_rank))

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def wait_for_files(paths: Sequence[Path], report: Callable[[int], object]) -> None:
    """Wait until other processes have made these files; if any are missing, call `report` once with their number."""
    reported = False
    while missing := sum(not path.exists() for path in paths):
        if not reported:
            report(missing)
            reported = True
        time.sleep(POLL_SECONDS)
