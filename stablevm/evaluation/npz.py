"""`.npz` files of images, as generation, ADM's scripts and `stablevm reference` write them."""

import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from stablevm.errors import UserError
from stablevm.evaluation.statistics import Moments

IMAGES = "arr_0"
LABELS = ("labels", "arr_1")  # ours, and the second array of ADM's sampling script
_LOCAL_HEADER = 30  # bytes of a ZIP member before its name; at 26 the name's length, at 28 that of the extra field


class Archive:
    """An .npz file whose images are read part by part, where they are not compressed."""

    def __init__(self, path: Path, remedy: str = "give the .npz that generation wrote") -> None:
        """UserError, which ends in `remedy`, when there is no readable .npz file at `path`."""
        if not path.is_file():
            raise UserError(f"{path}: no such file; {remedy}")
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path}: not an .npz file, or cut short; {remedy}")
        self.path = path
        with zipfile.ZipFile(path) as archive:
            self._members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def array(self, name: str) -> NDArray[Any]:
        """A whole array; mapped from the disk where it lies there as it is. UserError for a damaged one."""
        info = self._members[name]
        try:
            with self.path.open("rb") as file:
                if info.compress_type == zipfile.ZIP_STORED:
                    file.seek(info.header_offset)
                    header = file.read(_LOCAL_HEADER)
                    file.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), 1)
                    return self._mapped(file)
            with zipfile.ZipFile(self.path) as archive:
                return np.lib.format.read_array(io.BytesIO(archive.read(info)), allow_pickle=False)
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
            raise UserError(f"{self.path}: damaged ({error}); make it again") from None

    def _mapped(self, file: IO[bytes]) -> NDArray[Any]:
        read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        major, _ = np.lib.format.read_magic(file)
        if major not in read_header:
            raise ValueError(f"an array of .npy version {major}")
        shape, fortran_order, dtype = read_header[major](file)
        if dtype.hasobject:
            raise ValueError("an array of Python objects")
        order: Any = "F" if fortran_order else "C"
        if 0 in shape or shape == ():
            return np.frombuffer(file.read(dtype.itemsize), dtype, count=0 if 0 in shape else 1).reshape(shape)
        return np.memmap(self.path, dtype, "r", file.tell(), shape, order)

    def images(self) -> NDArray[np.uint8]:
        """`arr_0`, uint8 (N, H, W, 3); UserError for images of another type or shape."""
        what = "images, uint8 (N, H, W, 3)"
        if IMAGES not in self:
            raise UserError(f"{self.path}: holds no {IMAGES} ({what})")
        images = self.array(IMAGES)
        check_images(images, str(self.path))
        return images

    def labels(self, count: int) -> NDArray[np.int64] | None:
        """The classes of the images, int64 (count,); None where the file has none. UserError for other shapes."""
        for name in LABELS:
            if name in self:
                labels = self.array(name)
                if labels.dtype.kind not in "iu" or labels.shape != (count,):
                    raise UserError(
                        f"{self.path}: {name} are {labels.dtype} {labels.shape}, expected one integer per image: "
                        f"({count},)"
                    )
                return labels.astype(np.int64)
        return None

    def moments(self, name: str) -> Moments | None:
        """Stored statistics, `mu` and `sigma` (`name` "") or `mu_s` and `sigma_s` ("_s"); None where there are none."""
        mu, sigma = f"mu{name}", f"sigma{name}"
        if mu not in self and sigma not in self:
            return None
        for each in (mu, sigma):
            if each not in self:
                raise UserError(f"{self.path}: holds {mu if each == sigma else sigma} but no {each}; make it again")
        mean, covariance = (np.array(self.array(each), np.float64) for each in (mu, sigma))
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise UserError(
                f"{self.path}: {mu} is {mean.shape} and {sigma} {covariance.shape}, expected (D,) and (D, D)"
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise UserError(f"{self.path}: {mu} or {sigma} holds NaN or infinity; make it again")
        return Moments(torch.from_numpy(mean), torch.from_numpy(covariance))

    def protocol(self) -> dict[str, Any]:
        """How the file was made, as our commands record it; {} for others' files."""
        if "protocol" not in self:
            return {}
        values = json.loads(self.array("protocol").item())
        return values if isinstance(values, dict) else {}


def check_images(images: NDArray[Any], where: str) -> None:
    """UserError unless they are uint8 (N, H, W, 3), one or more."""
    if images.dtype != np.uint8:
        raise UserError(
            f"{where}: images of type {images.dtype}, expected uint8; round floats to levels 0 to 255 first"
        )
    if images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 1):
        raise UserError(f"{where}: grey images {images.shape}, expected (N, H, W, 3); repeat the channel three times")
    if images.ndim != 4 or images.shape[3] != 3:
        raise UserError(f"{where}: images of shape {images.shape}, expected (N, H, W, 3)")
    if 0 in images.shape:
        raise UserError(f"{where}: no images (shape {images.shape})")
