"""The command `stablevm data verify`, which rereads a prepared data set and lists its faults."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from stablevm.data.dataset import PreparedDataset
from stablevm.data.layouts import has_dataset, layout_of
from stablevm.data.manifest import ShardFile
from stablevm.data.opening import open_dataset
from stablevm.data.repa import IMAGES, LATENTS
from stablevm.data.workers import Calls
from stablevm.preparation.config import VerifyConfig
from stablevm.support.bars import progress_bar
from stablevm.support.errors import UserError

DAMAGED_STATUS = 1
_BATCH = 256  # rows checked at a time
_SHOWN = 100  # faults that are listed; further ones are only counted


def verify(config: VerifyConfig) -> int:
    """Print a line for each fault and a summary, and return the exit status."""
    config.validate()
    status = 0
    for folder in split_folders(config.data_dir):
        count = 0
        for count, fault in enumerate(_faults(folder, config.num_workers), start=1):
            if count <= _SHOWN:
                tqdm.write(fault)
        if count > _SHOWN:
            print(f"... and {count - _SHOWN:,} more")
        print(f"{folder}: {f'{count:,} fault(s)' if count else 'intact'}")
        status = status or (DAMAGED_STATUS if count else 0)
    return status


def split_folders(folder: Path) -> list[Path]:
    """The folder itself, or its splits if those are the data sets."""
    if has_dataset(folder) or not folder.is_dir():
        return [folder]
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and path.name not in (IMAGES, LATENTS))
    return [path for path in inside if has_dataset(path)] or [folder]


def _faults(folder: Path, workers: int) -> Iterator[str]:
    try:
        layout = layout_of(folder)
        if files := () if layout is None else layout.files(folder):
            damaged = list(_damaged_files(folder, files, workers))
            yield from damaged
            if damaged:
                return  # the contents of a damaged file mean nothing
        dataset = open_dataset(folder)
        if dataset.has_images:
            dataset.check_images()
        yield from _whole(dataset)
    except UserError as error:
        yield str(error)
        return
    check = partial(_check_rows, dataset)
    batches = [range(start, min(start + _BATCH, len(dataset))) for start in range(0, len(dataset), _BATCH)]
    with progress_bar(total=len(dataset), desc="rows", unit="image") as bar:
        for rows, faults in zip(batches, Calls(check, batches, workers), strict=True):
            yield from faults
            bar.update(len(rows))


def _damaged_files(folder: Path, files: Sequence[ShardFile], workers: int) -> Iterator[str]:
    intact = Calls(partial(ShardFile.is_intact, folder=folder), files, workers)
    with progress_bar(total=sum(file.size for file in files), desc="files", unit="B", unit_scale=True) as bar:
        for file, is_intact in zip(files, intact, strict=True):
            bar.update(file.size)
            if not is_intact:
                yield f"{folder / file.name}: missing, or not as it was written (its checksum differs)"


def _whole(dataset: PreparedDataset) -> Iterator[str]:
    """The faults of the set as a whole."""
    labels = dataset.labels()  # checks them against the counts
    if len(labels) != len(dataset):
        yield f"{dataset.folder}: {len(labels):,} labels for {len(dataset):,} rows"
    repeated = [number for number, count in Counter(dataset.index().tolist()).items() if count > 1]
    if repeated:
        yield f"{dataset.folder}: {len(repeated):,} images are in it twice or more, the first is number {repeated[0]}"
    empty = np.flatnonzero(np.bincount(labels.numpy(), minlength=dataset.num_classes) == 0)
    if len(empty):
        yield f"{dataset.folder}: {len(empty)} classes have no image, the first is {dataset.class_names[empty[0]]}"
    yield from dataset.faults()


def _check_rows(dataset: PreparedDataset, rows: range) -> list[str]:
    """The faults of single rows; if rows can't be read together, each is read on its own."""
    faults: list[str] = []
    readers: list[Callable[[range], object]] = [partial(_check_moments, dataset, faults)]
    if dataset.has_images:
        readers.append(dataset.images)
    for read in readers:
        try:
            read(rows)
        except (UserError, OSError):
            for row in rows:
                try:
                    read(range(row, row + 1))
                except (UserError, OSError) as error:
                    faults.append(str(error))
    return list(dict.fromkeys(faults))


def _check_moments(dataset: PreparedDataset, faults: list[str], rows: range) -> None:
    named = {"moments": dataset.moments(rows)}
    if dataset.has_flips:
        named["moments_flip"] = dataset.moments_flip(rows)
    for name, moments in named.items():
        _, deviation = dataset.latent.split(moments)
        kinds = [("not finite", ~moments.isfinite())]
        if deviation is not None:
            kinds.append(("a negative standard deviation", deviation < 0))
        for what, bad in kinds:
            for row in bad.flatten(1).any(1).nonzero().flatten().tolist():
                faults.append(f"{dataset.folder}: {name} of row {rows[row]}: {what}")
