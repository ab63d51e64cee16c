"""Locks that let only one command at a time work in a folder; the kernel releases them when their process ends.

While it runs, a command locks `FOLDER/.lock-RANK`, or `.lock-RANK-NAME` beside the file NAME that it makes. Each
process of a launch has its own lock, so that processes that outlive their launcher still keep other commands out. The
lock file describes its process and is removed with the lock; one left by a killed process has no effect.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stablevm.support.errors import UserError
from stablevm.support.files import is_temporary
from stablevm.support.text import brief

LOCK = ".lock-"
PATIENCE = 2.0  # seconds; a process that is being killed, or only checks for others, holds a lock for a moment
_POLL_SECONDS = 0.05
_COMMAND_LENGTH = 150  # characters of a command shown in messages
# Facts that the processes of one launch share, as torchrun, accelerate and SLURM set them.
_LAUNCH = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "SLURM_JOB_ID", "SLURM_STEP_ID")
# Errors of read-only folders, and of file systems without locks.
_NOT_HERE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_held: set[int] = set()  # descriptors


@contextmanager
def owned(folder: str | Path, name: str = "", *, patience: float = PATIENCE) -> Iterator[None]:
    """Keep other commands out of `folder`, or from its file `name`, during the block.

    The folder is made if necessary, and removed afterwards if it is empty. Raises UserError, which names the other
    process, if the lock is still taken after `patience` seconds. Where locks are not possible, it prints a warning.
    """
    folder = Path(folder)
    path = folder / f"{LOCK}{_rank()}{f'-{name}' if name else ''}"
    made: list[Path] = []
    try:
        descriptor = _make_and_take(path, folder / name, patience, made)
        try:
            yield
        finally:
            if descriptor is not None:
                _release(path, descriptor)
    finally:
        for each in made:
            with contextlib.suppress(OSError):  # it is no longer empty
                each.rmdir()


def is_foreign(path: Path) -> bool:
    """Whether `path` is neither a lock nor a temporary file; a folder that holds only those counts as empty."""
    return not path.name.startswith(LOCK) and not is_temporary(path)


def _make_and_take(path: Path, what: Path, patience: float, made: list[Path]) -> int | None:
    """Like `_take`, but make the folder if necessary, again if its last user removes it in the meantime.

    made: receives the new folders, innermost first.
    """
    begun = time.monotonic()
    while True:
        try:
            made += _make(path.parent)
            return _take(path, what, begun + patience)
        except FileNotFoundError as error:
            if time.monotonic() > begun + min(patience, PATIENCE):
                raise UserError(f"{path.parent}: can't make this folder ({error.strerror}); give another") from None
            time.sleep(_POLL_SECONDS)


def _make(folder: Path) -> list[Path]:
    """Make the folder, and return those that did not exist before, innermost first."""
    made = []
    for each in (folder, *folder.parents):
        if each.is_dir():
            break
        if each.exists():
            raise UserError(f"{each}: expected a folder, found a file; give another")
        made.append(each)
    folder.mkdir(parents=True, exist_ok=True)
    return made


def _take(path: Path, what: Path, deadline: float) -> int | None:
    """Take the lock and return its file descriptor; None where locks are not possible."""
    taken = None
    try:
        while True:
            taken = _open(path) if taken is None else taken
            other = path if taken is None else _stranger(path)
            if other is None:
                assert taken is not None
                _held.add(taken)
                return taken
            if time.monotonic() > deadline:
                raise UserError(f"{what}: {_describe(other)}; wait until it ends, or stop it")
            if taken is not None and _rank():  # if two launches start together, only the first process of one stays
                _release(path, taken)
                taken = None
            time.sleep(_POLL_SECONDS)
    except BaseException as error:
        if taken is not None:
            _release(path, taken)
        if not isinstance(error, OSError) or error.errno not in _NOT_HERE:
            raise
        print(f"warning: {what}: can't be locked ({error.strerror}); run no other command there", file=sys.stderr)
        return None


def _release(path: Path, descriptor: int) -> None:
    path.unlink(missing_ok=True)  # while it is held, so that a process that waits for it notices
    _held.discard(descriptor)
    os.close(descriptor)


def _open(path: Path) -> int | None:
    """Open and lock the file, and write into it which process this is; None if another process holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _lock(descriptor) or not _is(path, descriptor):
            os.close(descriptor)
            return None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(_ourselves()).encode())
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is(path: Path, descriptor: int) -> bool:
    """Whether `path` is still the open file, which its last holder may have removed since it was opened."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _stranger(mine: Path) -> Path | None:
    """A lock on the same folder or file held by a process of another launch; locks that nobody holds are removed."""
    suffix = re.fullmatch(rf"{LOCK}\d+(.*)", mine.name, re.DOTALL)
    assert suffix is not None
    pattern = re.compile(rf"{LOCK}\d+{re.escape(suffix[1])}")
    for path in mine.parent.iterdir():
        if path == mine or not pattern.fullmatch(path.name):
            continue
        try:
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            continue
        try:
            if _lock(descriptor):
                if _is(path, descriptor):
                    path.unlink()
            elif _read(path).get("launch") != _launch():
                return path
        finally:
            os.close(descriptor)
    return None


def _ourselves() -> dict[str, str | int]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "launch": _launch(),
    }


def _launch() -> str:
    return " ".join(os.environ.get(name, "") for name in _LAUNCH)


def _rank() -> int:
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0  # `launcher` reports other values


def _read(path: Path) -> dict[str, object]:
    """What the lock file says about its process; empty if that has not been written yet."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _describe(path: Path) -> str:
    facts = {name: brief(value, _COMMAND_LENGTH) for name, value in _read(path).items()}
    if not {"pid", "host", "command", "started"} <= facts.keys():
        return "another command is running there"
    return (
        f"another command is running there: process {facts['pid']} on {facts['host']} since {facts['started']} "
        f"({facts['command']})"
    )


def _forget() -> None:
    """Close the locks in a forked child; otherwise a data worker would hold the lock of its killed parent."""
    for descriptor in _held:
        os.close(descriptor)  # the parent keeps its lock
    _held.clear()


os.register_at_fork(after_in_child=_forget)
