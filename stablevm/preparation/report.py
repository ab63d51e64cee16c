"""What a command says of a source's images when it is done: `report.json`, the last line and the exit status."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from stablevm.cards import card_of, read_object
from stablevm.errors import UserError
from stablevm.files import read_json, write_json
from stablevm.preparation.sources import Source, printable
from stablevm.processes import Process

REPORT_FILE = "report.json"
SKIPPED_STATUS = 3
_LARGEST = 2**30  # bytes: a line for each of millions of images
_REMEDY = "remove the folder and begin anew"
REDO = "remove it and run the same command again"


@dataclass(frozen=True)
class Problem:
    """One image that is not as it should be: skipped, or handled in the way that `cause` says."""

    index: int | None  # in the source's order; None for a file that has no place in it
    name: str
    action: Literal["skipped", "handled"]
    cause: str


@dataclass(frozen=True)
class Report:
    """`plan` is what the result was made from and how: the same command finds its own result by it."""

    plan: dict[str, Any]
    done: int  # images in the result
    ignored: int  # files of the source that are no images by their names
    problems: tuple[Problem, ...]

    @property
    def skipped(self) -> int:
        return sum(problem.action == "skipped" for problem in self.problems)

    @property
    def status(self) -> int:
        return SKIPPED_STATUS if self.skipped else 0

    def line(self, folder: Path, verb: str) -> str:
        """The command's last line."""
        handled = len(self.problems) - self.skipped
        text = f"{folder}: {self.done:,} images {verb}, {self.skipped:,} skipped"
        if handled:
            text += f", {handled:,} of unusual form handled"
        return f"{text}; {REPORT_FILE} lists them" if self.problems else text

    def write(self, folder: Path) -> None:
        write_json(folder / REPORT_FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "Report":
        """UserError for a file that `write` can't have made."""
        values = read_object(folder / REPORT_FILE, "report", largest=_LARGEST, remedy=_REMEDY)
        return card_of(cls, values, f"report: {folder / REPORT_FILE}", remedy=_REMEDY)


def strays(source: Source) -> list[Problem]:
    return [Problem(None, printable(name), "skipped", "not in a class folder") for name in source.stray]


def make_report(plan: dict[str, Any], source: Source, problems: Iterable[Problem]) -> Report:
    """Of a whole source; `problems` in any order. UserError where none of its images could be read."""
    ordered = sorted(problems, key=lambda problem: (problem.index or 0, problem.cause))
    done = len(source) - sum(problem.action == "skipped" for problem in ordered)
    if not done:
        raise UserError(f"{source.storage.root}: none of its {len(source):,} images can be read: {ordered[0].cause}")
    return Report(plan, done, source.ignored, (*strays(source), *ordered))


def conclude(report: Report | None, dest: Path, verb: str, process: Process) -> int:
    """The last line and the exit status, from the first process."""
    if report is None or not process.is_first:
        return 0
    print(report.line(dest, verb))
    return report.status


def read_problems(record: Path) -> list[Problem]:
    """The problems in the record of a part; UserError for a damaged one."""
    what = f"record of a part: {record}"
    return card_of(list[Problem], read_json(record, "record of a part"), what, remedy=REDO)
