"""From the words of a command line and the files of options to the dataclass of a command's options, by tyro.

Each option is declared once, in that dataclass. For tyro it becomes a dictionary of the options that were given: then
what was not given may come from a run that is resumed, from a file, or from the dataclass.
"""

import ast
import functools
import inspect
import io
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, make_dataclass
from types import NoneType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from stablevm.commands.option_files import read_options
from stablevm.commands.table import Command, Use
from stablevm.support.errors import UserError
from stablevm.support.launcher import is_alone, tell
from stablevm.support.options import Group, in_options, is_positional

FLAGS = (tyro.conf.DisallowNone,)


@dataclass(frozen=True)
class Common:
    """Options of every command."""

    config: str | None = None
    """Take options from this file: TOML, YAML or JSON, a run's folder, or the name of a recipe (stablevm recipes). What
    is given on the command line wins."""
    quiet: Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(aliases=["-q"])] = False
    """Print warnings, errors and the last line only."""


@dataclass(frozen=True)
class Parsed:
    """What a command line asks for."""

    use: Use[Any]
    options: Any  # an instance of `use.options`
    quiet: bool


def parse(command: Command, program: str, arguments: Sequence[str]) -> Parsed:
    """What the arguments and the files that they name ask for.

    Ends the program with status 2, and with status 0 after its help; UserError for a file that can't be read, for an
    option of another use of the command, and where one is missing.
    """
    given = _given(command, program, arguments)
    common = Common(**{field.name: given.pop(field.name) for field in fields(Common) if field.name in given})
    from_file = {} if common.config is None else read_options(common.config, command)
    values = {**from_file, **given}
    use = command.use_of(values)
    strange = [name for name in given if name not in use.fields]
    if strange:
        raise UserError(f"{_spelt(strange, command)}: only with {' or '.join(_others(command, use))}")
    base = {} if use.resumed is None else use.resumed(values)
    values = {name: value for name, value in {**base, **values}.items() if name in use.fields}
    missing = [name for name in use.required if name not in values]
    if missing:
        raise UserError(
            f"{_spelt(missing, command)}: missing; give it on the command line or in a file (--config), see "
            f"{program} --help"
        )
    return Parsed(use, build(use.options, values), common.quiet)


def build(kind: type, values: Mapping[str, Any]) -> Any:
    """An instance of a dataclass of options, and of those within it, of the values by the options' names."""
    hints = get_type_hints(kind)
    return kind(
        **{
            field.name: build(hints[field.name], values) if is_dataclass(hints[field.name]) else values[field.name]
            for field in fields(kind)
            if field.name in values or is_dataclass(hints[field.name])
        }
    )


def _given(command: Command, program: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The options that were given. What the parser says of wrong ones is said once, by one of several processes."""
    told = io.StringIO()
    try:
        with nullcontext() if is_alone() else redirect_stderr(told):
            found: Any = tyro.cli(
                parser_type(command),
                prog=program,
                description=command.description,
                args=arguments,
                config=FLAGS,
            )
    except SystemExit:
        if told.getvalue():
            tell(told.getvalue().rstrip(), kept="\n")
        raise
    return {name: value for name, value in _inside(found) if value is not None}


def _inside(parsed: Any) -> Iterator[tuple[str, Any]]:
    """The options in what the parser made, and in the groups within it."""
    for name, value in vars(parsed).items():
        if is_dataclass(value):
            yield from _inside(value)
        else:
            yield name, value


def parser_type(command: Command) -> type:
    """The dataclass from which tyro makes the command's parser: one within it for each group of options.

    Each option is None where it is not given, which nobody can type.
    """
    general = _options(Group("", "", Common, fields(Common)))
    if len(command.groups) == 1:
        return make_dataclass("Options", _options(command.groups[0]) + general)
    groups: list[tuple[str, Any]] = []
    for group in command.groups:
        made = make_dataclass("Options", _options(group))
        made.__doc__ = group.purpose
        groups.append((group.title, Annotated[(made, tyro.conf.OmitArgPrefixes)]))
    return make_dataclass("Options", groups + general)


def _options(group: Group) -> list[Any]:
    """The fields of a group, each with its type, its description and the default None."""
    hints, text = get_type_hints(group.kind, include_extras=True), descriptions(group.kind)
    return [
        (each.name, _or_none(each, hints[each.name], text[each.name]), field(default=None)) for each in group.fields
    ]


def _or_none(option: "Field[Any]", hint: Any, text: str) -> Any:
    """The type of an option, or None, with all that tyro is to know of it."""
    notes = list(getattr(hint, "__metadata__", ()))
    plain = get_args(hint)[0] if notes else hint
    words = [part for part in (plain, *get_args(plain)) if get_origin(part) is Literal]
    if words and not set(get_args(plain)) - {*words, NoneType, *get_args(words[0])}:
        notes.append(_one_of(get_args(words[0])))
    notes.append(tyro.conf.arg(help=text, help_behavior_hint=_hint(option), metavar=_metavar(option, plain)))
    # None comes first: what tyro compares with it then is quick, and does not import typeguard
    made: Any = Union[None, plain]  # noqa: UP007
    return Annotated[(made, *notes)]


def _one_of(words: tuple[str, ...]) -> Any:
    """What tyro is to do with words; by itself it would offer None among them."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(words)}}}",
        instance_from_str=lambda given: given[0],
        is_instance=lambda value: value is None or value in words,
        str_from_instance=lambda value: [str(value)],
        choices=words,
    )


def _metavar(option: "Field[Any]", hint: Any) -> str | None:
    """What stands for the value in the help, where tyro has no good word for it."""
    if is_positional(option):
        return option.name.upper()
    if option.name == "config":
        return "FILE"
    if get_origin(hint) is not tuple:
        return None
    (each, _) = get_args(hint)
    word = (get_args(each) or (each,))[0].__name__.upper()
    return f"{word} [{word} ...]"


def _hint(option: "Field[Any]") -> str:
    """What the help says of an option that is left out; its description says what stands in for None."""
    if option.default is MISSING:
        return "(required)"
    if option.default is None:
        return ""
    if isinstance(option.default, bool):
        return f"(default: {'on' if option.default else 'off'})" if option.name != "quiet" else ""
    if isinstance(option.default, tuple):
        return f"(default: {' '.join(map(str, option.default))})"
    return f"(default: {option.default})"


@functools.cache
def descriptions(kind: type) -> dict[str, str]:
    """The text under each field of a dataclass and of those that it inherits from, as one line."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        definition = _classes(base.__module__).get(base.__name__)
        lines = [] if definition is None else definition.body
        for line, text in itertools.pairwise(lines):
            if isinstance(line, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                assert isinstance(line.target, ast.Name)
                found[line.target.id] = in_options(" ".join(str(text.value.value).split()))
    return found


@functools.cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _spelt(names: Sequence[str], command: Command) -> str:
    return ", ".join(command.spelt(name) for name in names)


def _others(command: Command, use: Use[Any]) -> list[str]:
    """How the other uses of a command are asked for."""
    return [command.spelt(other.given) if other.given else "without" for other in command.uses if other is not use]
