"""Files of options in TOML, YAML or JSON, which may be a run's own file or a recipe; names and types are checked.

A file holds the options of one command, or a table for each of several commands, with the name of the command, and a
table `about` with a description.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from stablevm.commands.table import COMMANDS, FOLDER_STEPS, Command
from stablevm.recipes.listing import ABOUT, recipe_file, recipe_names
from stablevm.support.cards import card_of, read_object
from stablevm.support.errors import UserError
from stablevm.support.extras import need
from stablevm.support.files import CHECKPOINTS, LARGEST_JSON
from stablevm.support.text import nearest, printable, shown
from stablevm.training.config import CONFIG_FILE, TrainConfig


def read_options(where: str, command: Command) -> dict[str, Any]:
    """Read the options of `command` from a file: values with the declared types, by name.

    where: a file, a run's folder, or the name of a recipe. UserError if it can't be read, for an unknown name, or for a
    value of another type.
    """
    path = file_of(where)
    given = _of_command(read_values(path), command, path)
    typed = {name.replace("-", "_"): name for name in given}
    values = {name: given[typed[name]] for name in typed}
    if command.name == "train" and _is_of_run(where, path):
        values = TrainConfig.of_run(values)
    checked = {}
    for name, value in values.items():
        if name not in command.fields:
            as_given = printable(typed.get(name, name))
            near = _nearest(name, command)
            near = near.replace("_", "-") if "-" in as_given else near
            raise UserError(f"{path}: {as_given}: {command.name} has no such option{near}")
        hint = _hint(command, name)
        checked[name] = card_of(hint, value, f"{path}: {name}", remedy="correct it")
    return checked


def _is_of_run(where: str, path: Path) -> bool:
    """Whether a run wrote the file: a run's folder was given, or the run's checkpoints lie beside the file."""
    return path.name == CONFIG_FILE and (Path(where).is_dir() or (path.parent / CHECKPOINTS).is_dir())


def file_of(where: str) -> Path:
    """The file called `where`, in a run's folder called so, or of the recipe called so; UserError if there is none."""
    path = Path(where)
    for each in (path, path / CONFIG_FILE):
        if each.is_file():
            return each
    if where in recipe_names():
        return recipe_file(where)
    if path.is_dir():
        raise UserError(f"--config {where}: a folder without {CONFIG_FILE}; give a run's folder, or a file")
    raise UserError(f"--config {printable(where)}: no such file or recipe; the recipes are {', '.join(recipe_names())}")


def read_values(path: Path) -> dict[str, Any]:
    """Read a file in the format of its suffix; UserError if it is damaged."""
    if path.suffix == ".json":
        return read_object(path, "options", remedy="correct it")
    readers = {".toml": _read_toml, ".yaml": _read_yaml, ".yml": _read_yaml}
    if path.suffix not in readers:
        raise UserError(f"--config {path}: expected a file that ends in .toml, .yaml, .yml or .json")
    if path.stat().st_size > LARGEST_JSON:
        raise UserError(f"--config {path}: {path.stat().st_size:,} bytes are too many for a file of options")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8 ({error}); correct it") from None
    values = readers[path.suffix](text, path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected options with their values, found {shown(values)}; correct it")
    for name in values:
        if not isinstance(name, str):
            raise UserError(f"{path}: {shown(name)}: expected an option's name; correct it")
    return values


def _read_toml(text: str, path: Path) -> Any:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: {printable(str(error))}; correct it") from None


def _read_yaml(text: str, path: Path) -> Any:
    need(f"--config {path}", "yaml")
    import yaml

    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {printable(' '.join(str(error).split()))}; correct it") from None


def _of_command(values: Mapping[str, Any], command: Command, path: Path) -> Mapping[str, Any]:
    """The part of a file for the command: its table, or everything if there are no tables."""
    tables = {name: value for name, value in values.items() if isinstance(value, dict) and name != ABOUT}
    plain = {name: value for name, value in values.items() if name not in tables and name != ABOUT}
    if not tables:
        return plain
    known = [each.name for each in (*COMMANDS, *FOLDER_STEPS)]
    for name in tables:
        if not any(name == each or each.startswith(f"{name} ") for each in known):
            raise UserError(f"{path}: {printable(name)}: a table must have the name of a command; correct it")
    if plain:
        raise UserError(f"{path}: {printable(next(iter(plain)))}: not in the table of any command; move it into one")
    found: Any = values
    for word in command.name.split():
        found = found.get(word) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds options of {', '.join(map(printable, tables))}, none of {command.name}")
    return found


def _hint(command: Command, name: str) -> Any:
    group = next(group for group in command.groups for field in group.fields if field.name == name)
    return get_type_hints(group.kind, include_extras=True)[name]


def _nearest(name: str, command: Command) -> str:
    near = nearest(name, command.fields)
    return f"; the nearest is {near}" if near else ""
