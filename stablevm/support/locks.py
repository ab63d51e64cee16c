"""One command at a time in a folder: locks that the kernel holds, and gives back when their process ends, however.

A command holds `FOLDER/.lock-RANK`, or `.lock-RANK-NAME` beside the file NAME that it makes, while it is at work. The
processes of one launch each hold their own, so that those which outlive their launcher keep others out. The file tells
who it is; it goes with the lock, and one that a killed process left means nothing.
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

LOCK = ".lock-"
PATIENCE = 2.0  # seconds: a process that is being killed, or only looks who else is there, holds a lock for a moment
_POLL_SECONDS = 0.05
_COMMAND_LENGTH = 150  # characters that are shown
# Facts that the processes of one launch share, as torchrun, accelerate and SLURM set them.
_LAUNCH = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "SLURM_JOB_ID", "SLURM_STEP_ID")
# Of folders that may be read alone, and of file systems that know no locks.
_NOT_HERE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_held: set[int] = set()  # descriptors


@contextmanager
def owned(folder: str | Path, name: str = "", *, patience: float = PATIENCE) -> Iterator[None]:
    """Keep other commands out of `folder`, or away from its file `name`, as long as the block lasts.

    The folder is made if need be, and removed again if nothing was written into it. Raises UserError, naming the other
    process, where one still holds the lock after `patience` seconds. Where there can be no lock, a warning says so.
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
    """Whether `path` is more than a lock or what an interrupted writer left, neither of which makes a folder used."""
    return not path.name.startswith(LOCK) and not is_temporary(path)


def _make_and_take(path: Path, what: Path, patience: float, made: list[Path]) -> int | None:
    """As `_take`, in a folder that is made if need be: once more where its last holder removes it meanwhile.

    made: gets the folders that were not there before, the innermost first.
    """
    begun = time.monotonic()
    while True:
        try:
            made += _make(path.parent)
            return _take(path, what, begun + patience)
        except FileNotFoundError as error:
            if time.monotonic() > begun + min(patience, PATIENCE):
                raise UserError(f"{path.parent}: the folder can't be made ({error.strerror}); give another") from None
            time.sleep(_POLL_SECONDS)


def _make(folder: Path) -> list[Path]:
    """Make the folder; returns those that were not there before, the innermost first."""
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
    """The descriptor that holds the lock; None where there can be none."""
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
                raise UserError(f"{what}: {_describe(other)}; wait for its end, or end it")
            if taken is not None and _rank():  # of two launches that meet, the first process of one stays
                _release(path, taken)
                taken = None
            time.sleep(_POLL_SECONDS)
    except BaseException as error:
        if taken is not None:
            _release(path, taken)
        if not isinstance(error, OSError) or error.errno not in _NOT_HERE:
            raise
        print(f"warning: {what}: can't be locked ({error.strerror}); let no other command write there", file=sys.stderr)
        return None


def _release(path: Path, descriptor: int) -> None:
    path.unlink(missing_ok=True)  # while it is held: whoever waits for it looks whether it is still there
    _held.discard(descriptor)
    os.close(descriptor)


def _open(path: Path) -> int | None:
    """Open and lock the file, and say in it who we are; None where another process has it."""
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
    """Whether the open file still has its name: its last holder may have removed it since it was opened."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _stranger(mine: Path) -> Path | None:
    """A lock of the same folder or file that a process of another launch holds; those that nobody holds are removed."""
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
    return int(text) if text.isdecimal() else 0  # what else it may be is told where processes are counted


def _read(path: Path) -> dict[str, object]:
    """What a holder says of itself; nothing where that is not (yet) written."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _describe(path: Path) -> str:
    facts = {name: _printable(str(value)) for name, value in _read(path).items()}
    if not {"pid", "host", "command", "started"} <= facts.keys():
        return "another command is at work there"
    return (
        f"another command is at work there: process {facts['pid']} on {facts['host']} since {facts['started']} "
        f"({facts['command']})"
    )


def _printable(text: str) -> str:
    clean = "".join(letter if letter.isprintable() else "?" for letter in text)
    return clean if len(clean) <= _COMMAND_LENGTH else f"{clean[: _COMMAND_LENGTH - 3]}..."


def _forget() -> None:
    """In a forked child: without this a reader of data would hold the lock of its killed parent."""
    for descriptor in _held:
        os.close(descriptor)  # which leaves the parent's lock as it is
    _held.clear()


os.register_at_fork(after_in_child=_forget)
