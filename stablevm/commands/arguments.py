"""Parsing command lines and files of options into the dataclass of a command's options, with tyro.

Each option is declared once, in that dataclass. tyro returns only the options that were given; others may come from a
run that is resumed, from a file, or from the defaults of the dataclass.
"""

import ast
import functools
import inspect
import io
import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, make_dataclass
from types import NoneType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from stablevm.commands.faults import fault_in
from stablevm.commands.table import Command, Use
from stablevm.support.errors import UserError
from stablevm.support.launcher import Place
from stablevm.support.options import Group, in_options, is_positional
from stablevm.support.text import printable

FLAGS = (tyro.conf.DisallowNone,)


@dataclass(frozen=True)
class Common:
    """Options of every command."""

    config: str | None = None
    """Take options from this file (TOML, YAML or JSON), a run's folder, or a recipe by its name (stablevm recipes).
    Options on the command line have priority."""
    quiet: Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(aliases=["-q"])] = False
    """Print only warnings, errors and the last line."""


COMMON = Group("", "", Common, fields(Common))


@dataclass(frozen=True)
class Parsed:
    """The result of parsing a command line."""

    use: Use[Any]
    options: Any  # an instance of `use.options`
    quiet: bool


def parse(command: Command, program: str, arguments: Sequence[str]) -> Parsed:
    """Parse the arguments and the files that they name.

    It ends the program with status 0 after help. UserError for arguments that the parser refuses, a file that can't be
    read, an option of another use of the command, and a missing option.
    """
    given = _given(command, program, arguments)
    common = Common(**{field.name: given.pop(field.name) for field in fields(Common) if field.name in given})
    from_file = {} if common.config is None else _from_file(common.config, command)
    values = {**from_file, **given}
    use = command.use_of(values)
    strange = [name for name in given if name not in use.fields]
    if strange:
        raise UserError(f"{_spelt(strange, command)}: only with {' or '.join(_others(command, use))}")
    strange = [name for name in from_file if name not in use.fields]
    if strange:
        raise UserError(
            f"--config {printable(str(common.config))}: {_spelt(strange, command)}: only with "
            f"{' or '.join(_others(command, use))}; remove it from the file"
        )
    if use.check_given is not None:
        use.check_given(values)
    base = {} if use.resumed is None else use.resumed(values)
    values = {name: value for name, value in {**base, **values}.items() if name in use.fields}
    missing = [name for name in use.required if name not in values]
    if missing:
        raise UserError(
            f"{_spelt(missing, command)}: missing; give it on the command line or in a file (--config), see "
            f"{program} --help"
        )
    return Parsed(use, build(use.options, values), common.quiet)


def _from_file(where: str, command: Command) -> dict[str, Any]:
    from stablevm.commands.option_files import read_options  # and with it what reads TOML, which help does without

    return read_options(where, command)


def build(kind: type, values: Mapping[str, Any]) -> Any:
    """Make an instance of a dataclass of options, and of dataclasses inside it, from values by the options' names."""
    hints = get_type_hints(kind)
    return kind(
        **{
            field.name: build(hints[field.name], values) if is_dataclass(hints[field.name]) else values[field.name]
            for field in fields(kind)
            if field.name in values or is_dataclass(hints[field.name])
        }
    )


def _given(command: Command, program: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The options that were given; UserError, in one line, where the parser draws a box, or for a place of a process
    that no launcher says."""
    Place.from_environment()
    told = io.StringIO()
    try:
        with redirect_stderr(told):
            found: Any = tyro.cli(
                parser_type(command),
                prog=program,
                description=command.description,
                args=arguments,
                config=FLAGS,
            )
    except SystemExit as end:
        if not end.code:  # after help
            raise
        groups = [*command.groups, COMMON]
        raise UserError(fault_in(groups, program, arguments) or _unboxed(told.getvalue())) from None
    return {name: value for name, value in _inside(found) if value is not None}


def _unboxed(text: str) -> str:
    """The parser's words without the frame around them."""
    return printable(" ".join(re.sub("[╭╮╰╯│─]", " ", text).split()))


def _inside(parsed: Any) -> Iterator[tuple[str, Any]]:
    """The options in the parser's result, and in its groups."""
    for name, value in vars(parsed).items():
        if is_dataclass(value):
            yield from _inside(value)
        else:
            yield name, value


def parser_type(command: Command) -> type:
    """The dataclass from which tyro makes the command's parser, with a dataclass inside it for each group of options.

    An option that is not given is None, which can't be typed.
    """
    general = _options(COMMON)
    if len(command.groups) == 1:
        return make_dataclass("Options", _options(command.groups[0]) + general)
    groups: list[tuple[str, Any]] = []
    for group in command.groups:
        made = make_dataclass("Options", _options(group))
        # told so, tyro does not look for the source of this class
        notes: Any = (tyro.conf.OmitArgPrefixes, tyro.conf.arg(help=group.purpose))
        groups.append((group.title, Annotated[(made, *notes)]))
    return make_dataclass("Options", groups + general)


def _options(group: Group) -> list[Any]:
    """The fields of a group, each with its type, its description and the default None."""
    hints, text = get_type_hints(group.kind, include_extras=True), descriptions(group.kind)
    return [
        (each.name, _or_none(each, hints[each.name], text[each.name]), field(default=None)) for each in group.fields
    ]


def _or_none(option: "Field[Any]", hint: Any, text: str) -> Any:
    """The type of an option or None, with its annotations for tyro."""
    notes = list(getattr(hint, "__metadata__", ()))
    plain = get_args(hint)[0] if notes else hint
    words = [part for part in (plain, *get_args(plain)) if get_origin(part) is Literal]
    if words and not set(get_args(plain)) - {*words, NoneType, *get_args(words[0])}:
        notes.append(_one_of(get_args(words[0])))
    notes.append(tyro.conf.arg(help=text, help_behavior_hint=_hint(option), metavar=_metavar(option, plain)))
    # None comes first, because tyro's comparison with it is then fast and does not import typeguard
    made: Any = Union[None, plain]  # noqa: UP007
    return Annotated[(made, *notes)]


def _one_of(words: tuple[str, ...]) -> Any:
    """tyro's parser for a choice of words, to which it would otherwise add None."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(words)}}}",
        instance_from_str=lambda given: given[0],
        is_instance=lambda value: value is None or value in words,
        str_from_instance=lambda value: [str(value)],
        choices=words,
    )


def _metavar(option: "Field[Any]", hint: Any) -> str | None:
    """The placeholder for the value in the help, if tyro has no good one."""
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
    """The default of an option for the help; if it is None, the option's description explains it."""
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
    """The docstring of each field of a dataclass, including inherited ones, as one line."""
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
    """The options that request the other uses of a command."""
    return [command.spelt(other.given) if other.given else "without" for other in command.uses if other is not use]
