"""Checks that the commands' configurations share: ranges, choices, and options without effect; without torch."""

import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from stablevm.support.errors import UserError
from stablevm.support.files import output_fault
from stablevm.support.ranges import ranges_in
from stablevm.support.text import printable, shown

# Options whose arguments have another name; any other argument has the name of its option.
OPTION_OF = {
    "anchors": "bank_anchors",
    "autoencoder": "vae",
    "capacity": "bank_capacity_per_class",
    "encoder": "enc_type",
    "folder": "data_dir",
    "global_batch": "batch_size",
    "label_dropout": "cfg_prob",
    "path": "path_type",
    "prediction": "prediction_type",
    "schedule": "proj_weight_schedule",
    "steepness": "proj_k",
    "tau": "proj_tau",
    "weights": "encoder_weights",
}
_IN_THE_TOY_STUDY = {"folder": "imagenet_data_path"}
Expectation = tuple[str, bool, str]  # the field, whether its value is right, and what was expected


@dataclass(frozen=True)
class Group:
    """Options that belong together, under a heading of the help."""

    title: str
    purpose: str
    kind: type  # the dataclass that has them
    fields: tuple["Field[Any]", ...]


def groups_of(kind: type, title: str = "") -> list[Group]:
    """The options of a command: those that the class itself declares, then those of each of its bases.

    A class names its group as `GROUP`; options of classes that name none, and those of dataclasses within this one, are
    called by `title`.
    """
    hints = get_type_hints(kind)
    nested = {field.name: hints[field.name] for field in fields(kind) if is_dataclass(hints[field.name])}
    found = []
    bases = [base for base in kind.__mro__ if "GROUP" in vars(base)] or [kind]
    owners = {field.name: _owner(field.name, bases) for field in fields(kind) if field.name not in nested}
    for base in bases:
        own = tuple(field for field in fields(kind) if owners.get(field.name) is base)
        if own:
            purpose = " ".join((base.__doc__ or "").split()) if base is not kind else ""
            found.append(Group(vars(base).get("GROUP", title), purpose, kind, own))
    return [*found, *(group for name, inner in nested.items() for group in groups_of(inner, name))]


def is_positional(field: "Field[Any]") -> bool:
    """Whether the option is given by its place among the words, without a name."""
    return "Positional" in str(field.type)


def _owner(name: str, bases: Sequence[type]) -> type:
    return next((base for base in bases if name in vars(base).get("__annotations__", {})), bases[0])


def as_typed(option: str, value: Any) -> str:
    """The option as typed on the command line; for None, that it is left out."""
    dashed = option.replace("_", "-")
    if isinstance(value, bool):
        return f"--{dashed}" if value else f"--{'no-'}{dashed}"
    if value is None:
        return f"no --{dashed}"
    return f"--{dashed} {printable(str(value))}"


def check_options(where: Path, options: Mapping[str, Any], earlier: Mapping[str, Any], remedy: str) -> None:
    """UserError, naming the first difference, where what lies at `where` was made with other options than these."""
    for name, value in options.items():
        if earlier.get(name) != value:
            raise UserError(
                f"{where}: made with {as_typed(name, earlier.get(name))}, not {as_typed(name, value)}; {remedy}"
            )


def in_options(text: str) -> str:
    """An option's description, in which fields of the library, such as `num_steps`, are spelt as options."""
    return re.sub(r"`(\w+)`", lambda found: f"--{found[1].replace('_', '-')}", text)


def command_line(command: str, config: Any, positional: str | None = None) -> str:
    """The command that runs `config`, with the options that differ from their defaults, to be pasted into a shell."""
    words = [command] + ([shlex.quote(str(getattr(config, positional)))] if positional else [])
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name != positional and value != field.default:
            plain = value is None or isinstance(value, bool)
            dashed = field.name.replace("_", "-")
            words.append(as_typed(field.name, value) if plain else f"--{dashed} {shlex.quote(str(value))}")
    return " ".join(words)


def options_of(kind: type) -> dict[str, str]:
    """The options, by argument of the library, of a command whose options are the fields of `kind`."""
    names = {field.name for group in groups_of(kind) for field in group.fields}
    pairs = (*_IN_THE_TOY_STUDY.items(), *OPTION_OF.items())
    renamed = {argument: option for argument, option in pairs if option in names}
    return {
        argument: f"--{option.replace('_', '-')}" for argument, option in {**{n: n for n in names}, **renamed}.items()
    }


def require(config: Any, expectations: Iterable[Expectation] = ()) -> None:
    """Raise UserError for the first field of a configuration that is outside its choices or range, or not as expected.

    Choices and ranges are those that the fields' types declare: words of a Literal, and the types of `ranges`.
    """
    for option, met, expected in [*_choices(config), *_finite(config), *_ranges(config), *expectations]:
        if not met:
            raise UserError(f"{as_typed(option, getattr(config, option))}: expected {expected}")


def writable(option: str, path: Path | None, *, is_folder: bool = True) -> Expectation:
    """The expectation that the folder or file an option names can be written, as far as can be checked beforehand."""
    fault = None if path is None else output_fault(path, is_folder=is_folder)
    return option, fault is None, f"a {'folder' if is_folder else 'file'} that can be written; {fault}"


def idle_warnings(config: Any, idle: Mapping[str, str]) -> list[str]:
    """One warning for each field in `idle` that is not at its default; its value names the options that disable it."""
    defaults = {field.name: field.default for field in fields(config)}
    return [
        f"{as_typed(option, getattr(config, option))} has no effect with {reason}"
        for option, reason in idle.items()
        if getattr(config, option) != defaults[option]
    ]


def some_of(values: Sequence[object], most: int = 10) -> str:
    """The first `most` values for a message, safe for a terminal, with "..." if there are more."""
    return ", ".join(shown(str(value), quoted=False) for value in values[:most]) + (
        ", ..." if len(values) > most else ""
    )


def distinct_indices(text: str) -> tuple[int, ...] | None:
    """The numbers in a text such as "3, 5"; None unless they are distinct integers, 0 or more."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(map(int, parts))) < len(parts):
        return None
    return tuple(map(int, parts))


def _choices(config: Any) -> list[Expectation]:
    """One expectation for each field with choices: of type Literal[...], alone or with None or int."""
    expectations = []
    for option, hint in get_type_hints(type(config)).items():
        parts = [hint] if get_origin(hint) is Literal else get_args(hint)
        choices = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
        if choices:
            others = tuple(part for part in parts if isinstance(part, type))
            value = getattr(config, option)
            expectations.append((option, value in choices or isinstance(value, others), _listed(choices, others)))
    return expectations


def _finite(config: Any) -> list[Expectation]:
    """One expectation for each field that holds floats, none of which may be infinite or NaN."""
    return [
        (field.name, all(map(math.isfinite, numbers)), "a finite number")
        for field in fields(config)
        if (numbers := [each for each in _numbers(getattr(config, field.name)) if isinstance(each, float)])
    ]


def _ranges(config: Any) -> list[Expectation]:
    """One expectation for each range that a field's type declares; what is no number, such as None, is in any."""
    hints = get_type_hints(type(config), include_extras=True)
    return [
        (field.name, all(number in each for number in _numbers(getattr(config, field.name))), each.words)
        for field in fields(config)
        for each in ranges_in(hints[field.name])
    ]


def _numbers(value: Any) -> list[float]:
    """The number, or those in a tuple."""
    several = value if isinstance(value, tuple) else (value,)
    return [each for each in several if isinstance(each, int | float) and not isinstance(each, bool)]


def _listed(choices: list[Any], others: tuple[type, ...]) -> str:
    names = f"one of {', '.join(map(str, choices))}" if len(choices) > 1 else str(choices[0])
    return f"a number or {names}" if int in others else names
