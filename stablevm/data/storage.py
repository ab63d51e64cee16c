"""Access to many small files in a folder or a ZIP archive, by relative names with forward slashes."""

import errno
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from stablevm.support.errors import UserError

# Errors due to one file. Others, such as too many open files, are due to the machine; no file is damaged then.
_FILE_FAULTS = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENXIO, errno.EINVAL),
    None,  # errors of decoders
}

# All exceptions that reading a damaged file can raise in Pillow, NumPy and zipfile.
READ_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, MemoryError),
    *(struct.error, zlib.error, zipfile.BadZipFile),
)


def is_fault_of_file(error: OSError) -> bool:
    """Whether an error in reading a file is due to that file alone."""
    return error.errno in _FILE_FAULTS


def open_storage(root: str | Path) -> "Storage":
    """Open a folder or a ZIP archive; UserError if `root` is neither."""
    root = Path(root)
    if root.is_dir():
        return FolderStorage(root)
    if root.is_file() and root.suffix.lower() == ".zip":
        return ZipStorage(root)
    found = "it is a file" if root.exists() else "it does not exist"
    raise UserError(f"{root}: expected a folder or a .zip archive, but {found}; check the path")


class FolderStorage:
    """Files in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading; OSError with errno ESTALE, not due to the file, if the whole folder has vanished."""
        try:
            return open(self.root / name, "rb", opener=_open_regular)
        except FileNotFoundError:
            if not _holds_anything(self.root):
                raise OSError(errno.ESTALE, "vanished while it was read; restore it", str(self.root)) from None
            raise

    def exists(self, name: str) -> bool:
        return (self.root / name).is_file()

    def names(self) -> Iterator[str]:
        """All files, including links to files. Each real folder is visited once, so that cycles of links end."""
        return self._below("", set())

    def folders(self, prefix: str) -> set[str]:
        """Names of the folders directly below `prefix`, which is empty or ends with a slash; empty ones too."""
        with os.scandir(self.root / prefix) as entries:
            return {entry.name for entry in entries if _is_folder(entry)}

    def _below(self, prefix: str, entered: set[tuple[int, int]]) -> Iterator[str]:
        folder = self.root / prefix
        status = folder.stat()
        if (status.st_dev, status.st_ino) in entered:
            return
        entered.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            if _is_folder(entry):
                yield from self._below(f"{prefix}{entry.name}/", entered)
            else:
                yield f"{prefix}{entry.name}"


def _open_regular(path: str, flags: int) -> int:
    """Open a regular file and return its descriptor; OSError for a pipe or a device, without waiting for it."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Not a regular file", path)
    return descriptor


def _holds_anything(folder: Path) -> bool:
    """Whether the folder exists and is not empty; unmounting a disk leaves an empty one."""
    return folder.is_dir() and any(folder.iterdir())


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder; False for a cyclic or inaccessible link, for which opening it will raise an error."""
    try:
        return entry.is_dir()
    except OSError:
        return False


class ZipStorage:
    """Files in a ZIP archive, which each process opens itself, because forked processes share a file's position.

    Members have plain names, also if the archive spells them `./a/b.png` or `a\\b.png`; members outside the root are
    ignored.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._opened: tuple[int, zipfile.ZipFile, dict[str, zipfile.ZipInfo]] | None = None
        self._members()  # so that a damaged archive is reported now

    def open(self, name: str) -> IO[bytes]:
        archive, members = self._members()
        try:
            return archive.open(members[name])
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, "no such file in the archive", f"{self.root}/{name}") from None
        except (zipfile.BadZipFile, RuntimeError) as error:  # encrypted, or compressed in an unknown way
            raise OSError(errno.EINVAL, str(error), f"{self.root}/{name}") from None

    @property
    def count(self) -> int:
        """The number of members, including folders."""
        return len(self._members()[1])

    def exists(self, name: str) -> bool:
        return name in self._members()[1]

    def names(self) -> Iterator[str]:
        yield from sorted(name for name in self._members()[1] if not name.endswith("/"))

    def folders(self, prefix: str) -> set[str]:
        """Names of the folders directly below `prefix`, which is empty or ends with a slash; empty ones too."""
        inside = (name[len(prefix) :] for name in self._members()[1] if name.startswith(prefix))
        return {name.split("/")[0] for name in inside if "/" in name}

    def _members(self) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                archive = zipfile.ZipFile(self.root)
            except zipfile.BadZipFile as error:
                raise UserError(
                    f"{self.root}: not a readable ZIP archive ({error}); download or make it again"
                ) from None
            named = ((plain_name(info.filename).lstrip("/"), info) for info in archive.infolist())
            members = {name: info for name, info in named if is_inside(name)}
            self._opened = os.getpid(), archive, members
        return self._opened[1:]

    def __reduce__(self) -> tuple[type["ZipStorage"], tuple[Path]]:
        return ZipStorage, (self.root,)


Storage = FolderStorage | ZipStorage


def is_inside(name: str) -> bool:
    """Whether a relative name from an untrusted file stays below its root."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def plain_name(name: str) -> str:
    """A relative name with single forward slashes; a final slash, which marks a folder, is kept."""
    name = name.replace("\\", "/")
    if not name.startswith("./") and "/./" not in name and "//" not in name:
        return name
    root = "/" if name.startswith("/") else ""
    end = "/" if name.endswith("/") else ""
    return root + "/".join(part for part in name.split("/") if part not in ("", ".")) + end
