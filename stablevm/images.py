"""Pictures for people: many small images in one PNG."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stablevm.files import write_with

_GAP_LEVEL = 255  # white


def tile(images: NDArray[np.uint8], columns: int, scale: int = 1, pad: int = 2) -> NDArray[np.uint8]:
    """Lay uint8 images (N, H, W, 3) out in rows of `columns`, from the top left; returns uint8 (H', W', 3).

    Each pixel becomes `scale` x `scale`; `pad` white pixels lie around every image, and white fills the last row.
    """
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    framed = np.full((rows * columns, height + pad, width + pad, channels), _GAP_LEVEL, dtype=np.uint8)
    framed[:count, :height, :width] = images
    sheet = framed.reshape(rows, columns, *framed.shape[1:]).swapaxes(1, 2)
    sheet = sheet.reshape(rows * (height + pad), columns * (width + pad), channels)
    return np.pad(sheet, ((pad, 0), (pad, 0), (0, 0)), constant_values=_GAP_LEVEL)


def save_png(path: str | Path, image: NDArray[np.uint8]) -> None:
    """Write one uint8 (H, W, 3) image."""
    from PIL import Image

    write_with(path, lambda temporary: Image.fromarray(image).save(temporary, format="PNG"))
