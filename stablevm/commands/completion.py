"""The command `stablevm completion`, which prints a script for completion in a shell."""

import functools
import operator
from dataclasses import make_dataclass
from typing import Annotated, Any, cast

import tyro

from stablevm.commands.arguments import parser_type
from stablevm.commands.config import Shell
from stablevm.commands.table import COMMANDS, PURPOSES


def print_script(shell: Shell) -> None:
    """Print the script, which tyro makes from one parser for all commands."""
    inner: dict[str, list[Any]] = {word: [] for word in PURPOSES}
    outer: list[Any] = []
    for command in COMMANDS:
        first, *rest = command.name.split()
        parser = _named(parser_type(command), command.name.split()[-1], command.purpose)
        (inner[first] if rest else outer).append(parser)
    for word, parsers in inner.items():
        step = make_dataclass("Steps", [("step", functools.reduce(operator.or_, parsers))])
        outer.append(_named(step, word, PURPOSES[word]))
    tyro.cli(
        cast(type, functools.reduce(operator.or_, outer)),
        prog="stablevm",
        args=["--tyro-print-completion", shell],
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.DisallowNone),
    )


def _named(parser: Any, name: str, purpose: str) -> Any:
    return Annotated[parser, tyro.conf.subcommand(name, description=purpose, prefix_name=False)]
