"""Images for viewing: many small images tiled in one PNG, or as the frames of a GIF."""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stablevm.support.files import replacing

_GAP_LEVEL = 255  # white


def tile(images: NDArray[np.uint8], columns: int, scale: int = 1, pad: int = 2) -> NDArray[np.uint8]:
    """Tile uint8 images (N, H, W, 3) in rows of `columns`, from the top left: one uint8 image (H', W', 3).

    Each pixel is enlarged to `scale` x `scale`. Images are separated by `pad` white pixels, and the last row is filled
    up with white.
    """
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    framed = np.full((rows * columns, height + pad, width + pad, channels), _GAP_LEVEL, dtype=np.uint8)
    framed[:count, :height, :width] = images
    sheet = framed.reshape(rows, columns, *framed.shape[1:]).swapaxes(1, 2)
    sheet = sheet.reshape(rows * (height + pad), columns * (width + pad), channels)
    return np.pad(sheet, ((pad, 0), (pad, 0), (0, 0)), constant_values=_GAP_LEVEL)


def save_png(
    path: str | Path, image: NDArray[np.uint8], text: Mapping[str, str] | None = None, scratch: Path | None = None
) -> None:
    """Write a uint8 image (H, W, 3) as PNG, with `text` as its text chunks; scratch: as in `replacing`."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for key, value in (text or {}).items():
        chunks.add_itxt(key, value)
    content = io.BytesIO()  # in memory first, because Pillow may report disk errors without an error number
    Image.fromarray(image).save(content, format="PNG", pnginfo=chunks)
    with replacing(path, scratch=scratch) as temporary:
        temporary.write_bytes(content.getbuffer())


def read_png_text(path: str | Path) -> dict[str, str]:
    """The text chunks of a PNG file; empty if it is not a PNG file."""
    from PIL import Image, UnidentifiedImageError
    from PIL.PngImagePlugin import PngImageFile

    try:
        with Image.open(path) as image:
            return dict(image.text) if isinstance(image, PngImageFile) else {}
    except UnidentifiedImageError:
        return {}


def save_gif(
    path: str | Path, frames: Iterable[NDArray[np.uint8]], milliseconds: int, last_milliseconds: int | None = None
) -> None:
    """Write uint8 frames (H, W, 3) of equal size as a looping GIF.

    milliseconds: how long each frame is shown. last_milliseconds: how long the last one is, if different.
    """
    from PIL import Image

    first, *others = map(Image.fromarray, frames)
    durations = [milliseconds] * len(others) + [last_milliseconds or milliseconds]

    content = io.BytesIO()
    first.save(content, format="GIF", save_all=True, append_images=others, duration=durations, loop=0)
    with replacing(path) as temporary:
        temporary.write_bytes(content.getbuffer())
