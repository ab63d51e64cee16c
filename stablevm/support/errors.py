"""The one exception whose message is written for the person at the keyboard, and how it names arguments."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input: the message names what was given, what was expected and what to do.

    Commands print it as one line and leave with status 2; every other exception is a bug and keeps its traceback.
    """


_spelling: dict[str, str] = {}


def arg(name: str) -> str:
    """An argument of the library for a message: its name, or within a command the option that sets it."""
    return _spelling.get(name, name)


@contextmanager
def arguments_spelt(spelling: Mapping[str, str]) -> Iterator[None]:
    """Within it, `arg` answers with the spelling given; a command enters it with its options."""
    before = dict(_spelling)
    _spelling.clear()
    _spelling.update(spelling)
    try:
        yield
    finally:
        _spelling.clear()
        _spelling.update(before)
