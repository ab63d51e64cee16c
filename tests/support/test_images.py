"""Pictures of many images."""

import numpy as np
from PIL import Image

from stablevm.support.images import save_png, tile


def test_tile_lays_images_out_row_by_row():
    images = np.stack([np.full((2, 3, 3), level, dtype=np.uint8) for level in (10, 20, 30)])
    sheet = tile(images, columns=2, scale=2, pad=1)
    assert sheet.shape == (2 * (4 + 1) + 1, 2 * (6 + 1) + 1, 3)
    assert (sheet[1:5, 1:7] == 10).all() and (sheet[1:5, 8:14] == 20).all() and (sheet[6:10, 1:7] == 30).all()
    framed = sheet.copy()
    framed[1:5, 1:7] = framed[1:5, 8:14] = framed[6:10, 1:7] = 255
    assert (framed == 255).all(), "everything else is white"


def test_enlarged_pixels_stay_sharp():
    image = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    assert np.array_equal(tile(image, columns=1, scale=3, pad=0)[::3, ::3], image[0])


def test_png_keeps_every_level(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    save_png(tmp_path / "picture.png", picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "picture.png")), picture)
