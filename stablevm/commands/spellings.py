"""The spellings of a command's options, and the types of their values, as a shell and errors tell of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from stablevm.support.options import Group, is_positional


@dataclass(frozen=True)
class Option:
    """An option, or the place of a word without a name."""

    spelt: str  # --data-dir, or FOLDER
    hint: Any  # the type of its value

    @property
    def is_switch(self) -> bool:
        return plain(self.hint) is bool

    @property
    def may_be_path(self) -> bool:
        return plain(self.hint) in (Path, str)

    @property
    def takes_several(self) -> bool:
        return get_origin(plain(self.hint)) is tuple

    @property
    def value(self) -> Any:
        """The type of each value."""
        return get_args(plain(self.hint))[0] if self.takes_several else self.hint

    @property
    def words(self) -> tuple[str, ...]:
        """The words that are values, whatever else may be."""
        value = plain(self.value)
        parts = get_args(value) if is_union(value) else (value,)
        return tuple(word for part in map(plain, parts) if get_origin(part) is Literal for word in get_args(part))


def options_in(groups: Sequence[Group]) -> tuple[dict[str, Option], list[Option]]:
    """The options by each of their spellings with dashes, and the words without a name in their order."""
    named: dict[str, Option] = {}
    places: list[Option] = []
    for group in groups:
        hints = get_type_hints(group.kind, include_extras=True)
        for field in group.fields:
            hint, name = hints[field.name], f"--{field.name.replace('_', '-')}"
            if is_positional(field):
                places.append(Option(field.name.upper(), hint))
                continue
            option = Option(name, hint)
            notes = getattr(hint, "__metadata__", ())
            aliases = [alias for note in notes for alias in getattr(note, "aliases", None) or ()]
            has_opposite = option.is_switch and tyro.conf.FlagCreatePairsOff not in notes
            for spelling in (name, *aliases, *([f"--no-{name[2:]}"] if has_opposite else [])):
                named[spelling] = option
    return named, places


def plain(hint: Any) -> Any:
    """The type without annotations, and without None."""
    if get_origin(hint) is Annotated:
        return plain(get_args(hint)[0])
    parts = [part for part in get_args(hint) if part is not NoneType] if is_union(hint) else []
    return plain(parts[0]) if len(parts) == 1 else hint


def is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)
