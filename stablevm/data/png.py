"""Images as PNG files: lossless, and small enough where raw pixels are too many."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Of 0 to 9; see docs/experiments.md for what others cost.
COMPRESSION = 1


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """uint8 (H, W, 3) to the bytes of a file, the same on every machine with the same Pillow."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=COMPRESSION)
    return buffer.getvalue()


def decode_png(content: bytes) -> NDArray[np.uint8]:
    """uint8 (H, W, 3)."""
    with Image.open(io.BytesIO(content), formats=("PNG",)) as picture:
        return np.asarray(picture.convert("RGB"))
