"""Stored tokens of a frozen encoder: files of a fixed number of rows, and a card that tells of what they are."""

import bisect
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from stablevm.data.dataset import Fingerprint, PreparedDataset, Rows, checked_rows
from stablevm.data.tensor_file import TensorFile, bytes_of, opener
from stablevm.support.cards import read_card
from stablevm.support.errors import UserError, arg
from stablevm.support.files import write_json

CARD_FILE, TENSOR = "features.json", "tokens"
FORMAT_VERSION = 1
FILE_LENGTH = 512  # rows of a file, except the last
_REMEDY = "make them again with stablevm prepare features"


@dataclass(frozen=True)
class FeatureCard:
    """What stored tokens are of; written last, so that a folder without it is incomplete."""

    encoder: str  # its name, as in training
    weights: str  # SHA-256 of the encoder's parameters and buffers
    resize: str
    precision: str
    rows: int
    grid_size: int  # tokens along a side
    dim: int  # of a token
    flips: bool  # whether the second half of the rows are mirror images
    data: Fingerprint

    def write(self, folder: Path) -> None:
        write_json(folder / CARD_FILE, {"format_version": FORMAT_VERSION, **asdict(self)})


def file_name(start: int) -> str:
    """The file whose first row is `start`."""
    return f"tokens-{start:09d}.safetensors"


class StoredFeatures:
    """The tokens of all rows of a data set, read by row; it can be sent to other processes."""

    def __init__(self, folder: Path) -> None:
        """UserError for a folder that is incomplete or damaged."""
        self.folder = folder
        if not (folder / CARD_FILE).is_file():
            raise UserError(f"{arg('features_dir')} {folder}: holds no complete features; {_REMEDY}")
        self.card = read_card(
            folder / CARD_FILE, FeatureCard, arg("features_dir"), version=FORMAT_VERSION, remedy=_REMEDY
        )
        self._starts = list(range(0, self.card.rows, FILE_LENGTH))
        self._open()

    def _open(self) -> None:
        shape, open_file = (self.card.grid_size**2, self.card.dim), opener()
        self._files = []
        for start in self._starts:
            path = self.folder / file_name(start)
            count = min(FILE_LENGTH, self.card.rows - start)
            try:
                file = TensorFile(str(path), path.stat().st_size, open_file)
                is_right = file.shapes.get(TENSOR) == (count, *shape) and file.dtypes[TENSOR] == np.float16
            except (OSError, SafetensorError, ValueError, KeyError) as error:
                raise UserError(f"{path}: missing or damaged ({error}); {_REMEDY}") from None
            if not is_right:
                raise UserError(f"{path}: expected {count:,} rows of {shape[0]} x {shape[1]} float16; {_REMEDY}")
            self._files.append(file)

    def __call__(self, rows: Rows) -> Tensor:
        """The tokens (n, T, D), float16, of these rows."""
        numbers = checked_rows(rows, self.card.rows)
        values = np.empty((len(numbers), self.card.grid_size**2, self.card.dim), np.float16)
        for value, row in zip(values, numbers.tolist(), strict=True):
            file = bisect.bisect_right(self._starts, row) - 1
            self._files[file].read_into(TENSOR, [(bytes_of(value), (row - self._starts[file]) * value.nbytes)])
        return torch.from_numpy(values)

    def check(self, dataset: PreparedDataset, rows: int, expected: dict[str, object]) -> None:
        """Raise UserError unless the tokens are of these images, of as many rows, and have the expected facts.

        Latents do not matter: data sets of the same images in different autoencoders' latents share their tokens.
        """
        difference = dataset.fingerprint(with_images=True).difference_of_images(self.card.data)
        if difference is not None:
            raise UserError(f"{arg('features_dir')} {self.folder}: of another data set ({difference}); {_REMEDY}")
        for name, value in expected.items():
            if getattr(self.card, name) != value:
                raise UserError(
                    f"{arg('features_dir')} {self.folder}: made with {name.replace('_', ' ')} "
                    f"{getattr(self.card, name)}, this run has {value}; {_REMEDY}"
                )
        if rows > self.card.rows:
            raise UserError(
                f"{arg('features_dir')} {self.folder}: holds none of mirrored images; make them again with "
                "stablevm prepare features --flip"
            )

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_files"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._open()
