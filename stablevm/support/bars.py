"""Progress bars: on a terminal one that moves, in a file a line now and then."""

import os
import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

NO_BARS = "TQDM_DISABLE"  # an environment variable of tqdm, which heeds it only for bars that are given no `disable`
SECONDS_BETWEEN_LINES = 30.0
_LINE = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left"
_CONTROL = re.compile(r"\x1b\[\w+|[\r\n]")  # what moves a cursor


def hidden(show: bool) -> bool:
    """tqdm's `disable` for a bar that this process is to `show`: bars are switched off by the environment too."""
    return not show or os.environ.get(NO_BARS, "") not in ("", "0")


def progress_bar(iterable: Iterable[Any] | None = None, *, desc: str, show: bool = True, **options: Any) -> "tqdm":
    """tqdm's bar on stderr with a description and its other `options`, if this process is to `show` it.

    Where stderr is no terminal, the bar is a line every SECONDS_BETWEEN_LINES seconds, and nothing if it ends before:
    carriage returns would fill a log with thousands of bars.
    """
    from tqdm import tqdm

    if hidden(show):
        return tqdm(iterable, desc, disable=True, **options)
    if sys.stderr.isatty():
        return tqdm(iterable, desc, dynamic_ncols=True, **options)
    pace = SECONDS_BETWEEN_LINES
    lines = {"mininterval": pace, "maxinterval": pace, "delay": pace, "miniters": 1, "bar_format": _LINE}
    return tqdm(iterable, desc, file=_Lines(sys.stderr), **{**options, **lines})


class _Lines:
    """A stream that writes each text as a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        text = _CONTROL.sub("", text).strip()
        if text:
            self._stream.write(f"{text}\n")

    def flush(self) -> None:
        self._stream.flush()
