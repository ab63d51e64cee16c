"""Why a command line can't be parsed, in one line: what was given, what is expected, and the nearest that is known.

The parser decides what is refused; this module only finds the words for it.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from stablevm.commands.spellings import Option, is_union, options_in, plain
from stablevm.support.cards import words_for
from stablevm.support.options import Group
from stablevm.support.text import nearest, shown


def fault_in(groups: Sequence[Group], program: str, arguments: Sequence[str]) -> str | None:
    """The first fault of a command line that the parser refused; None if this module does not know it.

    groups: all options, with those that every command has. program: what was typed to call the command.
    """
    named, positional = options_in(groups)
    words, places = deque(arguments), deque(positional)
    last_switch = ""
    while words:
        word = words.popleft()
        if word == "--":
            continue
        if not _names_option(word):
            if not places:
                return _unexpected(word, last_switch, [place.spelt for place in positional], named, program)
            if refusal := _refusal(places.popleft(), word):
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
        if refusal := next(filter(None, (_refusal(option, value) for value in values)), None):
            return refusal
    return None


def _values(words: deque[str], option: Option) -> Iterator[str]:
    """Take the value that follows an option, or all of them, off the words."""
    while words and not _names_option(words[0]):
        yield words.popleft()
        if not option.takes_several:
            return


def _unexpected(word: str, switch: str, places: Sequence[str], named: dict[str, Option], program: str) -> str:
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


def _known(given: str, named: dict[str, Option], program: str) -> str:
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


def _refusal(option: Option, value: str) -> str | None:
    """The line for a value of another type; None if it has the type."""
    if _fits(option.value, value):
        return None
    return f"{option.spelt} {_quoted(value)}: expected {words_for(option.value)}"


def _fits(hint: Any, value: str) -> bool:
    """Whether the text can be read as a value of the type."""
    hint = plain(hint)
    if is_union(hint):
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
