"""The exception for bad input, and how its messages name arguments."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input; the message says what was given, what was expected and what to do.

    Commands print it as one line and exit with status 2. Any other exception is a bug and is shown with its traceback.
    """


_spelling: dict[str, str] = {}


def arg(name: str) -> str:
    """The name of an argument for a message: its own name, or inside a command the option that sets it."""
    return _spelling.get(name, name)


@contextmanager
def arguments_spelt(spelling: Mapping[str, str]) -> Iterator[None]:
    """Inside the block, `arg` uses `spelling`; commands enter it with their options."""
    before = dict(_spelling)
    _spelling.clear()
    _spelling.update(spelling)
    try:
        yield
    finally:
        _spelling.clear()
        _spelling.update(before)
