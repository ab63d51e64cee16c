"""Write docs/options.md from the option dataclasses:  python docs/options.py"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from stablevm.commands.arguments import Common, descriptions
from stablevm.commands.table import COMMANDS, FOLDER_STEPS, Command
from stablevm.support.options import Group, as_typed, is_positional

PAGE = Path(__file__).with_name("options.md")
HEAD = """# The options of each command

Made by `python docs/options.py` from the places where the options are declared; `--help` says the same. Dashes and
underscores are interchangeable, and `--no-` turns a switch off.

## Options in files

`--config FILE`, which every command takes, reads options from a file; what is given on the command line wins. The file
is TOML, YAML (with the extra `train`) or JSON, and holds the options by their names. A name that the command does not
have, or a value of another type, is refused in one line.

```toml
# mine.toml: stablevm train --config mine.toml --exp-name first
data-dir = "data"
model = "SiT-S/2"
batch-size = 64
```

A file for several commands has a table for each, `[train]`, `[generate]` or `[prepare.encode]`, and may describe itself
in a table `[about]`. FILE may also be the folder of a run, whose `config.json` holds all of its options: `stablevm
train --config exps/first --exp-name second --learning-rate 3e-4` trains once more, with another rate. Paths in a file
are relative to where the command is run.

FILE may be the name of a recipe, too. Recipes are such files, which come with the package: published settings and
measured ones, each with what it is expected to reach and who measured that. `stablevm recipes` lists them, `stablevm
recipes NAME` prints one to be kept and changed.

## Completion in a shell

`stablevm completion bash` (or `zsh`, `tcsh`) prints a script that completes commands, options and words:

```bash
stablevm completion bash > ~/.local/share/bash-completion/completions/stablevm
stablevm completion zsh > ~/.zfunc/_stablevm    # with fpath+=~/.zfunc before compinit in ~/.zshrc
```
"""


def default(field: "dataclasses.Field[Any]") -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    if field.default is None or field.name == "quiet":  # which has no --no-quiet
        return ""
    return f"`{as_typed(field.name, field.default)}`" if isinstance(field.default, bool) else f"`{field.default}`"


KINDS: dict[Any, str] = {bool: "switch", int: "whole number", float: "number", str: "text", Path: "path"}


def values(hint: Any) -> str:
    """What an option takes: the words of a Literal, or a kind; either, where it takes both."""
    if hint in KINDS:
        return KINDS[hint]
    if get_origin(hint) is Literal:
        return ", ".join(f"`{word}`" for word in get_args(hint))
    parts = [part for part in get_args(hint) if part not in (type(None), ...)]
    return " or ".join(dict.fromkeys(values(part) for part in parts if part in KINDS or get_origin(part)))


def rows(group: Group) -> Iterator[str]:
    """A line for each option."""
    text, hints = descriptions(group.kind), get_type_hints(group.kind)
    for field in group.fields:
        name = field.name.upper() if is_positional(field) else f"--{field.name.replace('_', '-')}"
        cells = (f"`{name}`", values(hints[field.name]), default(field), text[field.name].replace("|", "\\|"))
        yield f"| {' | '.join(cells)} |"


def table(group: Group) -> list[str]:
    return ["| option | takes | default | |", "| --- | --- | --- | --- |", *rows(group), ""]


def section(command: Command, program: str = "stablevm") -> str:
    lines = [f"## {program} {command.name}", "", command.description, ""]
    if command.script:
        lines += [f"Also: `{command.script}`.", ""]
    for group in command.groups:
        if len(command.groups) > 1:
            lines += [f"**{group.title}**" + (f": {group.purpose}" if group.purpose else ""), ""]
        lines += table(group)
    return "\n".join(lines).strip()


def page() -> str:
    common = ["## Every command", "", *table(Group("", "", Common, dataclasses.fields(Common)))]
    steps = (section(step, "dataset_tools.py") for step in FOLDER_STEPS)
    return "\n\n".join([HEAD.strip(), "\n".join(common).strip(), *map(section, COMMANDS), *steps]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE}: {len(COMMANDS) + len(FOLDER_STEPS)} commands", file=sys.stderr)
