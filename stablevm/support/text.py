"""Untrusted text, such as names of files and classes, made safe to print on a terminal."""

import difflib
import json
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

_ALIKE = 0.6  # the least likeness, from 0 to 1, of a word that may have been meant
_LONGEST = 60  # characters of a value in a message
# Control characters, invisible formatting characters (some reorder text), surrogates, line and paragraph separators.
_UNPRINTED = frozenset(["Cc", "Cf", "Cs", "Zl", "Zp"])
_JOINERS = "\u200c\u200d"  # formatting characters too, but part of words and emoji
_MOVES = re.compile(r"[\r\n]*(?:\x1b\[A)*")  # cursor movements that a progress bar writes separately


def printable(text: str, *, kept: str = "") -> str:
    """Escape each character that a terminal would interpret or could not show.

    kept: characters that are not escaped, such as "\\n" in text of several lines. Bytes of a file name that are not
    UTF-8 are written like "\\xff".
    """
    if text.isprintable():
        return text
    return "".join(each if each in kept else _printable(each) for each in text)


def shown(value: Any, *, quoted: bool = True) -> str:
    """A JSON value for a message: on one line, printable, and cut to 60 characters."""
    if isinstance(value, str):
        text = printable(value[:_LONGEST]) + ("…" if len(value) > _LONGEST else "")
        return f'"{text}"' if quoted else text
    if isinstance(value, dict | list | tuple):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 64:
        return "an integer of more than 64 bits"
    return json.dumps(value) if value is None or isinstance(value, int | float) else type(value).__name__


def brief(value: Any, longest: int = 200) -> str:
    """The text of any value, printable, on one line, and cut to `longest` characters."""
    text = str(value)
    return printable(text[:longest]) + ("…" if len(text) > longest else "")


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most like the one given, whatever their case; None if none is."""
    by_lower = {each.lower(): each for each in known}
    found = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=_ALIKE)
    return by_lower[found[0]] if found else None


def one_of(word: str, known: Sequence[str], others: str = "") -> str:
    """What was expected in place of a word: one of the known ones, or `others`, and the nearest, if one is like it."""
    near = nearest(word, known)
    return f"one of {', '.join(known)}{others}" + ("" if near is None else f"; the nearest is {near}")


def meant(path: Path) -> str:
    """The path beside a missing one that is most like it, as a question in brackets; nothing if none is."""
    try:
        near = nearest(path.name, [each.name for each in path.parent.iterdir()])
    except OSError:
        return ""
    return f" (did you mean {printable(str(path.with_name(near)))}?)" if near else ""


def caption(text: str, longest: int = 80) -> str:
    """Untrusted text as a caption: one line of at most `longest` characters, without invisible ones."""
    head = text[: 4 * longest]
    spaced = "".join(" " if each.isspace() else each for each in head)
    clean = " ".join("".join(each for each in spaced if _has_picture(each)).split())
    return clean if len(clean) <= longest and len(head) == len(text) else f"{clean[: longest - 1].rstrip()}…"


@contextmanager
def usable_streams() -> Iterator[None]:
    """Make standard output and error accept any text: a service may have none, a terminal's encoding may lack some."""
    with _streams(lambda stream: _Stream(stream, clean=False)):
        yield


@contextmanager
def printable_streams() -> Iterator[None]:
    """Make standard output and error escape what a terminal would interpret, also in the output of libraries."""
    with _streams(lambda stream: _Stream(stream, clean=True)):
        yield


@contextmanager
def _streams(wrap: Any) -> Iterator[None]:
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = wrap(out), wrap(err)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err


class _Stream:
    """A wrapped standard stream; None, as in a process without a terminal, discards all output."""

    def __init__(self, stream: TextIO | None, *, clean: bool) -> None:
        self._stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115, PTH123
        self._clean = clean

    def write(self, text: str) -> int:
        shown = text
        if self._clean:
            moves = _MOVES.match(text)
            start = moves.end() if moves is not None else 0
            shown = text[:start] + printable(text[start:], kept="\n\t")
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _has_picture(character: str) -> bool:
    return character in _JOINERS or unicodedata.category(character) not in _UNPRINTED


def _printable(character: str) -> str:
    if character == " " or _has_picture(character):
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # an undecodable byte of a file name (surrogateescape)
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode() if code < 0xD800 or code > 0xDFFF else f"\\u{code:04x}"
