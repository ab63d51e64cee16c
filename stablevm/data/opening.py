"""`open_dataset` opens a prepared data set of any layout."""

from pathlib import Path

from stablevm.data.dataset import PreparedDataset
from stablevm.data.folders import why_no_dataset
from stablevm.data.layouts import has_dataset, layout_of
from stablevm.data.shards import ShardDataset
from stablevm.support.errors import UserError, arg


def open_dataset(path: str | Path, split: str = "train") -> PreparedDataset:
    """Open the data set in `path`, or in `path`/`split` if `path` itself is not one.

    Raises UserError if there is no data set, with a hint where possible, or if shards are missing or have changed in
    size.
    """
    folder = dataset_folder(path, split)
    layout = layout_of(folder)
    if layout is not None:
        return layout.open(folder)
    reason = why_no_dataset(folder) if folder.is_dir() else None
    if reason is not None:
        raise UserError(f"{arg('folder')} {folder}: {reason}")
    return ShardDataset(folder)


def dataset_folder(path: str | Path, split: str) -> Path:
    """The folder `path`/`split` if it exists and `path` itself is not a data set; otherwise `path`."""
    path = Path(path)
    if has_dataset(path) or not (path / split).is_dir():
        return path
    return path / split
