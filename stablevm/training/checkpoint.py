"""Checkpoints: folders that are complete or absent, in safetensors and JSON.

`checkpoints/0050000/` holds what generation needs (`stablevm.snapshot`), and beside it the state of the optimiser, the
bank and the gradient scaler. Random numbers and data positions need none: they are functions of the seed and the step.
"""

import os
import secrets
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from stablevm import snapshot
from stablevm.errors import UserError
from stablevm.files import read_json, sync, write_json
from stablevm.snapshot import ModelCard

CHECKPOINTS = "checkpoints"
BEST = "best"
STATE_FILE = "training.json"
RECORD_FILE = "best.json"
_UNFINISHED = ".unfinished-"


@dataclass(frozen=True)
class TrainingState:
    """All that a run is at the end of a step."""

    card: ModelCard  # its step is the number of finished steps
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]  # "NAME.exp_avg" and the like, by the names of the model's parameters
    bank: dict[str, Tensor]  # empty without a bank
    scaler: dict[str, Any]  # of the fp16 gradient scaler; empty otherwise


@dataclass(frozen=True)
class Record:
    """Why a checkpoint is the best one: of `metric`, lower is better, it had the lowest `value`."""

    metric: str
    value: float
    step: int


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / f"{step:07d}"


def save(run: Path, state: TrainingState, keep: int = 0) -> Path:
    """Write the checkpoint of `state.card.step` below `run`; then, if `keep` > 0, remove all but the newest `keep`.

    The folder appears under its name only when everything in it is on the disk.
    """
    target = checkpoint_folder(run, state.card.step)
    _sweep(run)
    folder = target.with_name(f"{_UNFINISHED}{target.name}-{os.getpid()}-{secrets.token_hex(4)}")
    folder.mkdir(parents=True)
    try:
        for name, tensors in (("optimizer", state.optimizer), ("bank", state.bank)):
            if tensors:
                snapshot.save_tensors(folder / f"{name}.safetensors", tensors)
        write_json(folder / STATE_FILE, {"scaler": state.scaler})
        snapshot.save(folder, state.card, {"ema": state.ema, "model": state.model})
        if target.exists():  # this step was written before and is now reached again
            shutil.rmtree(target)
        folder.replace(target)
        sync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for step in saved_steps(run)[:-keep] if keep else []:
        shutil.rmtree(checkpoint_folder(run, step))
    return target


def is_best(run: Path, record: Record) -> bool:
    """Whether no lower value of its metric is known; a value that is not a number never is the best."""
    known = best_record(run)
    rival = known.value if known is not None and known.metric == record.metric else float("inf")
    return record.value < rival


def keep_if_best(run: Path, record: Record) -> bool:
    """Let `checkpoints/best` be the checkpoint of `record.step`, if it is the best; returns whether it is."""
    if not is_best(run, record):
        return False
    target = run / CHECKPOINTS / BEST
    folder = target.with_name(f"{_UNFINISHED}{target.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        shutil.copytree(checkpoint_folder(run, record.step), folder)
        write_json(folder / RECORD_FILE, asdict(record))
        shutil.rmtree(target, ignore_errors=True)
        folder.replace(target)
        sync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return True


def best_record(run: Path) -> Record | None:
    """What `checkpoints/best` is the best of; None when there is none."""
    path = run / CHECKPOINTS / BEST / RECORD_FILE
    return Record(**read_json(path, "best checkpoint")) if path.exists() else None


def load(run: Path, step: int) -> TrainingState:
    """UserError when there is no checkpoint of that step or one of its files is damaged."""
    folder = checkpoint_folder(run, step)
    if step not in saved_steps(run):
        found = ", ".join(map(str, saved_steps(run))) or "none"
        raise UserError(f"--resume-step {step}: {run} has no such checkpoint; there are: {found}")
    has_bank = (folder / "bank.safetensors").exists()
    return TrainingState(
        card=snapshot.load_card(folder),
        model=snapshot.load_weights(folder, "model"),
        ema=snapshot.load_weights(folder, "ema"),
        optimizer=snapshot.load_weights(folder, "optimizer"),
        bank=snapshot.load_weights(folder, "bank") if has_bank else {},
        scaler=read_json(folder / STATE_FILE, f"checkpoint {folder}")["scaler"],
    )


def saved_steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints below `run`, ascending."""
    folder = run / CHECKPOINTS
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def _sweep(run: Path) -> None:
    """Remove what an interrupted `save` left behind."""
    for path in (run / CHECKPOINTS).glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path)
