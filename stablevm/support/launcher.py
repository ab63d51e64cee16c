"""The rank of this process as set by a launcher such as torchrun, and messages that are printed once for all processes.

Importing this module does not import torch.
"""

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from stablevm.support.errors import UserError
from stablevm.support.text import printable

CONNECTION_PATIENCE = timedelta(seconds=30)
PRINTING_PATIENCE = timedelta(minutes=2)  # for the process that prints for all; only one that was killed needs it


@dataclass(frozen=True)
class Place:
    """The rank of this process among all processes, and among those on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> "Place":
        """Read RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them; without them, the process runs alone.

        UserError for invalid values.
        """
        rank, world_size, local_rank = (_number(name, least) for name, least in _PLACE)
        if rank >= world_size:
            raise UserError(
                f"RANK={rank}: expected less than WORLD_SIZE={world_size}, as launchers such as torchrun set them; "
                "set both, or neither"
            )
        return cls(rank, world_size, local_rank)


_PLACE = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))  # with the minimum, which is the value for one process


def _number(name: str, least: int) -> int:
    text = os.environ.get(name, str(least))
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= least):
        raise UserError(
            f"{name}={text[:40]}: expected a number, {least} or more, as launchers such as torchrun set it; "
            "unset it to run a single process"
        )
    return int(text)


def tell(line: str) -> None:
    """Print the last line of a command on stderr, once for all processes that end with the same line.

    The first process to get here prints it. The others wait until it has, because when one process ends, the launcher
    ends all. They coordinate through the launcher's store, so timing does not matter and nothing is left behind.
    Processes that were started one by one have no store, and each prints its own line.
    """
    try:
        place = Place.from_environment()
    except UserError:  # the line may be about just that
        place = Place()
    store = _launchers_store() if place.world_size > 1 else None
    printed = ""
    if store is not None:
        import hashlib

        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        printed = f"stablevm/printed/{attempt}/{hashlib.sha256(line.encode(errors='replace')).hexdigest()}"
        if store.add(f"{printed}/processes", 1) > 1 and _wait_for_key(store, printed):
            return
    process = f" (process {place.rank})" if place.rank else ""
    print(printable(line + process), file=sys.stderr, flush=True)
    if store is not None:
        store.set(printed, "yes")


def _launchers_store() -> Any:
    """The key-value store that torchrun runs for its processes; None without torchrun."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import DistError, TCPStore

    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    try:
        return TCPStore(host, int(port), is_master=False, timeout=CONNECTION_PATIENCE)
    except (DistError, ValueError):  # the launcher is gone
        return None


def _wait_for_key(store: Any, key: str) -> bool:
    """Wait until another process sets the key; False if it does not, because it was killed."""
    from torch.distributed import DistError

    try:
        store.wait([key], PRINTING_PATIENCE)
    except DistError:
        return False
    return True
