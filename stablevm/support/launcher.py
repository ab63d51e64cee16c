"""What the launcher of several processes, such as torchrun, tells each of them; and one voice for all of them.

Importing it does not import torch.
"""

import hashlib
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from stablevm.support.errors import UserError
from stablevm.support.text import printable

CONNECTION_PATIENCE = timedelta(seconds=30)
SPEAKER_PATIENCE = timedelta(minutes=2)  # for the process that speaks for all; only one that was killed needs it


@dataclass(frozen=True)
class Place:
    """Which of all processes this one is, and which of those on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> "Place":
        """RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them; alone without them. UserError for others."""
        rank, world_size, local_rank = (_number(name, least) for name, least in _PLACE)
        if rank >= world_size:
            raise UserError(
                f"RANK={rank}: expected less than WORLD_SIZE={world_size}, as launchers such as torchrun set them; "
                "set both, or neither"
            )
        return cls(rank, world_size, local_rank)


_PLACE = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))  # with the least value, which is that of a single process


def _number(name: str, least: int) -> int:
    text = os.environ.get(name, str(least))
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= least):
        raise UserError(
            f"{name}={text[:40]}: expected a number from {least}, as launchers such as torchrun set it; "
            "unset it to run alone"
        )
    return int(text)


def is_alone() -> bool:
    """Whether this is the only process; UserError as `Place.from_environment`."""
    return Place.from_environment().world_size == 1


def tell(line: str, *, kept: str = "") -> None:
    """Print the last line of a command on stderr: once for all processes that end with the same one.

    The first that comes to say it speaks, and the others wait until it has, because the end of one process makes the
    launcher end them all. They agree through the launcher's own store, so it does not matter how fast any of them is,
    and nothing is left behind. Processes that were started one by one have no store: each speaks for itself.
    kept: as for `text.printable`.
    """
    try:
        place = Place.from_environment()
    except UserError:  # the line may be about just that
        place = Place()
    store = _launchers_store() if place.world_size > 1 else None
    told = ""
    if store is not None:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        told = f"stablevm/told/{attempt}/{hashlib.sha256(line.encode(errors='replace')).hexdigest()}"
        if store.add(f"{told}/speakers", 1) > 1 and _has_come(store, told):
            return
    speaker = f" (process {place.rank})" if place.rank else ""
    print(printable(line + speaker, kept=kept), file=sys.stderr, flush=True)
    if store is not None:
        store.set(told, "yes")


def _launchers_store() -> Any:
    """The store of keys and values that torchrun keeps for its processes; None without one."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import DistError, TCPStore

    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    try:
        return TCPStore(host, int(port), is_master=False, timeout=CONNECTION_PATIENCE)
    except (DistError, ValueError):  # the launcher is gone
        return None


def _has_come(store: Any, key: str) -> bool:
    """Wait for a key of the store; False where whoever was to set it was killed over it."""
    from torch.distributed import DistError

    try:
        store.wait([key], SPEAKER_PATIENCE)
    except DistError:
        return False
    return True
