"""Trackers of a run's metrics and pictures: a JSON-lines file, and those that the options request."""

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stablevm.support.errors import UserError
from stablevm.support.extras import need
from stablevm.support.files import parse_json, write_text, write_with
from stablevm.support.text import printable, shown

WANDB_ALONE = ("offline", "disabled", "dryrun")
WANDB_REMEDY = "run wandb login, set WANDB_MODE=offline, or give --report-to tensorboard"
METRICS_FILE = "metrics.jsonl"
DAMAGED_FILE = "metrics.damaged"  # for lines that can't be read
EVALUATED = "eval_"  # prefix of the results of evaluations


class Trackers:
    """Writes to the JSON-lines file `FOLDER/metrics.jsonl`, to TensorBoard (`FOLDER/tensorboard`) and to wandb.

    It must be used in one process only. Rows after `first_step`, left by an earlier command, are removed from the file,
    so that each step occurs once.
    """

    def __init__(self, folder: Path, names: Sequence[str], config: Mapping[str, Any], first_step: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._others = [_open_tracker(name, folder, config) for name in names]
        path = folder / METRICS_FILE
        if path.exists():
            _set_damaged_lines_aside(path)
            kept = [row for row in read_metrics(path) if row["step"] <= first_step]
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write a row; values that are not finite become null in the file, because JSON has no NaN."""
        row = {"step": step} | {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for tracker in self._others:
            tracker.log(dict(values), step=step)

    def event(self, row: Mapping[str, Any]) -> None:
        """Write a row about an event, only to the file; it has a `step`."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        """Send a picture uint8 (H, W, 3) to the trackers that show pictures."""
        for tracker in self._others:
            if tracker.name == "tensorboard":
                tracker.log_images({name: image[None]}, step=step, dataformats="NHWC")
            else:
                tracker.log_images({name: [image]}, step=step)

    def close(self) -> None:
        self._file.close()
        for tracker in self._others:
            tracker.finish()
            if tracker.name == "wandb":
                import wandb

                wandb.teardown()  # waits for wandb's process, which could otherwise end before it has written


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, without damaged lines and without an incomplete last line."""
    return [row for line in _whole_lines(path) if (row := _row(line)) is not None]


def _whole_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1]


def _row(line: bytes) -> dict[str, Any] | None:
    """The row in a line; None if the line is damaged."""
    try:
        row = parse_json(line, "line")
    except UserError:
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _set_damaged_lines_aside(path: Path) -> None:
    """Move damaged lines to another file, with a warning, so that the run can continue without them."""
    damaged = [line for line in _whole_lines(path) if _row(line) is None]
    if damaged:
        with (path.parent / DAMAGED_FILE).open("ab") as file:
            file.writelines(line + b"\n" for line in damaged)
        print(f"warning: {path}: {len(damaged)} damaged lines, now in {DAMAGED_FILE}", file=sys.stderr)


def evaluated(folder: Path, step: int) -> dict[str, float] | None:
    """The results of the evaluation at `step` of the run in `folder`; None if there was none."""
    path = folder / METRICS_FILE
    for row in read_metrics(path) if path.exists() else ():
        numbers = {name.removeprefix(EVALUATED): value for name, value in row.items() if name.startswith(EVALUATED)}
        if row["step"] == step and numbers:
            return {name: math.nan if value is None else value for name, value in numbers.items()}
    return None


def keep_metrics(folder: Path, target: Path) -> None:
    """Copy the metrics file to `target`, once, before rows after an earlier step are removed from it."""
    source, copy = folder / METRICS_FILE, target / METRICS_FILE
    if source.exists() and not copy.exists():
        write_with(copy, lambda temporary: temporary.write_bytes(source.read_bytes()))


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError if a tracker is not installed, or wandb has no login, which its offline modes do not need."""
    for name in names:
        need(f"--report-to {name}", name)
    if "wandb" not in names:
        return
    import wandb

    if os.environ.get("WANDB_MODE", "online").lower() in WANDB_ALONE:
        return
    try:
        known = wandb.login(prompt=False)
    except wandb.errors.Error as error:
        raise _wandb_error(error) from None
    if not known:
        raise UserError(f"--report-to wandb: not logged in; {WANDB_REMEDY}")


def _wandb_error(error: Exception) -> UserError:
    return UserError(f"--report-to wandb: {shown(str(error), quoted=False)}; {WANDB_REMEDY}")


def _open_tracker(name: str, folder: Path, config: Mapping[str, Any]) -> Any:
    need(f"--report-to {name}", "accelerate", name)
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    PartialState()  # by which the trackers find out in which process they are
    plain = {
        key: value if isinstance(value, int | float | bool) else printable(str(value)) for key, value in config.items()
    }
    if name == "tensorboard":
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # so that TensorFlow, if installed, prints nothing
        tracker: Any = TensorBoardTracker("tensorboard", logging_dir=str(folder))
    else:
        tracker = WandBTracker("stablevm", name=folder.name, dir=str(folder), config=plain)
    if hasattr(tracker, "start"):  # accelerate 1.9 and newer start a tracker apart from making it
        tracker.start()
    if name == "tensorboard":  # to wandb it was given above: accelerate 1.10 would begin a second run, when offline
        tracker.store_init_configuration(plain)
    return tracker
