"""Computing the features of many images once, with one process or several, and resuming after interruptions.

A set of images is divided into parts. The features of each part are a file in the cache, whose name depends on the
extractor's weights and the images. So processes share only the cache: part i belongs to process i modulo their number,
and the first process waits for the others.
"""

import hashlib
import os
import re
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from stablevm.evaluation.extractors import FeatureExtractor
from stablevm.evaluation.sources import ImageSource
from stablevm.support.bars import progress_bar
from stablevm.support.errors import UserError
from stablevm.support.files import is_temporary
from stablevm.support.processes import Process, wait_for_files
from stablevm.support.tensor_files import save_tensors

PART_LENGTH = 128  # images; an interruption loses at most this much work of each process
CACHE_VERSION = 2  # increased whenever the same images and weights give other features
SUFFIX = ".safetensors"
CACHED = re.compile(rf"[0-9a-f]{{2}}/[0-9a-f]{{32}}{re.escape(SUFFIX)}")  # names of our files in the cache folder
IN_USE_SECONDS = 3600.0  # files used within the last hour are kept, because another evaluation may need them


@dataclass(frozen=True)
class FeatureCache:
    """A cache folder whose files are complete or absent; they may be removed at any time between two commands."""

    folder: Path

    @classmethod
    def default_folder(cls) -> Path:
        """The user's cache folder, by the XDG base directory specification."""
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stablevm" / "features"

    def path(self, extractor: FeatureExtractor, key: str) -> Path:
        name = hashlib.sha256(f"{CACHE_VERSION} {extractor.fingerprint} {key}".encode()).hexdigest()
        return self.folder / name[:2] / f"{name[2:34]}{SUFFIX}"

    def sweep(self, gigabytes: float) -> None:
        """Remove temporary files, and the least recently used files until the rest fits in `gigabytes`.

        Files that do not belong to the cache are neither removed nor counted.
        """
        found = [(path, path.stat()) for path in self.folder.glob("*/*") if path.is_file() and self._is_ours(path)]
        idle = [(path, status) for path, status in found if time.time() - status.st_mtime > IN_USE_SECONDS]
        total = sum(status.st_size for _, status in found)
        for path, status in sorted(idle, key=lambda each: (not is_temporary(each[0]), each[1].st_mtime)):
            if is_temporary(path) or total > gigabytes * 1e9:
                path.unlink(missing_ok=True)
                total -= status.st_size

    def _is_ours(self, path: Path) -> bool:
        name = path.relative_to(self.folder).as_posix()
        return CACHED.fullmatch(name) is not None or (is_temporary(path) and path.suffix == SUFFIX)


@dataclass(frozen=True)
class Features:
    """The features of a set of images, as files of parts in the order of the images."""

    paths: Sequence[Path]

    def parts(self, name: str) -> Iterator[Tensor]:
        """Yield the features float32 (n, width) of each part."""
        for path in self.paths:
            part = _read(path, [name])
            if part is None:
                raise UserError(f"{path}: damaged; remove it and run the command again")
            yield part[name]

    def load(self, name: str) -> Tensor:
        """The features float32 (N, width) of all images."""
        return torch.cat(list(self.parts(name)))


def extract(
    source: ImageSource,
    extractor: FeatureExtractor,
    cache: FeatureCache,
    process: Process,
    *,
    batch_size: int,
    title: str,
) -> Features | None:
    """Compute the missing features of this process's parts; the first process waits for the others and returns all.

    Other processes return None.
    """
    indices = range(len(source))
    parts = [indices[start : start + PART_LENGTH] for start in indices[::PART_LENGTH]]
    paths: dict[range, Path] = {}
    mine = parts[process.rank :: process.world_size]
    with progress_bar(total=sum(map(len, mine)), desc=title, unit="image", show=process.is_first) as bar:
        for part in mine:
            paths[part] = cache.path(extractor, source.key(part))
            if _read(paths[part], extractor.feature_names) is not None:
                os.utime(paths[part])
                bar.update(len(part))
            else:
                _compute(source, extractor, part, paths[part], batch_size, bar)
    if not process.is_first:
        return None
    everything = [paths.get(part) or cache.path(extractor, source.key(part)) for part in parts]
    wait_for_files(everything, lambda missing: tqdm.write(f"{title}: waiting for {missing} parts of other processes"))
    return Features(everything)


def _compute(
    source: ImageSource, extractor: FeatureExtractor, part: range, path: Path, batch_size: int, bar: tqdm
) -> None:
    images = torch.from_numpy(source.images(part)).permute(0, 3, 1, 2)
    blocks = []
    for block in images.split(batch_size):
        features = extractor(block)
        blocks.append({name: features[name].float().cpu() for name in extractor.feature_names})
        bar.update(len(block))
    joined = {name: torch.cat([block[name] for block in blocks]) for name in extractor.feature_names}
    checksums = {name: _checksum(features) for name, features in joined.items()}
    save_tensors(path, joined, checksums)


def _read(path: Path, names: Sequence[str]) -> Mapping[str, Tensor] | None:
    """The features of a part by name; None if they are missing or do not match their checksums."""
    try:
        with safe_open(path, "pt") as file:
            checksums, found = file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except (FileNotFoundError, SafetensorError):
        return None
    return found if all(checksums.get(name) == _checksum(features) for name, features in found.items()) else None


def _checksum(features: Tensor) -> str:
    return f"{tuple(features.shape)} {features.dtype} {zlib.crc32(features.numpy().data):08x}"
