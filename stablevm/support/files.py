"""Files that are either complete or absent: written under a temporary name, synced, then renamed."""

import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stablevm.support.errors import UserError

_TEMPORARY = ".tmp-"
_LONGEST_NAME = 255  # bytes, on all common file systems
_LONGEST_OWN_NAME = 200  # bytes: file systems take 255, and the temporary name is longer
LARGEST_JSON = 64 * 2**20  # bytes; descriptions are small, and parsing takes ten times as much memory
_DEEPEST_JSON = 64
CHECKPOINTS = "checkpoints"  # the folder of a run that holds them, each called by its step


@contextmanager
def replacing(path: str | Path, *, scratch: Path | None = None, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path, which is renamed to `path` when the block ends without an exception.

    It has the suffix of `path`, by which writers such as PIL and NumPy choose a format, and lies beside `path`, or in
    the folder `scratch` on the same disk. With `durable` false the file is not synced: the caller must call `sync`,
    which is faster for many small files together.
    """
    path = Path(path)
    for folder in {path.parent, scratch or path.parent}:
        folder.mkdir(parents=True, exist_ok=True)
    name = f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{_own_name(path)}"
    temporary = (scratch or path.parent) / name
    try:
        yield temporary
        if durable:
            sync(temporary)
        temporary.replace(path)
        if durable:
            sync(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk is reported without a name
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _own_name(path: Path) -> str:
    """The part of the file's name that its temporary name ends with: all of it, or only the suffix if it is long."""
    return path.name if len(os.fsencode(path.name)) <= _LONGEST_OWN_NAME else path.suffix[-_LONGEST_OWN_NAME:]


def sync(path: Path) -> None:
    """Wait until the file or folder has been written to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk is reported without a name
        raise
    finally:
        os.close(descriptor)


def is_temporary(path: Path) -> bool:
    """Whether `path` is a temporary file, as an interrupted `replacing` leaves it."""
    return path.name.startswith(_TEMPORARY)


def remove_temporary_of(*paths: Path) -> None:
    """Remove temporary files of these paths that an interrupted `replacing` left; no process may be writing them."""
    for path in paths:
        leftover = re.compile(rf"{_TEMPORARY}\d+-[0-9a-f]{{8}}-{re.escape(_own_name(path))}")
        for other in path.parent.glob(f"{_TEMPORARY}*"):
            if leftover.fullmatch(other.name):
                other.unlink(missing_ok=True)


def remove_temporary(folder: Path) -> None:
    """Remove all temporary files below `folder`; no process may be writing there."""
    for path in folder.rglob(f"{_TEMPORARY}*"):
        path.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write text as UTF-8; undecodable bytes of file names become like "\\udcff", from which JSON restores them."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as JSON, indented, in UTF-8."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_with(path: str | Path, writer: Callable[[Path], Any]) -> None:
    """Write the file by `writer(temporary_path)`."""
    with replacing(path) as temporary:
        writer(temporary)


def output_fault(path: Path, *, is_folder: bool) -> str | None:
    """The reason why the folder or file `path`, which may exist, can't be written; None if it can."""
    if "\0" in str(path):
        return "a name can't hold the character NUL"
    if long := next((part for part in path.parts if len(os.fsencode(part)) > _LONGEST_NAME), None):
        return f"a name has {len(os.fsencode(long))} bytes, file systems allow {_LONGEST_NAME}"
    try:
        nearest = next(each for each in (path, *path.absolute().parents) if each.exists() or each.is_symlink())
        kind = nearest.stat().st_mode
    except OSError as error:  # a link to itself or to nothing, a path of thousands of characters
        return f"{error.strerror}: {error.filename}"
    if nearest == path and not is_folder:
        if stat.S_ISDIR(kind):
            return f"{path} is a folder"
        if not stat.S_ISREG(kind):
            return f"{path} is not a regular file"
        nearest = path.absolute().parent
    elif not stat.S_ISDIR(kind):
        return f"{nearest} is a file"
    return None if os.access(nearest, os.W_OK | os.X_OK) else f"{nearest} can't be written to"


def check_output(what: str, path: Path, *, is_folder: bool) -> None:
    """Raise UserError, which begins with `what`, if the folder or file `path` can't be written."""
    if fault := output_fault(path, is_folder=is_folder):
        raise UserError(f"{what}: expected a {'folder' if is_folder else 'file'} that can be written; {fault}")


def read_json(path: str | Path, what: str, *, largest: int = LARGEST_JSON) -> Any:
    """Read a JSON file; UserError, beginning with `what`, if it is missing, damaged or larger than `largest` bytes."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(largest + 1)
    except FileNotFoundError:
        raise UserError(f"{what}: no file {path}") from None
    except (IsADirectoryError, NotADirectoryError):
        raise UserError(f"{what}: {path} is not a file") from None
    if len(content) > largest:
        raise UserError(f"{what}: {path} has more than {largest:,} bytes, too many for such a file; remake it")
    return parse_json(content, f"{what}: {path}")


def parse_json(content: str | bytes, where: str) -> Any:
    """Parse untrusted JSON; UserError, beginning with `where`, if it is invalid or nested too deeply."""
    try:
        values = json.loads(content)
        if _is_deeper(values, _DEEPEST_JSON):
            raise RecursionError
    except RecursionError:
        raise UserError(f"{where} is nested more than {_DEEPEST_JSON} deep; restore or remake it") from None
    except ValueError as error:  # also raised for integers of thousands of digits, and text that is not UTF-8
        raise UserError(f"{where} is not valid JSON ({error}); restore or remake it") from None
    return values


def _is_deeper(values: Any, depth: int) -> bool:
    """Whether lists and objects are nested more than `depth` deep, which recursive functions could not handle."""
    level = [values]
    for _ in range(depth + 1):
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [value for each in inner for value in each if isinstance(value, dict | list)]
        if not level:
            return False
    return True


def sha256(path: str | Path) -> str:
    """The SHA-256 of the file's bytes, in hexadecimal."""
    import hashlib

    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
