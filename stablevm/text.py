"""Foreign text, such as names of files and classes, for people: nothing in it reaches a terminal raw."""

import json
import unicodedata
from typing import Any

_LONGEST = 60  # characters of a value in a message
# Controls (C0, C1, escape), marks that reorder what follows or are not seen, halves of characters, separators of lines.
_UNPRINTED = frozenset(["Cc", "Cf", "Cs", "Zl", "Zp"])


def printable(text: str, *, lines: bool = False) -> str:
    """The text with each character that a terminal would obey, or could not show, written as an escape.

    lines: keep line breaks and tabs, for text of more than one line. Bytes of a file's name that are no UTF-8 are
    written as such: \\xff.
    """
    if text.isascii() and text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return "".join(character if character in kept else _printable(character) for character in text)


def shown(value: Any, longest: int = _LONGEST, *, quoted: bool = True) -> str:
    """A value of JSON in a message: on one line, printable, and cut to a length."""
    if isinstance(value, str):
        text = value[: longest + 1]
        cut = len(value) > longest
        text = printable(text[:longest]) + ("…" if cut else "")
        return f'"{text}"' if quoted else text
    if isinstance(value, dict | list | tuple):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 64:
        return "an integer of more than 64 bits"
    return json.dumps(value) if value is None or isinstance(value, int | float) else type(value).__name__


def caption(text: str, longest: int = 80) -> str:
    """Foreign text as a caption: one line, without characters that have no picture, and not longer than `longest`."""
    head = text[: 4 * longest]
    seen = "".join(" " if character.isspace() else character for character in head)
    clean = " ".join("".join(each for each in seen if unicodedata.category(each) not in _UNPRINTED).split())
    return clean if len(clean) <= longest and len(head) == len(text) else f"{clean[:longest].rstrip()}…"


def _printable(character: str) -> str:
    if unicodedata.category(character) not in _UNPRINTED:
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte, as Python keeps it in a file's name
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("ascii", "backslashreplace").decode() if code > 0x7F else f"\\x{code:02x}"
