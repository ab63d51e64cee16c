"""A job in parts, which any number of processes share and any interruption leaves whole.

Each part covers consecutive images of the source, and leaves one file when all that it makes is on the disk: what such
a file stands for is done, and everything else is made anew. Processes share nothing but the folder: part i falls to
process i modulo their number.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from stablevm.cards import read_object
from stablevm.data.listing import WORK_FOLDER
from stablevm.data.manifest import MANIFEST_FILE
from stablevm.data.workers import Calls
from stablevm.errors import UserError
from stablevm.files import is_temporary, write_json
from stablevm.locks import is_foreign
from stablevm.preparation.report import REPORT_FILE, Report
from stablevm.processes import Process, wait_for_files

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
        results = iter(Calls(work, [each for part in mine for each in _pieces(part, batch)], workers))
        finished = self.count - sum(map(len, missing))
        with tqdm(
            total=finished + sum(map(len, mine)),
            initial=finished,
            desc=self.title,
            unit="image",
            disable=not self.process.is_first,
            dynamic_ncols=True,
        ) as bar:

            def outcome(part: range) -> Iterator[Result]:
                for each in _pieces(part, batch):
                    yield next(results)
                    bar.update(len(each))

            for part in mine:
                yield part, outcome(part)

    def wait(self, paths: Sequence[Path]) -> None:
        """Until other processes have made these files."""

        def tell(missing: int) -> None:
            if self.process.is_first:
                tqdm.write(f"{self.title}: waiting for {missing} files of other processes")

        wait_for_files(paths, tell)


def begin(dest: Path, plan: dict[str, Any], process: Process) -> Report | None:
    """Start or go on in `dest`; its report where the job is done already, and what kills left of it swept up.

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
            folder, plan, read_object(record, "plan of unfinished work", remedy="remove the folder and begin anew")
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
        what = f"{name} {earlier.get(name)}, this command says {plan.get(name)}: give the same options again"
        if name in ("source", "class names"):
            what = "another list of images: restore it"
        raise UserError(f"{folder}: was begun with {what}, give another folder, or remove this one to begin anew")


def encoding_part_length(batch: int) -> int:
    """Whole batches, so that each image's batch is the same whatever was done before."""
    return -(-_ENCODING_PART_LENGTH // batch) * batch


def _pieces(whole: range, length: int) -> list[range]:
    return [whole[start : start + length] for start in range(0, len(whole), length)]
