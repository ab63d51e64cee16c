"""Explanations for a folder that is not what a command needs: what is missing, or which folder to give instead."""

import os
from pathlib import Path

from stablevm.data.layouts import layout_of
from stablevm.data.listing import LISTING_FILE, WORK_FOLDER, kind_of_listing
from stablevm.data.manifest import MANIFEST_FILE
from stablevm.data.repa import IMAGES, LATENTS, is_repa_folder

_LOOKED_AT = 1000  # subfolders in which a data set is searched for


def why_no_dataset(folder: Path) -> str | None:
    """What to do about a folder that is not a prepared data set; None if its contents give no hint."""
    if is_unfinished(folder):
        return _unfinished(folder)
    if folder.name in (IMAGES, LATENTS) and is_repa_folder(folder.parent):
        return f"only the {folder.name} of a data set; give the folder above, {folder.parent}"
    kind = kind_of_listing(folder / LISTING_FILE)
    if kind == "latents":
        return f"holds latents: give a folder that has them in {LATENTS}, and their images in {IMAGES}"
    if kind == "images":
        return (
            f"holds images, not latents yet: run preprocessing/dataset_tools.py encode --source {folder} "
            f"--dest {folder.parent / LATENTS}, and give {folder.parent}"
        )
    inside = _folders(folder)
    for below in inside:
        if layout_of(below) is not None:
            return f"not a data set, but {below} is one; give that"
    for below in inside:
        if is_unfinished(below):
            return f"not a data set; {below} {_unfinished(below)}"
        if kind_of_listing(below / LISTING_FILE) in ("images", "latents"):
            return f"not a data set; {below} {why_no_dataset(below)}"
    return None


def why_no_source(folder: Path) -> str | None:
    """Why the images in a folder without a listing must not be used as a source; None if they may be.

    A half-finished conversion holds only part of the images, and its numbered folders would become classes.
    """
    if is_unfinished(folder):
        return _unfinished(folder)
    return next((f"{below} {_unfinished(below)}" for below in _folders(folder) if is_unfinished(below)), None)


def is_unfinished(folder: Path) -> bool:
    """Whether a preparation was started in this folder and has not finished."""
    return (folder / WORK_FOLDER).is_dir() and not (folder / MANIFEST_FILE).exists()


def _unfinished(folder: Path) -> str:
    if any(folder.glob("images-*.safetensors")):
        return (
            f"holds shards without latents: run stablevm prepare encode --data-dir {folder}, after convert is complete"
        )
    return f"its preparation has not finished ({LISTING_FILE} is missing): run the same command again"


def _folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry, _ in zip(entries, range(_LOOKED_AT), strict=False) if entry.is_dir()]
    return [folder / name for name in sorted(names)]
