"""The command `stablevm evaluate`: from a file of samples to a table and a JSON file."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stablevm.data.dataset import PreparedDataset
from stablevm.data.opening import open_dataset
from stablevm.errors import UserError
from stablevm.evaluation.config import EvaluateConfig
from stablevm.evaluation.digits_extractor import load_extractor
from stablevm.evaluation.judge import judge, result_rows
from stablevm.files import write_json


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Judge the samples, print the table, write the JSON file; returns what `judge` returned.

    Raises UserError, before anything is written, for input that `judge`, `read_samples`, `open_dataset` or
    `load_extractor` refuses.
    """
    images, labels = read_samples(config.samples)
    train, test = _splits(config.reference)
    results = judge(images, labels, test, train, load_extractor(config.extractor))
    output = config.output or config.samples.with_suffix(".json")
    write_json(output, {"samples": str(config.samples), "reference": str(config.reference), **results})
    print(text_table(result_rows(results)))
    print(f"results written to {output}")
    return results


def read_samples(path: Path) -> tuple[Tensor, Tensor]:
    """`arr_0` and `labels` of an .npz file, as they are; UserError when the file or one of the two is not there."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the .npz that generation wrote")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: not an .npz file, or cut short; give the .npz that generation wrote")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("arr_0", "labels") if name in file}
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); generate it again") from None
    for name, what in (("arr_0", "images, uint8 (N, H, W, 3)"), ("labels", "their classes, integers (N,)")):
        if name not in arrays:
            raise UserError(f"{path}: holds no {name} ({what}); give an .npz with both arr_0 and labels")
        if arrays[name].dtype.kind not in "biuf":
            raise UserError(f"{path}: {name} holds {arrays[name].dtype}, expected {what}")
    return torch.from_numpy(arrays["arr_0"]), torch.from_numpy(arrays["labels"])


def text_table(rows: Sequence[Sequence[str | float | int]]) -> str:
    """Columns aligned for a terminal; floats with four significant digits."""
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def _splits(reference: Path) -> tuple[PreparedDataset, PreparedDataset]:
    """Training and test split; UserError where the folder holds one data set that would pass for both."""
    train, test = open_dataset(reference, "train"), open_dataset(reference, "test")
    if train.folder == test.folder:
        raise UserError(
            f"--reference {reference}: one data set, not a folder with the splits train and test; give their folder"
        )
    return train, test
