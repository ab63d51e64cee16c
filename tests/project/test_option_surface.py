"""The options of every command, frozen: a change of a name, a type or a default must be made on purpose.

python -m tests.project.test_option_surface --write
"""

import dataclasses
import functools
import json
import operator
import runpy
import sys
from pathlib import Path
from types import UnionType
from typing import Union, get_args, get_origin

from stablevm.commands.arguments import Common, descriptions
from stablevm.commands.table import COMMANDS, FOLDER_STEPS
from stablevm.support.ranges import Range
from tests.helpers.frozen import plain_json

FROZEN = Path(__file__).parents[1] / "golden" / "options.json"
CONFIGS = {
    f"{command.name} --{use.given}" if use is not command.uses[0] else command.name: use.options
    for command in (*COMMANDS, *FOLDER_STEPS)
    for use in command.uses
} | {"every command": Common}


def plain(hint):
    """The type without the ranges beside it."""
    if any(isinstance(note, Range) for note in getattr(hint, "__metadata__", ())):
        return plain(get_args(hint)[0])
    if get_origin(hint) in (UnionType, Union):
        return functools.reduce(operator.or_, map(plain, get_args(hint)))
    if get_origin(hint) is tuple:
        return tuple[tuple(map(plain, get_args(hint)))]
    return hint


def surface():
    def default(field):
        return "required" if field.default is dataclasses.MISSING else repr(field.default)

    def kind(field):
        # What tyro holds about other names prints differently from version to version; a range is no part of a type.
        aliases = [
            name for each in getattr(field.type, "__metadata__", ()) for name in getattr(each, "aliases", None) or ()
        ]
        return f"{field.type.__origin__} or {', '.join(aliases)}" if aliases else plain(field.type)

    return {
        command: {field.name: f"{kind(field)} = {default(field)}" for field in dataclasses.fields(config)}
        for command, config in CONFIGS.items()
    }


def test_options_are_the_frozen_ones():
    # Paths have another repr on another system; types are compared as their text.
    assert plain_json(surface()) == json.loads(FROZEN.read_text())


def test_every_option_is_documented():
    for config in CONFIGS.values():
        for field in dataclasses.fields(config):
            assert descriptions(config).get(field.name), f"{config.__name__}.{field.name} has no docstring"


def test_the_page_has_every_option():
    root = Path(__file__).parents[2]
    page = runpy.run_path(root / "docs" / "options.py")["page"]()
    assert page == (root / "docs" / "options.md").read_text(), "run python docs/options.py"
    for command in (*COMMANDS, *FOLDER_STEPS):
        assert all(f"| `{command.spelt(name)}` |" in page for name in command.fields), command.name


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    FROZEN.write_text(json.dumps(plain_json(surface()), indent=1) + "\n")
