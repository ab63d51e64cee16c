"""The list of recipes, and what each says of itself."""

import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stablevm.support.cards import card_of
from stablevm.support.errors import UserError
from stablevm.support.text import one_of, printable

FOLDER = Path(__file__).parent
ENDING = ".toml"
ABOUT = "about"


@dataclass(frozen=True, kw_only=True)
class About:
    """What a recipe says of itself."""

    title: str
    reaches: str  # the metric that is expected, and of what
    source: str  # who measured that, and when: a paper, or here
    note: str = ""


def recipe_names() -> list[str]:
    """The names of all recipes."""
    return sorted(path.name.removesuffix(ENDING) for path in FOLDER.glob(f"*{ENDING}"))


def recipe_file(name: str) -> Path:
    """The file of a recipe; UserError for a name that none has."""
    if name not in recipe_names():
        raise UserError(f"recipe {printable(name)}: expected {one_of(name, recipe_names())}")
    return FOLDER / f"{name}{ENDING}"


def recipe_options(name: str, command: str) -> dict[str, Any]:
    """The options that a recipe has for a command, as TOML has them."""
    return _content(name)[command]


def about(name: str) -> About:
    """What the recipe says of itself."""
    return card_of(About, _content(name).get(ABOUT), f"{recipe_file(name)}: {ABOUT}")


def listing() -> str:
    """A paragraph for each recipe, and how one is used."""
    use = "stablevm train --config NAME --exp-name RUN --data-dir DATA    (stablevm recipes NAME prints the file)"
    return "\n\n".join([*(_paragraph(name, about(name)) for name in recipe_names()), use])


def _content(name: str) -> dict[str, Any]:
    return tomllib.loads(recipe_file(name).read_text(encoding="utf-8"))


def _paragraph(name: str, what: About) -> str:
    facts = [what.title, f"Reaches: {what.reaches}", f"Source: {what.source}", what.note]
    return "\n".join([name, *(f"  {line}" for fact in facts if fact for line in textwrap.wrap(fact, 100))])
