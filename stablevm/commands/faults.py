"""Why a command line can't be parsed, in one line: what was given, what is expected, and the nearest that is known.

The parser decides what is refused; this module only finds the words for it.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from stablevm.support.cards import words_for
from stablevm.support.options import Group, is_positional
from stablevm.support.text import nearest, shown


@dataclass(frozen=True)
class _Option:
    """An option, or the place of a word without a name."""

    spelt: str  # --data-dir, or FOLDER
    hint: Any  # the type of its value

    @property
    def is_switch(self) -> bool:
        return _plain(self.hint) is bool

    @property
    def takes_several(self) -> bool:
        return get_origin(_plain(self.hint)) is tuple

    @property
    def value(self) -> Any:
        """The type of each value."""
        return get_args(_plain(self.hint))[0] if self.takes_several else self.hint

    def refusal(self, value: str) -> str | None:
        """The line for a value of another type; None if it has the type."""
        return None if _fits(self.value, value) else f"{self.spelt} {_quoted(value)}: expected {words_for(self.value)}"


def fault_in(groups: Sequence[Group], program: str, arguments: Sequence[str]) -> str | None:
    """The first fault of a command line that the parser refused; None if this module does not know it.

    groups: all options, with those that every command has. program: what was typed to call the command.
    """
    named, places = _options(groups)
    words, positional = deque(arguments), [place.spelt for place in places]
    last_switch = ""
    while words:
        word = words.popleft()
        if word == "--":
            continue
        if not _names_option(word):
            if not places:
                return _unexpected(word, last_switch, positional, named, program)
            if refusal := places.popleft().refusal(word):
                return refusal
            continue
        given, has_value, value = word.partition("=")
        option = named.get(_dashed(given))
        if option is None:
            return f"{_quoted(given)}: {program} has no such option; {_known(_dashed(given), named, program)}"
        last_switch = given if option.is_switch else ""
        if option.is_switch and has_value:
            return _takes_no_value(given, value)
        values = [value] if has_value else [] if option.is_switch else list(_values(words, option))
        if not option.is_switch and not values:
            return f"{given}: expected {words_for(option.value)} after it"
        if refusal := next(filter(None, map(option.refusal, values)), None):
            return refusal
    return None


def _options(groups: Sequence[Group]) -> tuple[dict[str, _Option], deque[_Option]]:
    """The options by each of their spellings, and the words without a name in their order."""
    named: dict[str, _Option] = {}
    places: deque[_Option] = deque()
    for group in groups:
        hints = get_type_hints(group.kind, include_extras=True)
        for field in group.fields:
            hint, name = hints[field.name], f"--{field.name.replace('_', '-')}"
            if is_positional(field):
                places.append(_Option(field.name.upper(), hint))
                continue
            option = _Option(name, hint)
            aliases = [
                alias for note in getattr(hint, "__metadata__", ()) for alias in getattr(note, "aliases", ()) or ()
            ]
            for spelling in (name, *aliases, *([f"--no-{name[2:]}"] if option.is_switch else [])):
                named[spelling] = option
    return named, places


def _values(words: deque[str], option: _Option) -> Iterator[str]:
    """Take the value that follows an option, or all of them, off the words."""
    while words and not _names_option(words[0]):
        yield words.popleft()
        if not option.takes_several:
            return


def _unexpected(word: str, switch: str, places: Sequence[str], named: dict[str, _Option], program: str) -> str:
    """The line for a word where no option and no place takes one."""
    if switch:
        return _takes_no_value(switch, word)
    meant = f"--{word.partition('=')[0].replace('_', '-')}"
    remedy = f"did you mean {meant}?" if meant in named else f"{program} --help lists them"
    taken = f"only {', '.join(places)} and options" if places else "only options"
    return f"{_quoted(word)}: {program} takes {taken}; {remedy}"


def _takes_no_value(switch: str, value: str) -> str:
    name = _dashed(switch).removeprefix("--no-").removeprefix("--")
    both = f"; give --{name} or --no-{name}" if switch.startswith("--") else ""
    return f"{switch} {_quoted(value)}: a switch takes no value{both}"


def _known(given: str, named: dict[str, _Option], program: str) -> str:
    """The nearest option to one that there is not, or where they are listed."""
    spellings = {spelling.lstrip("-"): spelling for spelling in (*named, "--help")}
    near = nearest(given.lstrip("-"), spellings)
    return f"{program} --help lists them" if near is None else f"the nearest is {spellings[near]}"


def _names_option(word: str) -> bool:
    return word.startswith("-") and len(word) > 1 and not _is_number(word)


def _dashed(name: str) -> str:
    return "--" + name[2:].replace("_", "-") if name.startswith("--") else name.replace("_", "-")


def _quoted(value: str) -> str:
    """A word for a message, in quotes where it is empty or has spaces."""
    return shown(value, quoted=not value or any(each.isspace() for each in value))


def _plain(hint: Any) -> Any:
    """The type without annotations, and without None."""
    if get_origin(hint) is Annotated:
        return _plain(get_args(hint)[0])
    parts = [part for part in get_args(hint) if part is not NoneType] if _is_union(hint) else []
    return _plain(parts[0]) if len(parts) == 1 else hint


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)


def _fits(hint: Any, value: str) -> bool:
    """Whether the text can be read as a value of the type."""
    hint = _plain(hint)
    if _is_union(hint):
        return any(_fits(part, value) for part in get_args(hint) if part is not NoneType)
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint is int:
        return value.lstrip("+-").replace("_", "").isdecimal()
    return _is_number(value) if hint is float else True


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
