"""A data set together with its mirror images, which are rows like any others."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stablevm.data.dataset import Fingerprint, PreparedDataset, Rows, checked_rows
from stablevm.support.errors import UserError, arg


class MirroredDataset(PreparedDataset):
    """A data set of 2N rows: 0 to N - 1 are those of `plain`, and row N + i is row i mirrored from left to right.

    UserError if `plain` was prepared without the latents of mirrored images.
    """

    has_flips = False

    def __init__(self, plain: PreparedDataset) -> None:
        if not plain.has_flips:
            raise UserError(
                f"{arg('folder')} {plain.folder}: holds no latents of mirrored images; prepare shards with them "
                f"(stablevm prepare convert into another folder, then stablevm prepare encode --flip), or "
                f"train without {arg('horizontal_flips')}"
            )
        self.plain = plain
        self.folder: Path = plain.folder
        self.layout = plain.layout
        self.latent, self.class_names = plain.latent, plain.class_names
        self.resolution, self.has_images = plain.resolution, plain.has_images

    def __len__(self) -> int:
        return 2 * len(self.plain)

    def labels(self) -> Tensor:
        return self.plain.labels().repeat(2)

    def index(self) -> Tensor:
        return self.plain.index().repeat(2)

    def moments(self, rows: Rows) -> Tensor:
        return self._read(rows, self.plain.moments, self.plain.moments_flip)

    def moments_flip(self, rows: Rows) -> Tensor:
        return self._read(rows, self.plain.moments_flip, self.plain.moments)

    def images(self, rows: Rows) -> Tensor:
        return self._read(rows, self.plain.images, lambda chosen: self.plain.images(chosen).flip(-1))

    def describe(self, row: int) -> str:
        count = len(self.plain)
        return (
            self.plain.describe(row)
            if row < count
            else f"row {row}, the mirror image of {self.plain.describe(row - count)}"
        )

    def fingerprint(self, *, with_images: bool) -> Fingerprint:
        """The fingerprint of the plain set, which holds the mirrored latents too."""
        return self.plain.fingerprint(with_images=with_images)

    def check_images(self) -> None:
        self.plain.check_images()

    def _read(self, rows: Rows, plain: Callable[[Rows], Tensor], mirrored: Callable[[Rows], Tensor]) -> Tensor:
        rows = checked_rows(rows, len(self))
        is_mirrored = rows >= len(self.plain)
        first, second = plain(rows[~is_mirrored]), mirrored(rows[is_mirrored] - len(self.plain))
        values = torch.empty((len(rows), *first.shape[1:]), dtype=first.dtype)
        values[torch.from_numpy(np.flatnonzero(~is_mirrored))] = first
        values[torch.from_numpy(np.flatnonzero(is_mirrored))] = second
        return values
