"""The outcome of preparing a source's images: `report.json`, the last line of output and the exit status."""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stablevm.data.dataset import describe_classes
from stablevm.data.listing import LISTING_FILE
from stablevm.preparation import source as images
from stablevm.preparation.source import Source
from stablevm.support.cards import card_of, read_object
from stablevm.support.errors import UserError
from stablevm.support.files import parse_json, read_json, write_text
from stablevm.support.processes import Process
from stablevm.support.text import printable

REPORT_FILE = "report.json"
SKIPPED_STATUS = 3
_LARGEST = 2**30  # bytes; it may have a line for each of millions of images
_REMEDY = "remove the folder and start over"
REDO = "remove it and run the same command again"


@dataclass(frozen=True)
class Problem:
    """An image that was skipped, or converted in a way that `cause` describes."""

    index: int | None  # in the order of the source; None for a file outside it
    name: str
    action: Literal["skipped", "handled"]
    cause: str


@dataclass(frozen=True)
class Report:
    """The report of a preparation; `plan` records the source and all options that determine the result.

    By its plan, a command recognises its own result.
    """

    plan: dict[str, Any]
    done: int  # images in the result
    ignored: int  # files of the source that are not images
    problems: tuple[Problem, ...]
    hidden: int = 0  # hidden files of the source, and files left by operating systems
    unlisted: int = 0  # images of the source that its dataset.json does not list
    class_names: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()  # images of each class in the result

    @property
    def skipped(self) -> int:
        return sum(problem.action == "skipped" for problem in self.problems)

    @property
    def status(self) -> int:
        return SKIPPED_STATUS if self.skipped else 0

    def line(self, folder: Path, verb: str, earlier: str = "") -> str:
        """The last line of the command's output; earlier: the command that has skipped the images, if not this one."""
        handled = len(self.problems) - self.skipped
        text = f"{folder}: {self.done:,} images {verb}, {self.skipped:,} skipped"
        if earlier and self.skipped:
            text += f" by {earlier}"
        if handled:
            text += f", {handled:,} of unusual form handled"
        if self.problems:
            text += f"; {REPORT_FILE} lists them"
        return "; ".join([text, *self._left_out(), *describe_classes(self.class_names, self.class_counts)])

    def _left_out(self) -> list[str]:
        parts = []
        if self.unlisted:
            parts.append(f"{self.unlisted:,} images not in the source's {LISTING_FILE}")
        if self.ignored or self.hidden:
            of_systems = f" ({self.hidden:,} hidden or left by systems)" if self.hidden else ""
            parts.append(f"{self.ignored + self.hidden:,} files ignored that are no images{of_systems}")
        return parts

    def text(self) -> str:
        """The text of report.json."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    def write(self, folder: Path) -> None:
        write_text(folder / REPORT_FILE, self.text())

    @classmethod
    def read(cls, folder: Path) -> "Report":
        """Read the report in a folder; UserError for a file that `write` can't have made."""
        values = read_object(folder / REPORT_FILE, "report", largest=_LARGEST, remedy=_REMEDY)
        return card_of(cls, values, f"report: {folder / REPORT_FILE}", remedy=_REMEDY)

    @classmethod
    def parse(cls, content: bytes, where: str) -> "Report":
        """Parse the bytes of a report; where: its place, for error messages."""
        return card_of(cls, parse_json(content, where), where, remedy=_REMEDY)


def strays(source: Source) -> list[Problem]:
    return [Problem(None, images.printable(name), "skipped", "not in a class folder") for name in source.stray]


def make_report(plan: dict[str, Any], source: Source, problems: Iterable[Problem]) -> Report:
    """Make the report of a source from problems in any order; UserError if no image could be read."""
    ordered = sorted(problems, key=lambda problem: (problem.index or 0, problem.cause))
    skipped = [problem.index for problem in ordered if problem.action == "skipped" and problem.index is not None]
    done = len(source) - len(skipped)
    if not len(source):
        raise UserError(f"{source.storage.root}: no image is left to convert; give another --part or --max-images")
    if not done:
        raise UserError(f"{source.storage.root}: none of its {len(source):,} images can be read: {ordered[0].cause}")
    counts = np.bincount(np.delete(source.labels, skipped), minlength=len(source.class_names))
    return Report(
        plan,
        done,
        source.ignored,
        (*strays(source), *ordered),
        source.hidden,
        source.unlisted,
        source.class_names,
        tuple(counts.tolist()),
    )


def tell(source: Source, process: Process) -> None:
    """Print warnings about the source's classes that may be unintended, on stderr, before the work begins."""
    for line in source.warnings if process.is_first else ():
        print(f"warning: {printable(line)}", file=sys.stderr)


def conclude(report: Report | None, dest: Path, verb: str, process: Process, earlier: str = "") -> int:
    """Print the last line in the first process, and return the exit status.

    earlier: the command that has skipped the images, and has said so by its own exit status; then this one's is 0.
    """
    if report is None or not process.is_first:
        return 0
    print(report.line(dest, verb, earlier))
    return 0 if earlier else report.status


def read_problems(record: Path) -> list[Problem]:
    """Read the problems in the record of a part; UserError if it is damaged."""
    what = f"record of a part: {record}"
    return card_of(list[Problem], read_json(record, "record of a part"), what, remedy=REDO)
