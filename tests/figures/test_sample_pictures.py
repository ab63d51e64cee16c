"""Sheets of generated images with their classes' names, and films of images that form."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from stablevm.figures.evaluation import plot_class_rows
from stablevm.figures.sheets import (
    FILM_FRAMES,
    Film,
    arrange,
    captions_of,
    film_columns_and_rows,
    plot_film_frame,
    plot_sheet,
    quick_look_size,
)
from stablevm.interpolant import INTERPOLANTS, get_interpolant
from stablevm.support.images import read_png_text, save_gif, save_png
from stablevm.support.rng import randn
from tests.helpers.checkpoints import tiny_card

GREY = np.full((6, 64, 64, 3), 128, dtype=np.uint8)


def ink(pixels):
    """Number of pixels with writing: neither white paper nor the grey of the images."""
    return int(((pixels < 120).all(axis=-1)).sum())


def test_few_classes_get_a_row_each_and_many_come_as_they_are():
    labels = np.array([2, 0, 1, 0, 2, 1, 1, 0, 2, 0])
    assert arrange(labels) == ([1, 3, 7, 2, 5, 6, 0, 4, 8], 3)
    assert arrange(labels, columns=2) == ([1, 3, 2, 5, 0, 4], 2)
    assert arrange(labels, columns=2, rows=2) == ([0, 1, 2, 3], 2), "no room for three rows"
    assert arrange(np.arange(1000)) == (list(range(64)), 8)
    assert arrange(np.array([7, 7, 7])) == ([0, 1, 2], 3)


def test_sizes():
    assert [quick_look_size(count) for count in (1, 2, 16, 17, 1000)] == [8, 16, 128, 64, 64]
    for side, fitting in ((8, (8, 16)), (64, (8, 16)), (256, (4, 4)), (512, (2, 2)), (2000, (1, 1))):
        assert film_columns_and_rows(side) == fitting


@pytest.mark.parametrize("name", ["a\nb", "a\u2029b", "a\x85b", "a\x1cb\x1dc", "\x1b[31m", "$x^$", "", "x" * 4000])
def test_any_name_of_a_class_gets_a_caption(name, tmp_path):
    card = replace(tiny_card(), class_names=(name, "cat", "dog", "owl"))
    captions = captions_of([0, 1, 2, 3], card)
    images = np.zeros((4, 8, 8, 3), np.uint8)
    for columns in (1, 2):
        assert plot_sheet(images, columns, captions).ndim == 3
    assert all(text.isprintable() and len(text) < 100 for text in captions)
    plot_class_rows(images[:, None], card.class_names, "Real", tmp_path / "rows.png")


def test_captions_name_classes_that_have_names():
    card = tiny_card()
    assert captions_of([2, 0, 4], card) == ["2 class 2", "0 class 0", ""], "4 is the null class"
    unnamed = type(card)(card.model, card.latent, "linear", "v", tuple("0123"), 1)
    assert captions_of([3, 1], unnamed) == ["3", "1"]


def test_names_stand_left_of_rows_of_one_class_and_else_under_each_image():
    plain = plot_sheet(GREY, 3, [""] * 6)
    assert plain.shape == (2 * 66 + 2, 3 * 66 + 2, 3) and ink(plain) == 0
    by_row = plot_sheet(GREY, 3, ["7 otter"] * 3 + ["8 gull"] * 3)
    margin = by_row.shape[1] - plain.shape[1]
    assert by_row.shape[0] == plain.shape[0] and np.array_equal(by_row[:, margin:], plain)
    assert ink(by_row[:66, :margin]) > 20 < ink(by_row[66:, :margin])
    told_once = plot_sheet(GREY, 3, ["7 otter"] * 6)
    assert ink(told_once[:66]) > 20 and ink(told_once[66:]) == 0
    each = plot_sheet(GREY, 3, ["a", "b", "c", "d", "e", ""])
    assert each.shape[1] == plain.shape[1] and each.shape[0] > plain.shape[0]
    assert ink(each[: len(each) // 2]) > 10 and ink(each[:, 134:]) < ink(each[:, :66]), "the last has no name"
    long = plot_sheet(GREY, 3, ["n" * 500] * 6)
    assert long.shape[1] < plain.shape[1] + 220, "shortened"


def test_small_images_are_enlarged():
    assert plot_sheet(GREY[:, :8, :8], 3, [""] * 6).shape == (2 * 66 + 2, 3 * 66 + 2, 3)


def test_frame_tells_the_time_by_a_bar():
    def filled(t):
        frame = plot_film_frame(np.full((10, 400, 3), 255, dtype=np.uint8), t)
        return int((frame[12, 72:].astype(int) == (0, 114, 178)).all(axis=-1).sum())

    assert filled(1.0) <= 1 and filled(0.0) >= 320 and abs(filled(0.5) - 162) <= 2
    assert plot_film_frame(np.zeros((10, 5, 3), dtype=np.uint8), 0.5).shape[1] == 5, "no room for a bar"


@pytest.mark.parametrize("path_type", INTERPOLANTS)
@pytest.mark.parametrize("steps, frames", [(4, 4), (40, 40), (250, 36)])
def test_film_keeps_the_prediction_of_the_image_at_spread_times(path_type, steps, frames, stream):
    path = get_interpolant(path_type)
    x0, noise = randn((2, 2, 1, 2, 2), stream).double()
    film = Film(path, lambda latents: latents.numpy())
    for t in torch.arange(steps, 0, -1, dtype=torch.float64) / steps:
        c = path.coefficients(t)
        for _ in range(2):  # as a solver does that evaluates twice at a time
            film(c.alpha * x0 + c.sigma * noise, t, c.d_alpha * x0 + c.d_sigma * noise)
    assert len(film.frames) == frames <= FILM_FRAMES
    assert all(np.allclose(frame, x0.numpy(), atol=1e-9) for _, frame in film.frames)
    gaps = -np.diff([t for t, _ in film.frames])
    assert gaps.min() >= 1 / FILM_FRAMES - 1e-6 and gaps.max() <= max(1 / steps, 1 / FILM_FRAMES) + 1 / steps


def test_gif_shows_each_frame_and_the_last_one_longer(tmp_path):
    frames = [np.full((4, 5, 3), level, dtype=np.uint8) for level in (0, 100, 200)]
    save_gif(tmp_path / "a.gif", frames, 50, 500)
    with Image.open(tmp_path / "a.gif") as gif:
        shown = []
        for number in range(gif.n_frames):
            gif.seek(number)
            shown.append((gif.info["duration"], np.asarray(gif.convert("RGB"))[0, 0, 0]))
    assert shown == [(50, 0), (50, 100), (500, 200)]


def test_png_carries_text(tmp_path):
    save_png(tmp_path / "a.png", GREY[0], {"protocol": '{"name": "ä"}'})
    save_png(tmp_path / "b.png", GREY[0])
    (tmp_path / "c.png").write_text("no picture")
    texts = [read_png_text(tmp_path / f"{name}.png") for name in "abc"]
    assert texts == [{"protocol": '{"name": "ä"}'}, {}, {}]
