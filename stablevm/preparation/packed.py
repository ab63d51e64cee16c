"""Sources whose files hold many images each, such as IDX: which files of a folder belong to which split of the data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stablevm.preparation.source import Source
from stablevm.support.errors import UserError, arg
from stablevm.support.options import some_of

Splits = dict[str, list[Path]]  # the files of images of each split
DEFAULT_SPLIT = "train"
_SUBFOLDER = "data"  # in which repositories of the Hugging Face hub keep their files
_LARGEST_FOLDER = 100_000  # files; a folder of more is one of single images


@dataclass(frozen=True)
class PackedKind:
    """A kind of files that hold many images each.

    splits: which of these files, sorted by name, hold images, by the name of their split; empty for files of another
    kind. UserError for files of this kind that must not be read. open: the source of the files of one split, below a
    folder; UserError for damaged ones.
    """

    splits: Callable[[Sequence[Path]], Splits]
    open: Callable[[Path, Sequence[Path]], Source]


def open_packed(root: Path, split: str | None) -> Source | None:
    """The source at `root`, a file or a folder of files of a kind in `PACKED`; None for anything else.

    split: the split to read; by default `train`, or the only one. UserError where it is not one of those found.
    """
    for files in _candidates(root):
        for kind in PACKED:
            splits = kind.splits(files)
            if splits:
                chosen = _choice(root, splits, split)
                source = kind.open(root, splits[chosen])
                others = [name for name in splits if name != chosen]
                if not others or split is not None:
                    return source
                line = f"{root}: takes the split {chosen} and leaves out {some_of(others)}; give {arg('split')}"
                return replace(source, warnings=(*source.warnings, line))
    return None


def _candidates(root: Path) -> list[list[Path]]:
    """Lists of files that are looked at, in this order; the first with a known kind is taken."""
    if root.is_file():
        return [[root]]
    folders = [folder for folder in (root, root / _SUBFOLDER) if folder.is_dir()]
    return [[path for path in sorted(folder.iterdir()) if path.is_file()] for folder in folders if _is_small(folder)]


def _is_small(folder: Path) -> bool:
    return sum(1 for _, _ in zip(folder.iterdir(), range(_LARGEST_FOLDER), strict=False)) < _LARGEST_FOLDER


def _choice(root: Path, splits: Splits, split: str | None) -> str:
    if split is not None and split not in splits:
        raise UserError(f"{arg('split')} {split}: {root} has {some_of(list(splits))}; give one of these")
    if split is not None or len(splits) == 1:
        return split or next(iter(splits))
    if DEFAULT_SPLIT not in splits:
        raise UserError(f"{root}: holds the splits {some_of(list(splits))}; give one as {arg('split')}")
    return DEFAULT_SPLIT


def _registered() -> list[PackedKind]:
    from stablevm.preparation import cifar, idx, parquet, tars

    return [
        PackedKind(idx.splits_of, idx.open_idx),
        PackedKind(cifar.splits_of, cifar.open_cifar),
        PackedKind(parquet.splits_of, parquet.open_parquet),
        PackedKind(tars.splits_of, tars.open_tars),
    ]


# The first kind that finds its files is used.
PACKED = _registered()
