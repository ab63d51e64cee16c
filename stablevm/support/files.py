"""Files that are complete or absent: written under a temporary name, synced, then renamed."""

import hashlib
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
LARGEST_JSON = 64 * 2**20  # bytes; what describes something is small, and whoever parses it needs ten times as much
_DEEPEST_JSON = 64


@contextmanager
def replacing(path: str | Path, *, scratch: Path | None = None, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it becomes `path` when the block ends without an exception.

    The temporary name keeps the suffix of `path`, because writers such as PIL and numpy choose a format by it. It lies
    in `scratch` if given, a folder on the same disk. Without `durable` the caller has to wait for the disk (`sync`),
    which is quicker for many small files at once.
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
    """What of its name a file keeps in the temporary one: the suffix at least."""
    return path.name if len(os.fsencode(path.name)) <= _LONGEST_OWN_NAME else path.suffix[-_LONGEST_OWN_NAME:]


def sync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk is reported without a name
        raise
    finally:
        os.close(descriptor)


def is_temporary(path: Path) -> bool:
    """Whether `path` is a leftover of an interrupted `replacing`."""
    return path.name.startswith(_TEMPORARY)


def remove_temporary_of(*paths: Path) -> None:
    """Remove what interrupted `replacing` of just these files left beside them; nobody may be writing them."""
    for path in paths:
        leftover = re.compile(rf"{_TEMPORARY}\d+-[0-9a-f]{{8}}-{re.escape(_own_name(path))}")
        for other in path.parent.glob(f"{_TEMPORARY}*"):
            if leftover.fullmatch(other.name):
                other.unlink(missing_ok=True)


def remove_temporary(folder: Path) -> None:
    """Remove the leftovers of interrupted `replacing` anywhere below `folder`, which nobody may be writing to."""
    for path in folder.rglob(f"{_TEMPORARY}*"):
        path.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8; bytes of a file's name that are none stand in it as "\\udcff", from which JSON restores them."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # of names: JSON's form of them too


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_with(path: str | Path, writer: Callable[[Path], Any]) -> None:
    """Let `writer(temporary_path)` write the file."""
    with replacing(path) as temporary:
        writer(temporary)


def output_fault(path: Path, *, is_folder: bool) -> str | None:
    """Why nothing can be written at `path`, a folder or a file that may be there already; None where it can."""
    if "\0" in str(path):
        return "a name can't hold the character NUL"
    if long := next((part for part in path.parts if len(os.fsencode(part)) > _LONGEST_NAME), None):
        return f"a name of {len(os.fsencode(long))} bytes, a disk takes {_LONGEST_NAME}"
    try:
        nearest = next(each for each in (path, *path.absolute().parents) if each.exists() or each.is_symlink())
        kind = nearest.stat().st_mode
    except OSError as error:  # a link to itself or to nothing, a path of thousands of characters
        return f"{error.strerror}: {error.filename}"
    if nearest == path and not is_folder:
        if stat.S_ISDIR(kind):
            return f"{path} is a folder"
        if not stat.S_ISREG(kind):
            return f"{path} is no plain file"
        nearest = path.absolute().parent
    elif not stat.S_ISDIR(kind):
        return f"{nearest} is a file"
    return None if os.access(nearest, os.W_OK | os.X_OK) else f"{nearest} can't be written to"


def check_output(what: str, path: Path, *, is_folder: bool) -> None:
    """UserError, which begins with `what`, where nothing can be written at `path`."""
    if fault := output_fault(path, is_folder=is_folder):
        raise UserError(f"{what}: expected a {'folder' if is_folder else 'file'} that can be written; {fault}")


def read_json(path: str | Path, what: str, *, largest: int = LARGEST_JSON) -> Any:
    """Parse a JSON file; `what` names it in the message when it is absent, damaged or larger than `largest` bytes."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(largest + 1)
    except FileNotFoundError:
        raise UserError(f"{what}: no file {path}") from None
    except (IsADirectoryError, NotADirectoryError):
        raise UserError(f"{what}: {path} is not a file") from None
    if len(content) > largest:
        raise UserError(f"{what}: {path} has more than {largest:,} bytes, so it is not what it should be; remake it")
    return parse_json(content, f"{what}: {path}")


def parse_json(content: str | bytes, where: str) -> Any:
    """Parse JSON that others wrote; UserError, which begins with `where`, for what is none or nested without end."""
    try:
        values = json.loads(content)
        if _is_deeper(values, _DEEPEST_JSON):
            raise RecursionError
    except RecursionError:
        raise UserError(f"{where} is nested more than {_DEEPEST_JSON} deep; restore or remake it") from None
    except ValueError as error:  # also for integers of thousands of digits, and text that is no UTF-8
        raise UserError(f"{where} is not valid JSON ({error}); restore or remake it") from None
    return values


def _is_deeper(values: Any, depth: int) -> bool:
    """Whether lists and objects lie in one another more than `depth` deep: whoever walks through them recurses."""
    level = [values]
    for _ in range(depth + 1):
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [value for each in inner for value in each if isinstance(value, dict | list)]
        if not level:
            return False
    return True


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of the file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
