"""A job in parts, which any number of processes share and any interruption leaves whole.

Each part covers consecutive images of the source, and leaves one file when all that it makes is on the disk: what such
a file stands for is done, and everything else is made anew. Processes share nothing but the folder: part i falls to
process i modulo their number.
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
from stablevm.preparation.outcome import REPORT_FILE, Report
from stablevm.support.cards import read_object
from stablevm.support.errors import UserError
from stablevm.support.files import is_temporary, write_json
from stablevm.support.locks import is_foreign
from stablevm.support.processes import Process, wait_for_files
from stablevm.support.text import brief

PLAN_FILE = "plan.json"
# An interruption loses at most this much of each process's work, and each part costs two waits for the disk.
PART_LENGTH = 256
_ENCODING_PART_LENGTH = 64  # at least: on a CPU the autoencoder takes a second or more for each image

Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """Items 0 to N - 1, as `groups` of consecutive ones; parts do not reach over the end of a group."""

    title: str
    folder: Path  # of the parts' files
    groups: Sequence[range]
    process: Process
    part_length: int = PART_LENGTH

    @property
    def count(self) -> int:
        return sum(map(len, self.groups))

    def parts(self, group: range | None = None) -> list[range]:
        """Of one group, or of all."""
        groups = self.groups if group is None else [group]
        return [part for each in groups for part in _pieces(each, self.part_length)]

    def path(self, part: range) -> Path:
        return self.folder / f"part-{part.start:09d}"

    def run(
        self, work: Callable[[range], Result], batch: int, workers: int, done: Callable[[set[str], range], bool]
    ) -> Iterator[tuple[range, Iterator[Result]]]:
        """For each part of this process that is not done: the part, and what `work` gives for each batch of it.

        Batches are at most `batch` consecutive items of one part, and go to `workers` processes; results come in
        order, and those of a part are to be taken before the next part is. `done(names, part)` tells of a part
        whether it is done, from the names of the files in the folder.
        """
        names = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
        parts = self.parts()
        missing = [part for part in parts if not done(names, part)]
        mine = [part for part in parts[self.process.rank :: self.process.world_size] if not done(names, part)]
        results = _results(Calls(work, [each for part in mine for each in _pieces(part, batch)], workers))
        finished = self.count - sum(map(len, missing))
        with (
            tqdm(
                total=finished + sum(map(len, mine)),
                initial=finished,
                desc=self.title,
                unit="image",
                disable=not self.process.is_first,
                dynamic_ncols=True,
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
        """Until other processes have made these files."""

        def tell(missing: int) -> None:
            if self.process.is_first:
                tqdm.write(f"{self.title}: waiting for {missing} files of other processes")

        wait_for_files(paths, tell)


class Stop:
    """While entered, Ctrl-C is only noted, for `check`; a second one ends the program at once.

    An exception that could come anywhere would be lost, or shown with a traceback, wherever nobody can raise: in a
    worker that has only just been forked, or in the clearing up of torch's loader. Everything on the disk is complete
    or absent, so that the end may be abrupt.
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
        """KeyboardInterrupt after a Ctrl-C."""
        if self._wanted:
            self._is_ending = True
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker: it ends when this process says so
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
    """Start or resume in `dest`; its report where the job is done already, and what kills left of it swept up.

    `plan` holds all that decides the result. Raises UserError, naming the first difference, where `dest` holds the
    result of another plan, begun or complete, and where it holds anything else.
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
    """UserError where the result would lie among the images of its source, which it would add to."""
    if dest.resolve().is_relative_to(source.resolve()):
        raise UserError(f"--dest {dest}: lies in --source {source}, whose images it would add to; give one outside")


def begin_step(folder: Path, plan: dict[str, Any]) -> None:
    """Record the plan of unfinished work in its folder; UserError if that was begun with another plan."""
    record = folder / PLAN_FILE
    if record.exists():
        check_same(
            folder, plan, read_object(record, "plan of unfinished work", remedy="remove the folder and start over")
        )
    else:
        write_json(record, plan)


@contextmanager
def shared(home: Path, marker: Path, process: Process) -> Iterator[None]:
    """One process's part of work in `home` that is complete when the file `marker` is there.

    Others may complete it, and clear what this one would read, while it is still starting: then nothing is amiss, and
    the last to leave sweeps up.
    """
    try:
        yield
    except (OSError, ValueError):
        if process.is_first or not marker.exists():
            raise
    if not process.is_first and marker.exists() and home.is_dir():
        clear(home)


def clear(dest: Path) -> None:
    """Remove what only an unfinished job needs."""
    shutil.rmtree(dest / WORK_FOLDER, ignore_errors=True)
    sweep(dest)


def sweep(dest: Path) -> None:
    """Remove what interrupted writers left; of the folders of a result none holds any."""
    for path in filter(is_temporary, (*dest.iterdir(), *(dest / WORK_FOLDER).rglob("*"))):
        path.unlink(missing_ok=True)


def _goes_on(dest: Path, plan: dict[str, Any]) -> bool:
    """Whether another step, the encoding of image shards, still needs the folder of the work."""
    return plan["step"] == "shards" and not (dest / MANIFEST_FILE).exists()


def check_same(folder: Path, plan: dict[str, Any], earlier: dict[str, Any]) -> None:
    """UserError, naming the first difference, where a result was begun with another plan than this command's."""
    for name in dict.fromkeys([*plan, *earlier]):
        if json.dumps(plan.get(name)) == json.dumps(earlier.get(name)):  # a tuple is read back as a list
            continue
        what = (
            f"{brief(name)} {brief(earlier.get(name))}, this command says {plan.get(name)}: give the same options again"
        )
        if name in ("source", "class names"):
            what = "another list of images: restore it"
        raise UserError(f"{folder}: was begun with {what}, give another folder, or remove this one to start over")


def encoding_part_length(batch: int) -> int:
    """Whole batches, so that each image's batch is the same whatever was done before."""
    return -(-_ENCODING_PART_LENGTH // batch) * batch


def _results(calls: Calls[Result]) -> Generator[Result, None, None]:
    yield from calls


def _pieces(whole: range, length: int) -> list[range]:
    return [whole[start : start + length] for start in range(0, len(whole), length)]
