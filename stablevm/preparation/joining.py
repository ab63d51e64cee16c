"""Jobs whose parts become shards: each part is a small file, and the parts of a group are joined when complete."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from stablevm.data.manifest import ShardFile, ShardKind
from stablevm.data.streaming import StreamedTensor, join_files, write_streamed
from stablevm.data.writer import shard_name
from stablevm.preparation.outcome import REDO, Problem
from stablevm.preparation.work import Job
from stablevm.support.cards import card_of, read_card
from stablevm.support.errors import UserError
from stablevm.support.files import parse_json, write_json

# Images of the source per shard; up to a third of them may be unreadable before a shard has fewer than 8,192 rows.
SHARD_LENGTH = 12_288


@dataclass(frozen=True)
class ShardRecord:
    """The record of a finished shard; one without rows has no files."""

    rows: int
    labels: list[int]
    files: dict[ShardKind, ShardFile]
    problems: list[Problem]

    @classmethod
    def read(cls, path: Path) -> "ShardRecord":
        return read_card(path, cls, "record of a shard", remedy="remove the folder and start over")

    @classmethod
    def read_all(cls, folder: Path) -> list["ShardRecord"]:
        """Read all records in a job's folder, in order."""
        return [cls.read(path) for path in sorted(folder.glob("shard-*.json"))]


@dataclass(frozen=True)
class ShardJob:
    """A job in which each group of parts becomes the files of one shard."""

    job: Job
    dest: Path
    kinds: Mapping[ShardKind, tuple[str, ...]]  # the files of a shard, and the tensors in each

    def is_done(self, names: set[str], part: range) -> bool:
        """Whether a part is done: its file, or the shard that it became part of, exists."""
        return self.job.path(part).name in names or self._record(self._number(part)).name in names

    def write(self, part: range, tensors: Mapping[str, Tensor], problems: list[dict[str, Any]]) -> None:
        """Save a part with any number of rows: all tensors of the shard's files, `labels` and `index`."""
        streamed = {name: StreamedTensor.of(tensor.numpy()) for name, tensor in tensors.items()}
        write_streamed(self.job.path(part), streamed, {"problems": json.dumps(problems)})
        self.join(wait=False)

    def join(self, *, wait: bool) -> None:
        """Join the shards of this process: as many as have all their parts, or with `wait` all of them."""
        process = self.job.process
        for number in range(process.rank, len(self.job.groups), process.world_size):
            paths = [self.job.path(part) for part in self.job.parts(self.job.groups[number])]
            if self._record(number).exists():
                _remove(paths)  # the process may have been killed before this
                continue
            if wait:
                self.job.wait(paths)
            elif not all(path.exists() for path in paths):
                return
            self._join(number, paths)

    def records(self) -> list[ShardRecord]:
        """The records of all shards, when every process has made its own."""
        paths = list(map(self._record, range(len(self.job.groups))))
        self.job.wait(paths)
        return list(map(ShardRecord.read, paths))

    def _join(self, number: int, parts: list[Path]) -> None:
        labels: list[int] = []
        problems: list[Problem] = []
        for path in parts:
            try:
                with safe_open(path, framework="pt") as part:
                    labels += part.get_tensor("labels").tolist()
                    text = (part.metadata() or {}).get("problems", "")
            except SafetensorError as error:
                raise UserError(f"{path}: damaged ({error}); {REDO}") from None
            problems += card_of(list[Problem], parse_json(text, str(path)), str(path), remedy=REDO)
        written: dict[ShardKind, ShardFile] = {}
        for kind, names in self.kinds.items() if labels else ():
            target = self.dest / shard_name(kind, number)
            join_files(parts, names, target)
            written[kind] = ShardFile.of(target)
        write_json(self._record(number), asdict(ShardRecord(len(labels), labels, written, problems)))
        _remove(parts)

    def _record(self, number: int) -> Path:
        return self.job.folder / f"shard-{number:05d}.json"

    def _number(self, part: range) -> int:
        return next(number for number, group in enumerate(self.job.groups) if part.start in group)


def _remove(parts: list[Path]) -> None:
    for path in parts:
        path.unlink(missing_ok=True)


def shard_groups(count: int) -> list[range]:
    """The images 0 to `count - 1` of a source, divided into those of each shard."""
    return [range(start, min(start + SHARD_LENGTH, count)) for start in range(0, count, SHARD_LENGTH)]
