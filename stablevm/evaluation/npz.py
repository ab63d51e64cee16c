"""Reading `.npz` files of images, as written by `generate`, ADM's scripts and `stablevm reference`.

Stored images are mapped into memory, and compressed ones are decompressed in blocks.
"""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stablevm.evaluation.sources import ArraySource, ImageSource, StreamedSource
from stablevm.metrics.statistics import Moments, check_covariance
from stablevm.support.cards import card_of
from stablevm.support.errors import UserError
from stablevm.support.files import parse_json
from stablevm.support.npz import Header, NpzFile, finish, pieces
from stablevm.support.text import shown

IMAGES = "arr_0"
LABELS = ("labels", "arr_1")  # ours, and the second array of ADM's sampling script
_LOCAL_HEADER = 30  # bytes of a ZIP member before its name; at 26 the name's length, at 28 that of the extra field


@dataclass(frozen=True)
class ArchiveCard:
    """The entries of a reference file's `protocol` that are used; our commands record more."""

    class_names: tuple[str, ...] = ()
    statistics_of: int | None = None
    extractor: str | None = None
    extractor_fingerprint: str | None = None


class Archive(NpzFile):
    """An .npz file whose images are read in parts."""

    def images(self) -> ImageSource:
        """The images `arr_0`, uint8 (N, H, W, 3); UserError for another type or shape, and if they are damaged."""
        what = "images, uint8 (N, H, W, 3)"
        if IMAGES not in self:
            raise UserError(f"{self.path}: holds no {IMAGES} ({what})")
        header = self.header(IMAGES)
        check_images(header.shape, header.dtype, str(self.path))
        if self._members[IMAGES].compress_type == zipfile.ZIP_STORED:
            return ArraySource(self._mapped(IMAGES, header))
        if header.fortran_order:
            raise UserError(
                f"{self.path}: {IMAGES} is compressed and in Fortran order, so that no image can be read by itself; "
                "save np.ascontiguousarray(images)"
            )
        return StreamedSource(header.shape, lambda: self._image_bytes(header))

    def _mapped(self, name: str, header: Header) -> NDArray[Any]:
        """A stored array, mapped into memory after its CRC has been checked."""
        info = self._members[name]
        with self._reading(name), self.opened(name) as member:
            for _ in pieces(member, info.file_size, info):
                pass
            finish(member)
        with self.path.open("rb") as file:
            file.seek(info.header_offset)
            local = file.read(_LOCAL_HEADER)
        names = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        offset = info.header_offset + _LOCAL_HEADER + names + header.length
        return np.memmap(self.path, header.dtype, "r", offset, header.shape, "F" if header.fortran_order else "C")

    def _image_bytes(self, header: Header) -> Iterator[bytes]:
        """Yield the bytes of compressed images in pieces of any length; UserError for damage, perhaps late."""
        with self._reading(IMAGES), self.opened(IMAGES) as member:
            member.read(header.length)
            yield from pieces(member, header.nbytes, self._members[IMAGES])
            finish(member)

    def labels(self, count: int) -> NDArray[np.int64] | None:
        """The classes of the images, (count,) int64; None if the file has none. UserError for other shapes."""
        for name in LABELS:
            if name in self:
                header = self.header(name)
                if header.dtype.kind not in "iu" or header.shape != (count,):
                    raise UserError(
                        f"{self.path}: {name} are {header.dtype} {header.shape}, expected one integer per image: "
                        f"({count},)"
                    )
                return self.array(name).astype(np.int64)
        return None

    def moments(self, name: str, width: int | None = None) -> Moments | None:
        """The stored statistics `mu` and `sigma` (`name` "") or `mu_s` and `sigma_s` ("_s"); None if there are none.

        UserError unless they are a mean and a covariance, of `width` features if given.
        """
        mu, sigma = f"mu{name}", f"sigma{name}"
        if mu not in self and sigma not in self:
            return None
        for each in (mu, sigma):
            if each not in self:
                raise UserError(f"{self.path}: holds {mu if each == sigma else sigma} but no {each}; make it again")
        headers = [self.header(each) for each in (mu, sigma)]
        for each, header in zip((mu, sigma), headers, strict=True):
            if header.dtype.kind not in "fiu":
                raise UserError(f"{self.path}: {each} holds {header.dtype}, expected numbers; make it again")
        (mean_shape, covariance_shape) = (header.shape for header in headers)
        if len(mean_shape) != 1 or covariance_shape != 2 * mean_shape:
            raise UserError(
                f"{self.path}: {mu} is {mean_shape} and {sigma} {covariance_shape}, expected (D,) and (D, D)"
            )
        if width is not None and mean_shape != (width,):
            raise UserError(
                f"{self.path}: {mu} is of {mean_shape[0]:,} features, Inception's are {width:,}; make it again"
            )
        mean, covariance = (torch.from_numpy(self.array(each).astype(np.float64)) for each in (mu, sigma))
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise UserError(f"{self.path}: {mu} or {sigma} holds NaN or infinity; make it again")
        return Moments(mean, check_covariance(covariance, f"{self.path}: {sigma}"))

    def card(self) -> ArchiveCard:
        """The entries of `protocol` that our commands record; empty for other files. UserError if it is damaged."""
        if "protocol" not in self:
            return ArchiveCard()
        where = f"{self.path}: protocol"
        values = parse_json(self.text("protocol"), where)
        if not isinstance(values, dict):
            raise UserError(f"{where}: expected an object, found {shown(values)}; make it again")
        known = {name: values[name] for name in ArchiveCard.__dataclass_fields__ if name in values}
        return card_of(ArchiveCard, known, where, remedy="make it again")


def check_images(shape: tuple[int, ...], dtype: np.dtype[Any], where: str) -> None:
    """Raise UserError unless images are uint8 (N, H, W, 3), one or more; with a hint if their form is recognised."""
    if dtype != np.uint8:
        raise UserError(f"{where}: images of type {dtype}, expected uint8; round floats to levels 0 to 255 first")
    if len(shape) == 4 and shape[3] == 3:
        if 0 in shape:
            raise UserError(f"{where}: no images (shape {shape})")
        return
    if len(shape) == 3 and shape[2] == 3:
        hint = "one image? give images[None]"
    elif len(shape) == 4 and shape[1] == 3:
        hint = "channels come last: images.transpose(0, 2, 3, 1)"
    elif len(shape) == 4 and shape[3] == 4:
        hint = "the fourth channel is opacity? give images[..., :3]"
    elif len(shape) == 3 or (len(shape) == 4 and 1 in (shape[1], shape[3])):
        hint = "grey images? repeat the channel three times"
    else:
        hint = "this is not a set of colour images"
    raise UserError(f"{where}: images of shape {shape}, expected (N, H, W, 3); {hint}")
