"""`dataset.json` of folders with one file per image, in the format of EDM and REPA: names and classes."""

import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stablevm.data.storage import FolderStorage, Storage, ZipStorage, is_inside, plain_name
from stablevm.support.errors import UserError
from stablevm.support.files import parse_json

LISTING_FILE = "dataset.json"
WORK_FOLDER = ".prepare"  # in the folder of a result, until the result is complete
# Without names, the largest label gives the number of classes; dates or identifiers as labels would give millions. Up
# to this many are accepted, and more only if there are as many images.
MAX_UNNAMED_CLASSES = 100_000
# A member of an archive may unpack to a thousand times its size. A listing too large for the archive's number of files
# is refused; an entry has up to 300 characters or so, and escapes.
_BYTES_PER_FILE, _BYTES_AT_LEAST = 2_000, 2**24
_BEGINNING = 4096
_LARGEST_FILE = 2**31  # bytes of a listing in a folder: enough for 30 million images


@dataclass(frozen=True)
class Listing:
    """The contents of a `dataset.json`."""

    labels: list[tuple[str, int]] | None  # (name, class), sorted by name; None if the file has "labels": null
    class_names: tuple[str, ...] | None
    facts: dict[str, Any]  # all other entries of the file

    @property
    def names(self) -> list[str]:
        """The names of the images, sorted."""
        return [name for name, _ in self.labels or []]

    @property
    def known_class_names(self) -> tuple[str, ...]:
        """The names of the classes, or their numbers if they have none."""
        return self.class_names or tuple(map(str, range(max(label for _, label in self.labels or [("", 0)]) + 1)))


def read_listing(storage: Storage) -> Listing:
    """Read the listing of a folder or archive; UserError, naming the first faulty entry, if it is not a valid one."""
    path = f"{storage.root}/{LISTING_FILE}"
    values = _parsed(storage, path)
    if not isinstance(values, dict) or "format_version" in values or "labels" not in values:
        what = "a prepared data set in shards" if _is_manifest(values) else "another kind of file"
        raise UserError(f'{path}: expected {{"labels": [["NAME", CLASS], ...]}}, found {what}')
    rows = values.pop("labels")
    names = values.pop("class_names", None)
    if rows is None:
        return Listing(None, None, values)
    if not isinstance(rows, list) or not isinstance(names, list | None):
        raise UserError(f"{path}: its labels or class_names are not a list; remake it")
    pairs = [_pair(path, row, storage) for row in rows]
    repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if repeated or not pairs:
        raise UserError(f"{path}: {f'lists {repeated[0]} twice' if repeated else 'lists no images'}; remake it")
    largest = max(label for _, label in pairs)
    if names is not None and not (len(names) > largest and all(isinstance(name, str) for name in names)):
        raise UserError(f"{path}: {len(names)} class_names, but class {largest} occurs; remake it")
    if names is None and largest >= max(MAX_UNNAMED_CLASSES, len(pairs)):
        raise UserError(
            f"{path}: class {largest} would make {largest + 1:,} classes for {len(pairs):,} images; number the "
            "classes from 0 without gaps"
        )
    return Listing(sorted(pairs), None if names is None else tuple(names), values)


def kind_of_listing(path: Path) -> Literal["images", "latents", "shards", None]:
    """The kind of a dataset.json, judging from its beginning; None for another file, or if there is none."""
    try:
        with path.open("rb") as file:
            start = file.read(_BEGINNING)
    except OSError:
        return None
    if b'"format_version"' in start:
        return "shards"
    if b'"labels"' not in start:
        return None
    return "latents" if b'.npy"' in start else "images"


def format_listing(labels: Iterable[tuple[str, int]], facts: dict[str, Any]) -> str:
    """The text of a dataset.json, with one line for each image."""
    rows = ",\n".join(json.dumps(list(row), ensure_ascii=False) for row in labels)
    others = ",\n".join(f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in facts.items())
    return f'{{"labels": [\n{rows}\n],\n{others}\n}}\n'


def _parsed(storage: Storage, path: str) -> Any:
    limit = _LARGEST_FILE
    if isinstance(storage, ZipStorage):
        limit = _BYTES_AT_LEAST + _BYTES_PER_FILE * storage.count
    try:
        with storage.open(LISTING_FILE) as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise UserError(f"{path}: more than {limit:,} bytes, too large for a listing of its images; remake it")
        return parse_json(content, path)
    except FileNotFoundError:
        if isinstance(storage, FolderStorage) and (storage.root / WORK_FOLDER).is_dir():
            raise UserError(
                f"{path}: missing, because the preparation of {storage.root} has not finished: run the same command "
                "again"
            ) from None
        raise UserError(f"{path}: no such file; it must list the class of each image") from None
    except (zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: can't be read ({error}); download or make the archive again") from None


def _is_manifest(values: Any) -> bool:
    return isinstance(values, dict) and "shards" in values


def _pair(path: str, row: Any, storage: Storage) -> tuple[str, int]:
    match row:
        case [str(name), int(label)] if label >= 0 and not isinstance(label, bool):
            name = _known_name(name, storage)
            if is_inside(name):
                return name, label
    raise UserError(f'{path}: entry {json.dumps(row)[:80]}: expected ["RELATIVE/NAME", CLASS], the class 0 or more')


def _known_name(name: str, storage: Storage) -> str:
    """The file's name in the storage; other systems may write `a\\b.png` or `./a/b.png` for `a/b.png`."""
    plain = plain_name(name)
    if plain == name or (is_inside(name) and "\\" in name and storage.exists(name)):
        return name
    return plain
