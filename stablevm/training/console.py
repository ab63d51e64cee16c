"""What a run prints: lines, warnings and its progress, on a terminal or into a file."""

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

from tqdm import tqdm

from stablevm.support.bars import progress_bar

Row = tuple[str, str]  # a label, and what is told of it

_LABEL_WIDTH = 10
_BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def say(line: str) -> None:
    """Print a line, above the progress bar if there is one, at once even into a file."""
    tqdm.write(line)
    sys.stdout.flush()


def warn(line: str) -> None:
    """Print a warning in the same way, on stderr."""
    tqdm.write(f"warning: {line}\n", file=sys.stderr, end="")  # at once, as another process may write its error


def on_terminal() -> bool:
    """Whether what is printed reaches a terminal, where a progress bar can be drawn; a file gets plain lines."""
    return sys.stdout.isatty() and sys.stderr.isatty() and shutil.get_terminal_size((0, 0)).lines > 0


def say_rows(rows: Sequence[Row]) -> None:
    """Print a table of labels and what is told of them."""
    for label, text in rows:
        say(f"{label.ljust(_LABEL_WIDTH)} {text}")


class Meter:
    """How far a run is: a bar on a terminal, elsewhere a plain line for each report, where `lines` asks for them."""

    def __init__(self, title: str, *, step: int, total_steps: int, show: bool, lines: bool = True) -> None:
        """step: how many are done; show: false on all processes but the main one."""
        self._writes_lines = show and lines and not on_terminal()
        self._first, self._total, self._start = step, total_steps, time.monotonic()
        self._bar = progress_bar(
            desc=title,
            initial=step,
            total=total_steps,
            bar_format=_BAR,
            show=show and on_terminal(),
        )

    def advance(self) -> None:
        """One more step is done."""
        self._bar.update()

    def report(self, step: int, losses: Mapping[str, float], images_per_second: float) -> None:
        """Means of the losses over the steps since the last report, of which `step` was the last."""
        numbers = ", ".join([*(f"{name} {value:.4f}" for name, value in losses.items()), _speed(images_per_second)])
        self._bar.set_postfix_str(numbers, refresh=False)
        if self._writes_lines:
            per_step = (time.monotonic() - self._start) / max(1, step - self._first)
            say(f"step {step:,} of {self._total:,}: {numbers}, {duration(per_step * (self._total - step))} left")

    def close(self) -> None:
        self._bar.close()


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 0:02:31."""
    return str(timedelta(seconds=round(seconds)))


def _speed(images_per_second: float) -> str:
    return f"{images_per_second:,.0f} images/s" if images_per_second >= 10 else f"{images_per_second:.2f} images/s"
