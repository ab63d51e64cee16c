"""Ranges of numbers and checks of choices, declared once and used wherever a value is checked, without torch.

A field of a configuration is declared as `batch_size: Count = 256`; `options.require` then checks it.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, get_args

from stablevm.support.errors import UserError, arg


@dataclass(frozen=True)
class Range:
    """The finite numbers from `low` to `high`, both included by default, and the `words` for them in messages."""

    words: str
    low: float
    high: float = math.inf
    without_low: bool = False
    without_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.without_low else self.low <= value
        below = value < self.high if self.without_high or self.high == math.inf else value <= self.high
        return above and below

    def check(self, name: str, value: float) -> None:
        """Raise UserError, with the argument's name, for a number outside the range."""
        if value not in self:
            raise UserError(f"{arg(name)} {value}: expected {self.words}")


AT_LEAST_1 = Range("at least 1", 1)
FINITE = Range("a finite number", -math.inf, without_low=True)
NOT_NEGATIVE = Range("0 or more", 0)
ABOVE_0 = Range("a finite number above 0", 0, without_low=True)
UNIT = Range("a number in [0, 1]", 0, 1)
BELOW_1 = Range("a number in [0, 1)", 0, 1, without_high=True)
CHANCE = Range("a probability in [0, 1]", 0, 1)
TIME = Range("a time in [0, 1]", 0, 1)
TIME_ABOVE_0 = Range("a time in (0, 1]", 0, 1, without_low=True)
TIME_BETWEEN = Range("a time between 0 and 1", 0, 1, without_low=True, without_high=True)
PORT = Range("a number from 1 to 65535", 1, 65535)

# Types of options.
Count = Annotated[int, AT_LEAST_1]
Natural = Annotated[int, NOT_NEGATIVE]
Port = Annotated[int, PORT]
NotNegative = Annotated[float, NOT_NEGATIVE]
Positive = Annotated[float, ABOVE_0]
Decay = Annotated[float, BELOW_1]
Chance = Annotated[float, CHANCE]
Time = Annotated[float, TIME]


def ranges_in(hint: Any) -> list[Range]:
    """The ranges in an annotation, also if it allows None or a word."""
    own = [note for note in getattr(hint, "__metadata__", ()) if isinstance(note, Range)]
    return own + [found for part in getattr(hint, "__args__", ()) for found in ranges_in(part)]


def check_word(name: str, value: Any, words: Any) -> None:
    """UserError, with the argument's name, for what is not one of the words of a `Literal`."""
    known = get_args(words)
    if value not in known:
        expected = " or ".join(known) if len(known) == 2 else f"one of {', '.join(known)}"
        raise UserError(f"{arg(name)} {value!r}: expected {expected}")
