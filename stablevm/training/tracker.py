"""Where numbers and pictures of a run go: always a JSON-lines file, and the trackers that were asked for."""

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
DAMAGED_FILE = "metrics.damaged"  # lines of it that can't be read
EVALUATED = "eval_"  # begins the names of an evaluation's numbers


class Trackers:
    """One interface to the JSON-lines file `FOLDER/metrics.jsonl`, TensorBoard (`FOLDER/tensorboard`) and wandb.

    To be used on one process only. Rows after `first_step` of an earlier run that was killed are taken off the file,
    so that each step stands in it once.
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
        """One row; values that are not finite become null in the file, which JSON can hold."""
        row = {"step": step} | {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for tracker in self._others:
            tracker.log(dict(values), step=step)

    def event(self, row: Mapping[str, Any]) -> None:
        """A row that is no set of metrics, for the file only; it holds a `step`."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        """A picture uint8 (H, W, 3), for the trackers that show some."""
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

                wandb.teardown()  # waits for its own process, which else may end with this one before it has written


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; damaged lines are left out, and a last one that a kill left half-written."""
    return [row for line in _whole_lines(path) if (row := _row(line)) is not None]


def _whole_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1]


def _row(line: bytes) -> dict[str, Any] | None:
    """The row that a line holds; None for what is none."""
    try:
        row = parse_json(line, "line")
    except UserError:
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _set_damaged_lines_aside(path: Path) -> None:
    """Move the lines that are no rows into a file beside it, and say so: the run continues without them."""
    damaged = [line for line in _whole_lines(path) if _row(line) is None]
    if damaged:
        with (path.parent / DAMAGED_FILE).open("ab") as file:
            file.writelines(line + b"\n" for line in damaged)
        print(f"warning: {path}: {len(damaged)} damaged lines, now in {DAMAGED_FILE}", file=sys.stderr)


def evaluated(folder: Path, step: int) -> dict[str, float] | None:
    """The numbers that the run in `folder` has been evaluated by at `step`; None where it has not."""
    path = folder / METRICS_FILE
    for row in read_metrics(path) if path.exists() else ():
        numbers = {name.removeprefix(EVALUATED): value for name, value in row.items() if name.startswith(EVALUATED)}
        if row["step"] == step and numbers:
            return {name: math.nan if value is None else value for name, value in numbers.items()}
    return None


def keep_metrics(folder: Path, target: Path) -> None:
    """Copy the metrics file into `target`, once: the rows of the course that is left will be taken off it."""
    source, copy = folder / METRICS_FILE, target / METRICS_FILE
    if source.exists() and not copy.exists():
        write_with(copy, lambda temporary: temporary.write_bytes(source.read_bytes()))


def check_trackers(names: Sequence[str]) -> None:
    """UserError where a tracker is not installed, or nobody is logged in to wandb; its offline modes need no login."""
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
        raise UserError(f"--report-to wandb: nobody is logged in; {WANDB_REMEDY}")


def _wandb_error(error: Exception) -> UserError:
    return UserError(f"--report-to wandb: {shown(str(error), quoted=False)}; {WANDB_REMEDY}")


def _open_tracker(name: str, folder: Path, config: Mapping[str, Any]) -> Any:
    need(f"--report-to {name}", "accelerate", name)
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    PartialState()  # the trackers ask it which process they are on
    plain = {
        key: value if isinstance(value, int | float | bool) else printable(str(value)) for key, value in config.items()
    }
    if name == "tensorboard":
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # a TensorFlow that happens to be installed stays quiet
        tracker: Any = TensorBoardTracker("tensorboard", logging_dir=str(folder))
    else:
        tracker = WandBTracker("stablevm", name=folder.name, dir=str(folder))
    if hasattr(tracker, "start"):  # accelerate 1.9 and newer start a tracker apart from making it
        tracker.start()
    tracker.store_init_configuration(plain)
    return tracker
