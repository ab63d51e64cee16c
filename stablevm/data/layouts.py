"""The list of layouts of prepared data, in the order in which they are tried."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stablevm.data.dataset import PreparedDataset
from stablevm.data.lightning_dit import LightningDiTDataset, is_lightning_dit_folder
from stablevm.data.listing import kind_of_listing
from stablevm.data.manifest import MANIFEST_FILE, Manifest, ShardFile
from stablevm.data.repa import RepaDataset, is_repa_folder
from stablevm.data.shards import ShardDataset


@dataclass(frozen=True)
class Layout:
    """A layout of prepared data on disk."""

    holds: Callable[[Path], bool]  # whether the folder is a data set of this layout
    open: Callable[[Path], PreparedDataset]
    files: Callable[[Path], Sequence[ShardFile]] = lambda folder: ()  # those whose checksums the folder records


def _holds_shards(folder: Path) -> bool:
    return kind_of_listing(folder / MANIFEST_FILE) == "shards"


def _shard_files(folder: Path) -> Sequence[ShardFile]:
    return Manifest.read(folder).files()


# The first layout that fits a folder is used.
LAYOUTS = [
    Layout(is_repa_folder, RepaDataset),
    Layout(_holds_shards, ShardDataset, _shard_files),
    Layout(is_lightning_dit_folder, LightningDiTDataset),
]


def layout_of(folder: Path) -> Layout | None:
    """The layout of the data set in the folder; None if it holds none."""
    return next((layout for layout in LAYOUTS if layout.holds(folder)), None)


def has_dataset(folder: Path) -> bool:
    """Whether the folder is a data set, even a damaged one."""
    return (folder / MANIFEST_FILE).is_file() or layout_of(folder) is not None
