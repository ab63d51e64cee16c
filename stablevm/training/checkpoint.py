"""Checkpoints: folders that are complete or absent, in safetensors and JSON, with a checksum of every file.

`checkpoints/0050000/` holds what generation needs (`stablevm.networks.snapshot`), and the state of the optimiser, the
bank and the gradient scaler. Random numbers and data positions need no state, as they depend only on the seed and the
step. `SHA256SUMS` has the format of the program sha256sum.
"""

import itertools
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from stablevm.networks import snapshot
from stablevm.networks.snapshot import ModelCard
from stablevm.support.cards import read_card
from stablevm.support.errors import UserError
from stablevm.support.files import CHECKPOINTS as CHECKPOINTS
from stablevm.support.files import sha256, sync, write_json, write_text
from stablevm.support.tensor_files import save_tensors

BEST = "best"
STATE_FILE = "training.json"
SUMS_FILE = "SHA256SUMS"
RECORD_FILE = "best.json"
_AVERAGES = "average-*.safetensors"
_UNFINISHED = ".unfinished-"
_REPLACED = ".replaced-"
ASIDE = "newer-than-"  # prefix of the folders for checkpoints that are set aside when a run returns to an earlier step
_RETURN_FILE = "returning.json"


@dataclass
class Sums:
    """Sums over the steps of all processes since the last row of metrics, without skipped steps."""

    steps: int = 0  # including skipped ones
    taken: int = 0
    scalars: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # by phase
    by_time: list[list[float]] = field(default_factory=list)  # see `journal.sums_by_time`

    def add(self, other: "Sums") -> None:
        """Add the sums over later steps."""
        self.steps += other.steps
        self.taken += other.taken
        for mine, theirs in ((self.scalars, other.scalars), (self.seconds, other.seconds)):
            for name, value in theirs.items():
                mine[name] = mine.get(name, 0.0) + value
        before = self.by_time or [[0.0] * len(row) for row in other.by_time]
        rows = zip(before, other.by_time, strict=True)
        self.by_time = [[one + two for one, two in zip(first, second, strict=True)] for first, second in rows]


@dataclass(frozen=True)
class Progress:
    """Unfinished sums of metrics, saved in each checkpoint; checkpoints of version 0.1 have none."""

    row: Sums = field(default_factory=Sums)  # for the next row
    sums: dict[str, float] = field(default_factory=dict)  # for the next means, by which checkpoints are compared
    taken: int = 0  # steps in these sums
    means: dict[str, float] = field(default_factory=dict)  # that rate this checkpoint; empty for one off the interval
    bad_steps: list[int] = field(default_factory=list)  # in a row, up to this checkpoint
    # Checkpoints up to this step are of commands with other plans, which `thin` leaves alone; None: not recorded.
    thinned_after: int | None = None


@dataclass(frozen=True)
class TrainingState:
    """The complete state of a run at the end of a step."""

    card: ModelCard  # its step is the number of finished steps
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]  # "NAME.exp_avg" and the like, by the names of the model's parameters
    bank: dict[str, Tensor]  # empty without a bank
    scaler: dict[str, Any]  # of the fp16 gradient scaler; empty otherwise
    progress: Progress = field(default_factory=Progress)
    averages: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # of power-function profile, by file


@dataclass(frozen=True)
class _SmallState:
    """The contents of the JSON file beside the tensors."""

    scaler: dict[str, float | int]
    progress: Progress = field(default_factory=Progress)


@dataclass(frozen=True)
class Record:
    """The record of the best checkpoint: the one with the lowest `value` of `metric`."""

    metric: str
    value: float
    step: int


class DamagedError(UserError):
    """Raised if the tensors of a checkpoint are not those that its run saves; the one before it may be intact."""


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / f"{step:07d}"


def existing_folder(run: Path, step: int) -> Path:
    """The folder of the checkpoint of `step`; UserError if there is none."""
    if step not in saved_steps(run):
        found = ", ".join(map(str, saved_steps(run))) or "none"
        raise UserError(f"--resume-step {step}: {run} has no such checkpoint; there are: {found}")
    return checkpoint_folder(run, step)


def save(run: Path, state: TrainingState, keep: int = 0, every: int = 1) -> Path:
    """Write the checkpoint of `state.card.step` below `run`, then remove old ones with `prune`.

    The folder gets its name only when everything in it is on disk. OSError if the disk is full; earlier checkpoints are
    then unchanged.
    """
    target = checkpoint_folder(run, state.card.step)
    sweep(run)
    with _appearing(target) as folder:
        for name, tensors in {"optimizer": state.optimizer, "bank": state.bank, **state.averages}.items():
            if tensors:
                save_tensors(folder / f"{name}.safetensors", tensors)
        write_json(folder / STATE_FILE, {"scaler": state.scaler, "progress": asdict(state.progress)})
        snapshot.save(folder, state.card, {"ema": state.ema, "model": state.model})
        sums = [f"{sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
        write_text(folder / SUMS_FILE, "".join(sums))
    prune(run, keep, every)
    return target


def prune(run: Path, keep: int, every: int = 1) -> None:
    """Remove all checkpoints except the newest `keep`; with 0, remove none.

    Checkpoints at multiples of `every` steps, and the newest one, have priority: a checkpoint that an interruption
    leaves between them does not take the place of one.
    """
    steps = saved_steps(run)
    by_worth = sorted(steps, key=lambda step: (step % every == 0 or step == steps[-1], step))
    for step in by_worth[:-keep] if keep else []:
        shutil.rmtree(checkpoint_folder(run, step))


def thin(run: Path, every: int, keep: int, after: int) -> None:
    """Of the checkpoints after step `after`, remove those off whole intervals of `every`, but for the newest `keep`."""
    for step in [step for step in saved_steps(run) if step > after][:-keep]:
        if step % every:
            shutil.rmtree(checkpoint_folder(run, step))


def is_best(run: Path, record: Record) -> bool:
    """Whether the record has the lowest known value of its metric; NaN is never the best."""
    known = best_record(run)
    rival = known.value if known is not None and known.metric == record.metric else float("inf")
    return record.value < rival


def keep_if_best(run: Path, record: Record) -> bool:
    """Make `checkpoints/best` the checkpoint of `record.step` if it is the best, and return whether it is.

    The trainer calls it with means of its metrics, an evaluation with its score. The files are hard links, which take
    no space, if the file system has them.
    """
    if not is_best(run, record):
        return False
    with _appearing(run / CHECKPOINTS / BEST) as folder:
        shutil.copytree(checkpoint_folder(run, record.step), folder, copy_function=_link, dirs_exist_ok=True)
        write_json(folder / RECORD_FILE, asdict(record))
    return True


def best_record(run: Path) -> Record | None:
    """The record of `checkpoints/best`; None if there is none."""
    path = run / CHECKPOINTS / BEST / RECORD_FILE
    remedy = f"remove the folder {path.parent}: the next better checkpoint takes its place"
    return read_card(path, Record, "best checkpoint", remedy=remedy) if path.exists() else None


def load(run: Path, step: int) -> TrainingState:
    """Load the checkpoint of `step`; UserError if there is none, or a file is damaged or missing."""
    folder = existing_folder(run, step)
    small = read_card(folder / STATE_FILE, _SmallState, "checkpoint", finite=False, remedy="use an earlier checkpoint")
    card = snapshot.load_card(folder)
    try:
        return TrainingState(
            card=card,
            model=snapshot.load_weights(folder, "model"),
            ema=snapshot.load_weights(folder, "ema"),
            optimizer=snapshot.load_weights(folder, "optimizer"),
            bank=snapshot.load_weights(folder, "bank") if (folder / "bank.safetensors").exists() else {},
            scaler=small.scaler,
            progress=small.progress,
            averages={path.stem: snapshot.load_weights(folder, path.stem) for path in folder.glob(_AVERAGES)},
        )
    except UserError as error:
        raise DamagedError(str(error)) from None


def damage(folder: Path) -> str | None:
    """The first fault in the files of a checkpoint, such as "ema.safetensors is damaged"; None if there is none.

    All bytes are compared with the checksums, so that damage is found before training continues with it.
    """
    sums = folder / SUMS_FILE
    if not sums.is_file():
        return f"{SUMS_FILE} is missing"
    entries = [line.split("  ", 1) for line in sums.read_text(encoding="utf-8", errors="replace").splitlines()]
    if any(len(entry) != 2 for entry in entries) or not entries or entries[-1][1] != STATE_FILE:
        return f"{SUMS_FILE} is damaged"
    for digest, name in entries:
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256(folder / name) != digest:
            return f"{name} is damaged"
    return None


def saved_steps(run: Path) -> list[int]:
    """The steps of the complete checkpoints below `run`, ascending, without those that are being set aside."""
    folder = run / CHECKPOINTS
    found = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []
    note = _return_note(run)
    return found if note is None else [step for step in found if step <= note.step]


def set_aside(run: Path, step: int) -> Path | None:
    """Move the checkpoints newer than `step` into a new folder, which is returned; None if there are none.

    Otherwise they would be taken for the newest checkpoints of the run. A note is kept from the first move until
    `end_return`, so that after a kill the remaining ones are moved by the next call. The best checkpoint is moved too,
    if it is newer.
    """
    note = _return_note(run)
    if note is None or _has_newer(run, step):
        if note is not None:
            _move(run, note)
        if not _has_newer(run, step):
            return None
        note = _Return(step, _free_name(run, step))
        write_json(run / CHECKPOINTS / _RETURN_FILE, asdict(note))
    return _move(run, note)


def end_return(run: Path) -> None:
    """End a return to an earlier step, after the run has recorded that it resumes from that step."""
    (run / CHECKPOINTS / _RETURN_FILE).unlink(missing_ok=True)


@dataclass(frozen=True)
class _Return:
    """The note that checkpoints after `step` must be moved to `folder`."""

    step: int
    folder: str

    def __post_init__(self) -> None:
        if not self.folder.startswith(ASIDE) or Path(self.folder).name != self.folder:
            raise UserError(f"folder {self.folder!r}, expected {ASIDE}STEP")


def _return_note(run: Path) -> _Return | None:
    path = run / CHECKPOINTS / _RETURN_FILE
    remedy = "move the checkpoints that you do not want to resume from away, and remove this file"
    return read_card(path, _Return, "return to a checkpoint", remedy=remedy) if path.exists() else None


def _has_newer(run: Path, step: int) -> bool:
    return any(other > step for other in saved_steps(run)) or _has_newer_best(run, step)


def _has_newer_best(run: Path, step: int) -> bool:
    best = best_record(run)
    return best is not None and best.step > step


def _move(run: Path, note: _Return) -> Path:
    aside = run / CHECKPOINTS / note.folder
    aside.mkdir(exist_ok=True)
    if _has_newer_best(run, note.step):
        (run / CHECKPOINTS / BEST).replace(aside / BEST)
    for path in sorted((run / CHECKPOINTS).iterdir()):
        if path.name.isdigit() and int(path.name) > note.step:
            path.replace(aside / path.name)
    sync(aside)
    sync(run / CHECKPOINTS)
    return aside


def _free_name(run: Path, step: int) -> str:
    """The name of a folder that no earlier return has used."""
    plain = f"{ASIDE}{step:07d}"
    names = (plain if number == 1 else f"{plain}-{number}" for number in itertools.count(1))
    return next(name for name in names if not (run / CHECKPOINTS / name).exists())


def sweep(run: Path) -> None:
    """Remove what an interrupted writer left; a folder that was being replaced is restored."""
    for path in (run / CHECKPOINTS).glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path)
    for path in (run / CHECKPOINTS).glob(f"{_REPLACED}*"):
        target = path.with_name(path.name.removeprefix(_REPLACED))
        if target.exists():
            shutil.rmtree(path)
        else:
            path.replace(target)


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """Yield a new folder, which replaces `target` when the block ends without an exception."""
    folder = target.with_name(f"{_UNFINISHED}{target.name}-{os.getpid()}-{secrets.token_hex(4)}")
    folder.mkdir(parents=True)
    older = target.with_name(f"{_REPLACED}{target.name}")
    try:
        yield folder
        if target.exists():
            target.replace(older)
        folder.replace(target)
        sync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if older.exists():
        shutil.rmtree(older)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links; if the disk itself has a fault, the copy will report it
        shutil.copy2(source, target)
