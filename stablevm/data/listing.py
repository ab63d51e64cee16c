"""`dataset.json` of folders with one file per image, as EDM and REPA have it: names and classes."""

import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from stablevm.data.storage import Storage, is_inside
from stablevm.errors import UserError

LISTING_FILE = "dataset.json"


@dataclass(frozen=True)
class Listing:
    """`labels` are (name, class) in the order of names, None where the file has none."""

    labels: list[tuple[str, int]] | None
    class_names: tuple[str, ...] | None
    facts: dict[str, Any]  # what else the file says

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.labels or []]

    @property
    def known_class_names(self) -> tuple[str, ...]:
        """The classes' names, or their numbers."""
        return self.class_names or tuple(map(str, range(max(label for _, label in self.labels or [("", 0)]) + 1)))


def read_listing(storage: Storage) -> Listing:
    """Raises UserError, naming the first faulty entry, for what is no listing of labels."""
    path = f"{storage.root}/{LISTING_FILE}"
    try:
        with storage.open(LISTING_FILE) as file:
            values = json.loads(file.read())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; it says which image is of which class") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); restore or remake it") from None
    except (zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: can't be read ({error}); fetch or make the archive again") from None
    if not isinstance(values, dict) or "format_version" in values:
        raise UserError(f'{path}: expected {{"labels": [["NAME", CLASS], ...]}}, found another kind of file')
    rows = values.pop("labels", None)
    names = values.pop("class_names", None)
    if rows is None:
        return Listing(None, None, values)
    if not isinstance(rows, list) or not isinstance(names, list | None):
        raise UserError(f"{path}: its labels or class_names are no list; remake it")
    pairs = [_pair(path, row) for row in rows]
    repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if repeated or not pairs:
        raise UserError(f"{path}: {f'lists {repeated[0]} twice' if repeated else 'lists no images'}; remake it")
    largest = max(label for _, label in pairs)
    if names is not None and not (len(names) > largest and all(isinstance(name, str) for name in names)):
        raise UserError(f"{path}: {len(names)} class_names, but class {largest} occurs; remake it")
    return Listing(sorted(pairs), None if names is None else tuple(names), values)


def format_listing(labels: Iterable[tuple[str, int]], facts: dict[str, Any]) -> str:
    """The text of a dataset.json, with a line for each image."""
    rows = ",\n".join(json.dumps(list(row), ensure_ascii=False) for row in labels)
    others = ",\n".join(f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in facts.items())
    return f'{{"labels": [\n{rows}\n],\n{others}\n}}\n'


def _pair(path: str, row: Any) -> tuple[str, int]:
    match row:
        case [str(name), int(label)] if label >= 0 and is_inside(name) and not isinstance(label, bool):
            return name, label
    raise UserError(f'{path}: entry {json.dumps(row)[:80]}: expected ["RELATIVE/NAME", CLASS], the class 0 or more')
