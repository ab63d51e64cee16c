"""The targets of `convert` and `encode` with one file per image: a folder, or a ZIP archive as in the published script.

In a folder, files are written to their final places, and each part of a job has a record of its problems. For an
archive, each part is a small archive, and all parts are joined at the end. So an archive has its final name only when
it is complete, and needs twice its space until then.
"""

import json
import shutil
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stablevm.data.listing import LISTING_FILE, WORK_FOLDER
from stablevm.preparation.config import is_archive
from stablevm.preparation.outcome import REDO, REPORT_FILE, Problem, Report, read_problems
from stablevm.preparation.work import begin, check_same, clear
from stablevm.support.cards import card_of
from stablevm.support.errors import UserError
from stablevm.support.files import parse_json, replacing, sync, write_json, write_text, write_with
from stablevm.support.locks import owned
from stablevm.support.processes import Process

_PROBLEMS_FILE = "problems.json"  # in the archive of a part
_PERMISSIONS = 0o644 << 16  # of an unpacked member
Files = Mapping[str, bytes]  # contents of files by their names in the result


@dataclass(frozen=True)
class FolderTarget:
    """A folder of files, each complete or absent, with dataset.json and report.json when all are complete."""

    dest: Path

    @property
    def home(self) -> Path:
        """The folder for unfinished work."""
        return self.dest

    @property
    def marker(self) -> Path:
        """The file that exists when the result is complete."""
        return self.dest / REPORT_FILE

    def lock(self) -> AbstractContextManager[None]:
        return owned(self.dest)

    def begin(self, plan: dict[str, Any], process: Process) -> Report | None:
        return begin(self.dest, plan, process)

    def put(self, files: Files) -> Files:
        """Accept files from any process, and return those that must be recorded with their part."""
        scratch = self.dest / WORK_FOLDER / "unfinished"
        for name, content in files.items():
            with replacing(self.dest / name, scratch=scratch, durable=False) as temporary:
                temporary.write_bytes(content)
        for path in [*(self.dest / name for name in files), *{(self.dest / name).parent for name in files}]:
            sync(path)  # one wait for all
        return {}

    def record(self, path: Path, files: Files, problems: Sequence[dict[str, Any]]) -> None:
        write_json(path, problems)

    def problems(self, path: Path) -> list[Problem]:
        return read_problems(path)

    def finish(self, records: Iterable[Path], listing: str, report: Report) -> None:
        """Write dataset.json, then the report, which marks the result as complete."""
        write_text(self.dest / LISTING_FILE, listing)
        report.write(self.dest)
        clear(self.dest)


@dataclass(frozen=True)
class ArchiveTarget:
    """An uncompressed ZIP archive with the same names as a folder, dataset.json and report.json."""

    dest: Path

    @property
    def home(self) -> Path:
        return self.dest.with_name(f"{self.dest.name}{WORK_FOLDER}")

    @property
    def marker(self) -> Path:
        return self.dest.absolute()

    def lock(self) -> AbstractContextManager[None]:
        return owned(self.dest.parent, self.dest.name)

    def begin(self, plan: dict[str, Any], process: Process) -> Report | None:
        """Like `work.begin`; UserError for an archive that this command can't have made."""
        if not self.dest.exists():
            return begin(self.home, plan, process)
        report = self._report()
        check_same(self.dest, plan, report.plan)
        if process.is_first:
            shutil.rmtree(self.home, ignore_errors=True)
        return report

    def put(self, files: Files) -> Files:
        return files

    def record(self, path: Path, files: Files, problems: Sequence[dict[str, Any]]) -> None:
        def write(temporary: Path) -> None:
            with zipfile.ZipFile(temporary, "w") as archive:
                for name, content in files.items():
                    _add(archive, name, content)
                _add(archive, _PROBLEMS_FILE, json.dumps(problems).encode())

        write_with(path, write)

    def problems(self, path: Path) -> list[Problem]:
        where = f"record of a part: {path}"
        try:
            with zipfile.ZipFile(path) as archive:
                content = archive.read(_PROBLEMS_FILE)
        except (zipfile.BadZipFile, KeyError) as error:
            raise UserError(f"{where}: can't be read ({error}); {REDO}") from None
        return card_of(list[Problem], parse_json(content, where), where, remedy=REDO)

    def finish(self, records: Iterable[Path], listing: str, report: Report) -> None:
        def write(temporary: Path) -> None:
            with zipfile.ZipFile(temporary, "w") as archive:
                for path in records:
                    _copy(path, archive)
                _add(archive, LISTING_FILE, listing.encode())
                _add(archive, REPORT_FILE, report.text().encode())

        write_with(self.dest, write)
        shutil.rmtree(self.home, ignore_errors=True)

    def _report(self) -> Report:
        try:
            with zipfile.ZipFile(self.dest) as archive:
                content = archive.read(REPORT_FILE)
        except (zipfile.BadZipFile, KeyError):
            raise UserError(
                f"{self.dest}: exists, but was not made by this command; nothing was changed: give another name"
            ) from None
        return Report.parse(content, f"{REPORT_FILE} in {self.dest}")


Target = FolderTarget | ArchiveTarget


def target_of(dest: Path) -> Target:
    """The target with this name: an archive if it ends with .zip, else a folder."""
    return ArchiveTarget(dest) if is_archive(dest) else FolderTarget(dest)


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Add an uncompressed member that depends only on its name and content, not on the time."""
    info = zipfile.ZipInfo(name)
    info.external_attr = _PERMISSIONS
    archive.writestr(info, content)


def _copy(part: Path, archive: zipfile.ZipFile) -> None:
    try:
        with zipfile.ZipFile(part) as source:
            for name in source.namelist():
                if name != _PROBLEMS_FILE:
                    _add(archive, name, source.read(name))
    except zipfile.BadZipFile as error:
        raise UserError(f"{part}: can't be read ({error}); {REDO}") from None
