"""The option `--quiet`, with which only warnings, errors and the last line are printed."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from stablevm.support.bars import NO_BARS


@contextmanager
def quietly() -> Iterator[None]:
    """Inside the block, suppress standard output and progress bars, and print the last line at the end.

    After an error the last line is not printed, because the error message is the last line then.
    """
    before, stream = os.environ.get(NO_BARS), _LastLine(sys.stdout)
    os.environ[NO_BARS] = "1"
    sys.stdout = stream
    try:
        yield
        stream.tell()
    finally:
        sys.stdout = stream.stream
        if before is None:
            del os.environ[NO_BARS]
        else:
            os.environ[NO_BARS] = before


class _LastLine:
    """A stream that remembers the last non-empty line."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._line, self._last = "", ""

    def write(self, text: str) -> int:
        *whole, self._line = (self._line + text).split("\n")
        self._last = next((line for line in reversed(whole) if line.strip()), self._last)
        return len(text)

    def tell(self) -> None:
        """Print the line."""
        last = self._line if self._line.strip() else self._last
        if last:
            print(last, file=self.stream, flush=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
