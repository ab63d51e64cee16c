"""Jobs in parts, which any number of processes share and which can be interrupted at any time.

Each part covers consecutive images of the source. When all its results are on disk it leaves one file, which marks it
as done; all other parts are made again. Processes share only the folder: part i belongs to process i modulo their
number.
"""

import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from tqdm import tqdm

from stablevm.data.listing import WORK_FOLDER
from stablevm.data.manifest import MANIFEST_FILE
from stablevm.data.workers import Calls
from stablevm.networks.autoencoder import LatentSpec
from stablevm.preparation.outcome import REPORT_FILE, Report
from stablevm.support.bars import progress_bar
from stablevm.support.cards import card_of, read_object
from stablevm.support.errors import UserError
from stablevm.support.files import is_temporary, write_json
from stablevm.support.locks import is_foreign
from stablevm.support.processes import Process, wait_for_files
from stablevm.support.text import brief

PLAN_FILE = "plan.json"
# An interruption loses at most this much of each process's work; each part takes two syncs of the disk.
PART_LENGTH = 256
_ENCODING_PART_LENGTH = 64  # at least: on a CPU the autoencoder takes a second or more for each image

Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """A job with items 0 to N - 1, in `groups` of consecutive items; no part extends over two groups."""

    title: str
    folder: Path  # of the parts' files
    groups: Sequence[range]
    process: Process
    part_length: int = PART_LENGTH

    @property
    def count(self) -> int:
        return sum(map(len, self.groups))

    def parts(self, group: range | None = None) -> list[range]:
        """The parts of one group, or of all."""
        groups = self.groups if group is None else [group]
        return [part for each in groups for part in _pieces(each, self.part_length)]

    def path(self, part: range) -> Path:
        return self.folder / f"part-{part.start:09d}"

    def run(
        self, work: Callable[[range], Result], batch: int, workers: int, done: Callable[[set[str], range], bool]
    ) -> Iterator[tuple[range, Iterator[Result]]]:
        """Yield each unfinished part of this process, with an iterator over the results of `work` for its batches.

        Batches are at most `batch` consecutive items of a part, and are processed by `workers` processes. Results come
        in order, and those of a part must be consumed before the next part is taken. `done(names, part)` says whether a
        part is done, given the names of the files in the folder.
        """
        names = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
        parts = self.parts()
        missing = [part for part in parts if not done(names, part)]
        mine = [part for part in parts[self.process.rank :: self.process.world_size] if not done(names, part)]
        results = _results(Calls(work, [each for part in mine for each in _pieces(part, batch)], workers))
        finished = self.count - sum(map(len, missing))
        with (
            progress_bar(
                total=finished + sum(map(len, mine)),
                initial=finished,
                desc=self.title,
                unit="image",
                show=self.process.is_first,
            ) as bar,
            Stop() as stop,
            closing(results),
        ):

            def outcome(part: range) -> Iterator[Result]:
                for each in _pieces(part, batch):
                    stop.check()
                    yield next(results)
                    bar.update(len(each))

            for part in mine:
                yield part, outcome(part)
                stop.check()

    def wait(self, paths: Sequence[Path]) -> None:
        """Wait until other processes have made these files."""

        def tell(missing: int) -> None:
            if self.process.is_first:
                tqdm.write(f"{self.title}: waiting for {missing} files of other processes")

        wait_for_files(paths, tell)


class Stop:
    """Inside the block, the first Ctrl-C is only recorded, for `check`; a second one ends the program at once.

    An exception at an arbitrary point could be lost or shown with a traceback, for example in a worker that has just
    been forked, or in the cleanup of torch's loader. An abrupt end is safe, because every file is complete or absent.
    """

    def __init__(self) -> None:
        self._wanted = self._is_ending = False

    def __enter__(self) -> "Stop":
        self._process, self._before = os.getpid(), signal.getsignal(signal.SIGINT)
        self._takes = threading.current_thread() is threading.main_thread() and self._before != signal.SIG_IGN
        if self._takes:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._takes:
            signal.signal(signal.SIGINT, self._before)

    def check(self) -> None:
        """Raise KeyboardInterrupt after a Ctrl-C."""
        if self._wanted:
            self._is_ending = True
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # in a worker, which ends when the main process tells it to
        if self._is_ending:
            return
        if self._wanted:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # torch would raise an error for the workers
            for child in multiprocessing.active_children():
                child.kill()
            os.write(2, b"\ninterrupted; run the same command again to resume\n")
            os._exit(128 + number)
        self._wanted = True


def begin(dest: Path, plan: dict[str, Any], process: Process) -> Report | None:
    """Start or resume a job in `dest`; if it is already complete, remove temporary files and return its report.

    plan: all that determines the result. Raises UserError, naming the first difference, if `dest` holds an unfinished
    or complete result of another plan, and if it holds anything else.
    """
    nearest = next(path for path in (dest, *dest.parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"{nearest}: expected a folder, found a file; give another")
    if (dest / REPORT_FILE).exists():
        report = Report.read(dest)
        check_same(dest, plan, report.plan)
        if process.is_first:
            sweep(dest) if _goes_on(dest, plan) else clear(dest)
        return report
    if not (dest / WORK_FOLDER / PLAN_FILE).exists() and dest.exists():
        for path in dest.iterdir():
            if path.name != WORK_FOLDER and is_foreign(path):
                raise UserError(f"{dest}: not empty ({path.name}), nothing was changed; give an empty or new folder")
    begin_step(dest / WORK_FOLDER, plan)
    return None


def check_apart(source: Path, dest: Path) -> None:
    """Raise UserError if the result would be inside the source, and so become part of its images."""
    if dest.resolve().is_relative_to(source.resolve()):
        raise UserError(f"--dest {dest}: is inside --source {source}, to whose images it would add; give one outside")


def begin_step(folder: Path, plan: dict[str, Any]) -> None:
    """Record the plan of unfinished work in its folder; UserError if it was started with another plan."""
    record = folder / PLAN_FILE
    if record.exists():
        check_same(
            folder, plan, read_object(record, "plan of unfinished work", remedy="remove the folder and start over")
        )
    else:
        write_json(record, plan)


@contextmanager
def shared(home: Path, marker: Path, process: Process) -> Iterator[None]:
    """The context of one process's share of work in `home`, which is complete when the file `marker` exists.

    Other processes may complete the work and remove its files while this one is still starting. This is not an error;
    the last process to leave removes what remains.
    """
    try:
        yield
    except (OSError, ValueError):
        if process.is_first or not marker.exists():
            raise
    if not process.is_first and marker.exists() and home.is_dir():
        clear(home)


def clear(dest: Path) -> None:
    """Remove the files that only an unfinished job needs."""
    shutil.rmtree(dest / WORK_FOLDER, ignore_errors=True)
    sweep(dest)


def sweep(dest: Path) -> None:
    """Remove temporary files of interrupted writers; the subfolders of a result have none."""
    for path in filter(is_temporary, (*dest.iterdir(), *(dest / WORK_FOLDER).rglob("*"))):
        path.unlink(missing_ok=True)


def _goes_on(dest: Path, plan: dict[str, Any]) -> bool:
    """Whether another step, the encoding of shards of images, still needs the folder of unfinished work."""
    return plan["step"] == "shards" and not (dest / MANIFEST_FILE).exists()


def check_same(folder: Path, plan: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Raise UserError, naming the first difference, if a result was started with another plan than this command's."""
    for name in dict.fromkeys([*plan, *earlier]):
        if _agree(folder, name, plan.get(name), earlier.get(name)):
            continue
        what = (
            f"{brief(name)} {brief(earlier.get(name))}, this command says {plan.get(name)}: give the same options again"
        )
        if name in ("source", "class names"):
            what = "another list of images: restore it"
        raise UserError(f"{folder}: was started with {what}, give another folder, or remove this one to start over")


def _agree(folder: Path, name: str, value: Any, earlier: Any) -> bool:
    """Whether two values of a plan mean the same; earlier versions recorded fewer fields of latents."""
    if json.dumps(value) == json.dumps(earlier):  # a tuple is read back as a list
        return True
    if name != "latent" or value is None or earlier is None:
        return False
    where, remedy = f"{folder}: latent of its plan", "remove the folder and start over"
    ours, theirs = (card_of(LatentSpec, each, where, remedy=remedy) for each in (value, earlier))
    return ours == theirs


def encoding_part_length(batch: int) -> int:
    """The number of images in a part: whole batches, so that an image's batch does not depend on interruptions."""
    return -(-_ENCODING_PART_LENGTH // batch) * batch


def _results(calls: Calls[Result]) -> Generator[Result, None, None]:
    yield from calls


def _pieces(whole: range, length: int) -> list[range]:
    return [whole[start : start + length] for start in range(0, len(whole), length)]
