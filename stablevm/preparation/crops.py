"""Cropping the images of a source to the size of the result, for `convert` in any layout."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stablevm.preparation.config import ConvertConfig
from stablevm.preparation.outcome import Problem
from stablevm.preparation.pictures import TRANSFORMS, BadPictureError, Size, pixels, read_picture, result_size
from stablevm.preparation.source import Source, printable
from stablevm.support.errors import UserError


@dataclass
class Cropped:
    """The cropped images of one request, and the problems of the others."""

    indices: list[int] = field(default_factory=list)
    images: list[NDArray[np.uint8]] = field(default_factory=list)  # (H, W, 3) each
    problems: list[dict[str, Any]] = field(default_factory=list)

    def add_problem(self, index: int | None, name: str, action: Any, cause: str) -> None:
        self.problems.append(asdict(Problem(index, printable(name), action, cause)))


@dataclass(frozen=True)
class Cropper:
    """Reads images of `source` and crops or scales them to `size`."""

    source: Source
    transform: str
    size: Size

    @property
    def result_size(self) -> Size:
        return result_size(self.transform, self.size)

    @property
    def plan(self) -> dict[str, Any]:
        """All facts that determine the pixels."""
        width, height = self.size
        return {"source": self.source.fingerprint, "resolution": f"{width}x{height}", "transform": self.transform}

    def __call__(self, indices: range) -> Cropped:
        cropped = Cropped()
        for index in indices:
            name = self.source.names[index]
            try:
                picture, notes = read_picture(partial(self.source.storage.open, name))
                image = pixels(TRANSFORMS[self.transform](picture, self.size))
            except BadPictureError as error:
                cropped.add_problem(index, name, "skipped", str(error))
                continue
            for note in notes:
                cropped.add_problem(index, name, "handled", note)
            cropped.indices.append(index)
            cropped.images.append(image)
        return cropped


def make_cropper(config: ConvertConfig, source: Source) -> Cropper:
    """Make the cropper of a configuration; UserError if no size is given and the source does not determine one."""
    if config.size is None:  # `validate` allows this only if no image is to be cropped
        return Cropper(source, "none", first_size(source))
    return Cropper(source, config.transform, config.size)


def first_size(source: Source) -> Size:
    """The width and height of the first readable image."""
    for size in _sizes(source):
        return size
    raise UserError(f"{source.storage.root}: none of its {len(source):,} images can be read")


def _sizes(source: Source) -> Iterator[Size]:
    for name in source.names:
        try:
            yield read_picture(partial(source.storage.open, name))[0].size
        except BadPictureError:
            continue


def merged(outcomes: Iterable[Cropped]) -> Cropped:
    """The results of several requests as one."""
    whole = Cropped()
    for each in outcomes:
        whole.indices += each.indices
        whole.images += each.images
        whole.problems += each.problems
    return whole
