"""Access to many small files in a folder, a ZIP archive or tar archives, by relative names with forward slashes."""

import errno
import io
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from stablevm.support.errors import UserError
from stablevm.support.text import meant, printable

# Errors due to one file. Others, such as too many open files, are due to the machine; no file is damaged then.
_FILE_FAULTS = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENXIO, errno.EINVAL),
    None,  # errors of decoders
}

_TAR_BLOCK = 512  # bytes: the unit of tar archives

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
    found = "it is a file" if root.exists() else f"it does not exist{meant(root)}"
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


@dataclass(frozen=True)
class _TarMember:
    """Where the content of a file lies."""

    archive: Path
    start: int
    size: int


class TarStorage:
    """Files in tar archives. If there are several, the name of an archive comes before those of its members."""

    def __init__(self, root: Path, archives: Sequence[Path]) -> None:
        """UserError for damaged archives, and for members that no archive of images needs."""
        self.root, self.archives = root, tuple(archives)
        self._members: dict[str, _TarMember] = {}
        for archive in archives:
            prefix = f"{archive.name}/" if len(archives) > 1 else ""
            for name, member in _tar_members(archive):
                self._members[prefix + name] = member

    def open(self, name: str) -> IO[bytes]:
        """The content of a member; OSError where there is none of that name, or the archive has become shorter."""
        return io.BytesIO(self.read(name))

    def read(self, name: str, limit: int | None = None) -> bytes:
        """The content of a member, or its first `limit` bytes; errors as `open`."""
        member = self._members.get(name)
        if member is None:
            raise FileNotFoundError(errno.ENOENT, "no such file in the archive", f"{self.root}/{name}")
        wanted = member.size if limit is None else min(limit, member.size)
        with member.archive.open("rb") as file:
            file.seek(member.start)
            content = file.read(wanted)
        if len(content) < wanted:
            raise OSError(errno.ESTALE, "has become shorter while it was read; restore it", str(member.archive))
        return content

    def exists(self, name: str) -> bool:
        return name in self._members

    def names(self) -> Iterator[str]:
        yield from sorted(self._members)

    def folders(self, prefix: str) -> set[str]:
        """Names of the folders directly below `prefix`, which is empty or ends with a slash."""
        inside = (name[len(prefix) :] for name in self._members if name.startswith(prefix))
        return {name.split("/")[0] for name in inside if "/" in name}

    def __reduce__(self) -> "tuple[type[TarStorage], tuple[Path, tuple[Path, ...]]]":
        return TarStorage, (self.root, self.archives)


def _tar_members(archive: Path) -> Iterator[tuple[str, _TarMember]]:
    size = archive.stat().st_size
    try:
        with tarfile.open(archive, "r:") as opened:
            while (info := opened.next()) is not None:
                name = plain_name(info.name)
                if not is_inside(name) or info.islnk() or info.issym():
                    what = "leaves the archive" if not is_inside(name) else f"is a link to {info.linkname}"
                    raise UserError(f"{archive}: its member {printable(info.name)} {printable(what)}; make it without")
                if info.isreg() and not info.issparse():
                    if info.offset_data + info.size > size:
                        raise UserError(
                            f"{archive}: ends within {printable(name)}, so it is truncated; download it again"
                        )
                    yield name, _TarMember(archive, info.offset_data, info.size)
                opened.members = []  # type: ignore[attr-defined]  # it keeps all: a gigabyte for a million
            end = opened.offset  # where tarfile found no further member
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise UserError(f"{archive}: not a readable tar archive ({error}); download it again") from None
    with archive.open("rb") as file:
        file.seek(end)
        rest = file.read(_TAR_BLOCK)
    if len(rest) < _TAR_BLOCK or any(rest):  # tarfile itself takes what it can't read for the end
        raise UserError(
            f"{archive}: has no readable end after byte {end:,}, so it is truncated or damaged; download it again"
        )


Storage = FolderStorage | ZipStorage | TarStorage


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
