"""Reading JSON files, such as a checkpoint's card, into dataclasses, with every type checked.

Files can be damaged, edited by hand, or come from strangers. Reading one gives either what the dataclass declares, or
an error of one line that names the file, the field, its value and what was expected.
"""

import math
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from stablevm.support.errors import UserError
from stablevm.support.files import LARGEST_JSON, read_json
from stablevm.support.text import shown

INTEGERS = range(-(2**63), 2**63)  # those that fit an int64
_NAMES: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    type(None): "null",
}

T = TypeVar("T")
KIND = "kind"  # the field of an object that names its dataclass


@dataclass(frozen=True)
class ByKind:
    """The note in `Annotated[Base, ByKind(classes, default)]`: the dataclass is the one that the object's `kind` names.

    default: the kind of objects without one, as in files of older versions.
    """

    classes: Callable[[], Mapping[str, type]]
    default: str

    def convert(self, value: Any, where: str) -> Any:
        """Convert an object to the dataclass that it names."""
        classes = self.classes()
        kind = value.get(KIND, self.default) if isinstance(value, dict) else self.default
        if not isinstance(kind, str) or kind not in classes:
            raise _MismatchError(_inside(where, KIND), f"{shown(kind)}, expected one of {', '.join(classes)}")
        if isinstance(value, dict):
            value = {name: each for name, each in value.items() if name != KIND}
        return _convert(classes[kind], value, where)


class _MismatchError(Exception):
    """Raised for a value of the wrong type: where it is in the file, and what is wrong with it."""

    def __init__(self, where: str, fault: str) -> None:
        super().__init__(where, fault)
        self.where = where
        self.fault = fault


def read_card(
    path: str | Path,
    kind: type[T],
    what: str,
    *,
    version: int | None = None,
    finite: bool = True,
    remedy: str = "restore or remake it",
) -> T:
    """Read a JSON file into the dataclass `kind`, with the checks of `card_of`.

    what: what the file is, for the beginning of error messages. remedy: what to do, for their end. version: if given,
    the file's `format_version` must equal it. Raises UserError also if the file is missing or not JSON.
    """
    values = read_object(path, what, remedy=remedy)
    if version is not None:
        check_version(values, version, f"{what}: {path}")
        values = {name: value for name, value in values.items() if name != "format_version"}
    return card_of(kind, values, f"{what}: {path}", finite=finite, remedy=remedy)


def read_object(
    path: str | Path, what: str, *, remedy: str = "restore or remake it", largest: int = LARGEST_JSON
) -> dict[str, Any]:
    """Read a JSON file that holds an object, without checking its fields; UserError if it is missing or damaged."""
    values = read_json(path, what, largest=largest)
    if not isinstance(values, dict):
        raise UserError(f"{what}: {path}: expected an object, found {shown(values)}; {remedy}")
    return values


def entry_of(path: Path, name: str) -> dict[str, Any] | None:
    """The object called `name` in a JSON file; None where the file is damaged, or was made by something else."""
    try:
        found = read_object(path, name).get(name)
    except UserError:
        return None
    return found if isinstance(found, dict) else None


def check_version(values: Mapping[str, Any], version: int, where: str) -> None:
    """Raise UserError unless the file's `format_version` is `version`."""
    found = values.get("format_version")
    if type(found) is not int or found != version:
        raise UserError(
            f"{where}: has format version {shown(found)}, this program reads {version}; "
            "use the version that wrote it, or make it again"
        )


def card_of(kind: type[T], values: Any, where: str, *, finite: bool = True, remedy: str = "restore or remake it") -> T:
    """Convert values from JSON to the dataclass or other type `kind`, including everything inside.

    Lists become tuples, text becomes a path, and integers become floats where these are declared; nothing else is
    converted. A field with a default may be missing, as in files of older versions. An unknown field is an error, and
    so is NaN or infinity anywhere if `finite`. Raises UserError, which begins with `where` and names the field; a
    ValueError from `__post_init__` becomes one too.
    """
    try:
        if finite:
            _check_finite(values, "")
        return cast(T, _convert(kind, values, ""))
    except _MismatchError as error:
        place = f"{where}: {error.where}" if error.where else where
        raise UserError(f"{place}: {error.fault}; {remedy}") from None


def _check_finite(value: Any, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise _mismatch(float, value, where)
    if isinstance(value, dict):
        for name, each in value.items():
            _check_finite(each, _inside(where, name))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            _check_finite(each, f"{where}[{number}]")


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if origin is Annotated:
        for note in get_args(hint)[1:]:
            if isinstance(note, ByKind):
                return note.convert(value, where)
        return _convert(get_args(hint)[0], value, where)
    if hint is Any or hint is object:
        return value
    if is_dataclass(hint):
        return _dataclass(cast(type, hint), value, where)
    if origin in (Union, types.UnionType):
        return _first_that_fits(get_args(hint), value, where)
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in get_args(hint)):
            return value
        raise _mismatch(hint, value, where)
    if origin in (list, tuple):
        return _sequence(hint, value, where)
    if origin is dict:
        return _mapping(hint, value, where)
    return _plain(hint, value, where)


def _plain(hint: Any, value: Any, where: str) -> Any:
    match value:
        case bool() | None:
            fits = hint is type(value)
        case int():
            fits = hint in (int, float) and value in INTEGERS
        case float():
            fits = hint is float
        case str():
            fits = hint in (str, Path) and _is_text(value) and not (hint is Path and ("\0" in value or not value))
        case _:
            fits = False
    if not fits:
        raise _mismatch(hint, value, where)
    return hint(value) if hint in (float, Path) else value


def _is_text(value: str) -> bool:
    """Whether the text can be encoded: JSON may hold lone surrogates, of which only those for undecodable bytes can."""
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _dataclass(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _mismatch(kind, value, where)
    known, hints = (
        {field.name: field for field in fields(kind) if field.init},
        get_type_hints(kind, include_extras=True),
    )
    if unknown := [name for name in value if name not in known]:
        raise _MismatchError(_inside(where, unknown[0]), "unknown to this version")
    absent = [name for name in known if name not in value]
    for name in absent:
        if known[name].default is MISSING and known[name].default_factory is MISSING:
            raise _MismatchError(_inside(where, name), "missing")
    converted = {name: _convert(hints[name], each, _inside(where, name)) for name, each in value.items()}
    try:
        return kind(**converted)
    except ValueError as error:  # from __post_init__, which knows the ranges
        raise _MismatchError(where, str(error)) from None


def _first_that_fits(hints: Iterable[Any], value: Any, where: str) -> Any:
    faults = []
    for hint in hints:
        try:
            return _convert(hint, value, where)
        except _MismatchError as error:
            faults.append((hint, error))
    containers = [
        error for hint, error in faults if error.where != where or (is_dataclass(hint) and isinstance(value, dict))
    ]
    if containers:  # the value has this type's form, but something inside it is wrong
        raise containers[0]
    expected = words_for(Union[tuple(hint for hint, _ in faults)])  # noqa: UP007
    raise _MismatchError(where, f"{shown(value)}, expected {expected}")


def _sequence(hint: Any, value: Any, where: str) -> Any:
    if not isinstance(value, list | tuple):
        raise _mismatch(hint, value, where)
    arguments = get_args(hint)
    if get_origin(hint) is tuple and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise _mismatch(hint, value, where)
        elements = arguments
    else:
        elements = (arguments[0],) * len(value)
    converted = [
        _convert(element, each, f"{where}[{number}]")
        for number, (element, each) in enumerate(zip(elements, value, strict=True))
    ]
    return tuple(converted) if get_origin(hint) is tuple else converted


def _mapping(hint: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _mismatch(hint, value, where)
    of_key, of_value = get_args(hint)
    return {
        _convert(of_key, key, _inside(where, key)): _convert(of_value, each, _inside(where, key))
        for key, each in value.items()
    }


def _inside(where: str, name: str) -> str:
    return f"{where}.{shown(name, quoted=False)}" if where else shown(name, quoted=False)


def _mismatch(hint: Any, value: Any, where: str) -> _MismatchError:
    return _MismatchError(where, f"{shown(value)}, expected {words_for(hint)}")


def words_for(hint: Any) -> str:
    """The plain English name for values of the type; that None is allowed too is left out."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return words_for(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(words_for(each) for each in arguments if each is not type(None))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else str(arguments[0])
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)}"
    return _NAMES.get(hint) or ("a list" if origin in (list, tuple) else "an object")
