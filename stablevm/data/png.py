"""Lossless compression of images as PNG."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Level of compression, 0 to 9; docs/experiments.md compares them.
COMPRESSION = 1


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Encode a uint8 image (H, W, 3) as a PNG file; the bytes are the same on every machine with the same Pillow."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=COMPRESSION)
    return buffer.getvalue()


def decode_png(content: bytes) -> NDArray[np.uint8]:
    """Decode a PNG file to a uint8 image (H, W, 3)."""
    with Image.open(io.BytesIO(content), formats=("PNG",)) as picture:
        return np.asarray(picture.convert("RGB"))
