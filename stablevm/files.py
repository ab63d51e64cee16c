"""Files that are complete or absent: written under a temporary name, synced, then renamed."""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stablevm.errors import UserError

_TEMPORARY = ".tmp-"


@contextmanager
def replacing(path: str | Path, *, scratch: Path | None = None, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it becomes `path` when the block ends without an exception.

    The temporary name keeps the suffix of `path`, because writers such as PIL and numpy choose a format by it. It lies
    in `scratch` if given, a folder on the same disk. Without `durable` the caller waits for the disk (`sync`) himself,
    which is quicker for many small files at once.
    """
    path = Path(path)
    for folder in {path.parent, scratch or path.parent}:
        folder.mkdir(parents=True, exist_ok=True)
    name = f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{path.name}"
    temporary = (scratch or path.parent) / name
    try:
        yield temporary
        if durable:
            sync(temporary)
        temporary.replace(path)
        if durable:
            sync(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk is met in a write, which knows no name
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_temporary(path: Path) -> bool:
    """Whether `path` is a leftover of an interrupted `replacing`."""
    return path.name.startswith(_TEMPORARY)


def remove_temporary(folder: Path) -> None:
    """Remove the leftovers of interrupted `replacing` anywhere below `folder`, which nobody may be writing to."""
    for path in folder.rglob(f"{_TEMPORARY}*"):
        path.unlink()


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_with(path: str | Path, writer: Callable[[Path], Any]) -> None:
    """Let `writer(temporary_path)` write the file."""
    with replacing(path) as temporary:
        writer(temporary)


def read_json(path: str | Path, what: str) -> Any:
    """Parse a JSON file; `what` names it in the message when it is absent or damaged."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what}: no file {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{what}: {path} is not valid JSON ({error}); restore or remake it") from None


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of the file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
