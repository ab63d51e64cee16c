"""Sheets of images with class names, of samples or data, and films of images as they form."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablevm.data.dataset import PreparedDataset
from stablevm.figures.style import PAGE_WIDTH, new_figure, plain, save_figure, style
from stablevm.interpolant import Interpolant
from stablevm.networks.snapshot import ModelCard
from stablevm.support.images import tile
from stablevm.support.text import caption

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

COLUMNS = 8
MAX_CLASS_ROWS = 16  # with more classes, a row for each would make the picture too tall
FILM_SIDE = 1024  # pixels; the images of a film fit about into a square with this side
FILM_FRAMES = 40
FRAME_MILLISECONDS, LAST_FRAME_MILLISECONDS = 100, 2000
_MIN_SIDE = 64  # smaller images are enlarged to about this side in pixels
_FONT_SIZE, _LINE = 13, 20  # pixels
_MAX_NAME_WIDTH = 200  # pixels
_NAME_SHARE = 0.2  # of the width of a picture of examples, for the classes' names
_NAME_LENGTH = 24  # characters
_INK, _BAR, _BAR_GROUND = (31, 41, 51), (0, 114, 178), (228, 231, 235)

Pixels = NDArray[np.uint8]


def quick_look_size(num_classes: int) -> int:
    """The number of images in a quick look at `num_classes` classes."""
    return COLUMNS * num_classes if num_classes <= MAX_CLASS_ROWS else COLUMNS**2


def arrange(labels: NDArray[np.int64], columns: int = COLUMNS, rows: int = MAX_CLASS_ROWS) -> tuple[list[int], int]:
    """The indices of images to show, and the number of columns: a row per class if there are few, else the first."""
    classes, counts = np.unique(labels, return_counts=True)
    if 1 < len(classes) <= rows:
        columns = min(columns, counts.min())
        return np.concatenate([np.flatnonzero(labels == label)[:columns] for label in classes]).tolist(), columns
    return list(range(min(columns * min(columns, rows), len(labels)))), min(columns, len(labels))


def film_columns_and_rows(image_side: int) -> tuple[int, int]:
    """The largest numbers of columns and rows for a film of images with a side of `image_side` pixels."""
    fitting = max(1, FILM_SIDE // (image_side * _enlargement(image_side)))
    return min(COLUMNS, fitting), min(MAX_CLASS_ROWS, fitting)


def captions_of(labels: Iterable[int], card: ModelCard) -> list[str]:
    """The caption for each label: its number, with the class's name if it has one; "" for no class."""

    def numbered(label: int) -> str:
        if label == card.model.null_class:
            return ""
        name = caption(card.class_names[label]) if label < len(card.class_names) else ""
        return str(label) if name in ("", str(label)) else f"{label} {name}"

    return [numbered(int(label)) for label in labels]


def plot_sheet(images: Pixels, columns: int, captions: Sequence[str]) -> Pixels:
    """Arrange images (N, H, W, 3) in rows of `columns`, with captions on the left if each row has only one, else below
    each image.
    """
    images = images.repeat(_enlargement(images.shape[1]), axis=1).repeat(_enlargement(images.shape[1]), axis=2)
    if not any(captions):
        return tile(images, columns)
    rows = [captions[start : start + columns] for start in range(0, len(captions), columns)]
    if all(len(set(row)) == 1 for row in rows):
        return _with_row_names(tile(images, columns), [row[0] for row in rows])
    return _with_captions(images, columns, captions)


def plot_film_frame(picture: Pixels, t: float) -> Pixels:
    """The picture below a line with the time, as a number and as a bar that fills from noise (1) to image (0)."""
    from PIL import Image, ImageDraw

    head = Image.new("RGB", (picture.shape[1], _LINE + 4), "white")
    draw = ImageDraw.Draw(head)
    draw.text((4, 3), f"t = {t:.2f}", fill=_INK, font=_font())
    left, right = min(72, head.width), head.width - 4
    if right > left:
        draw.rectangle((left, 9, right, 15), fill=_BAR_GROUND)
        draw.rectangle((left, 9, left + (right - left) * (1 - t), 15), fill=_BAR)
    return np.concatenate([np.asarray(head), picture])


class Film:
    """Watches a solver and records the network's prediction at about `FILM_FRAMES` evenly spaced times.

    The noisy states themselves would look like noise most of the time, and an autoencoder is not made to decode them.
    The prediction of the image, `E[x0 | x_t]`, shows when layout, shapes and details are decided.
    """

    def __init__(self, path: Interpolant, decode: Callable[[Tensor], Pixels]) -> None:
        self.path = path
        self.decode = decode
        self.frames: list[tuple[float, Pixels]] = []

    def __call__(self, x: Tensor, t: Tensor, v: Tensor) -> None:
        """Record a frame if `t` is far enough below that of the last one, whatever times the solver visits between."""
        if not self.frames or t <= self.frames[-1][0] - 1 / FILM_FRAMES + torch.finfo(torch.float32).eps:
            self.frames.append((float(t), self.decode(self.path.convert(v, x, t, "velocity", "x0"))))

    def pictures(self, last: Pixels, columns: int, captions: Sequence[str]) -> Iterator[Pixels]:
        """Yield a sheet for each time, and one of the finished images."""
        for t, images in [*self.frames, (0.0, last)]:
            yield plot_film_frame(plot_sheet(images, columns, captions), t)


def plot_examples(dataset: PreparedDataset, path: Path, classes: int, per_class: int) -> None:
    """Write a PNG file with a row for each of `classes` evenly spaced classes, with `per_class` random images.

    If the set has no images, the first three channels of the latents are shown instead.
    """
    labels = dataset.labels().numpy()
    present = np.unique(labels)
    shown = present[np.linspace(0, len(present) - 1, min(classes, len(present))).round().astype(int)]
    generator = np.random.default_rng(0)
    strips = []
    for label in shown:
        rows = generator.permutation(np.flatnonzero(labels == label))[:per_class]
        strips.append(_pictures(dataset, np.sort(rows)))
    figure_height = PAGE_WIDTH * (1 - _NAME_SHARE) / per_class * len(strips) + 0.6
    with style():
        figure = new_figure(height=figure_height)
        figure.suptitle(plain(_title(dataset)), x=0.02, ha="left", fontweight="bold")
        top = 1 - 0.5 / figure_height
        for number, (label, strip) in enumerate(zip(shown, strips, strict=True)):
            height = top / len(strips)
            axes = figure.add_axes((_NAME_SHARE, top - (number + 1) * height, 1 - _NAME_SHARE, height))
            axes.imshow(tile(strip, per_class, pad=max(1, dataset.resolution // 64)))
            axes.set_anchor("W")
            axes.axis("off")
            name = dataset.class_names[label]
            figure.text(0.02, top - (number + 0.5) * height, plain(_cut(name)), va="center")
        save_figure(figure, path)


def _pictures(dataset: PreparedDataset, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The images of these rows, or three channels of their latents: uint8 (n, H, W, 3)."""
    if dataset.has_images:
        return dataset.images(rows).permute(0, 2, 3, 1).numpy()
    mean, _ = dataset.latent.split(dataset.moments(rows))
    colours = mean[:, torch.arange(3) % mean.shape[1]]
    low, high = colours.amin((0, 2, 3), keepdim=True), colours.amax((0, 2, 3), keepdim=True)
    return ((colours - low) / (high - low).clamp(min=1e-6) * 255).byte().permute(0, 2, 3, 1).numpy()


def _title(dataset: PreparedDataset) -> str:
    shown = "images" if dataset.has_images else "latents, three channels as colours (no images in the set)"
    return f"{dataset.folder.name}: {shown}, {len(dataset):,} in {dataset.num_classes:,} classes"


def _enlargement(side: int) -> int:
    return max(1, _MIN_SIDE // side)


def _font() -> "FreeTypeFont":
    """DejaVu Sans, which comes with matplotlib; Pillow's own font has only Latin letters."""
    import matplotlib
    from PIL import ImageFont

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), _FONT_SIZE)  # Pillow takes a Path from 10.3 on


def _shortened(text: str, width: float, font: "FreeTypeFont") -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"


def _with_row_names(picture: Pixels, names: Sequence[str]) -> Pixels:
    """Add a margin on the left with the name of each row, or once for several rows with the same name."""
    from PIL import Image, ImageDraw

    font = _font()
    names = [_shortened(name, _MAX_NAME_WIDTH, font) for name in names]
    margin = Image.new("RGB", (int(max(map(font.getlength, names))) + 12, len(picture)), "white")
    draw = ImageDraw.Draw(margin)
    for row, name in enumerate(names):
        if row == 0 or name != names[row - 1]:
            draw.text(
                (margin.width - 6, (row + 0.5) * len(picture) / len(names)), name, fill=_INK, font=font, anchor="rm"
            )
    return np.concatenate([np.asarray(margin), picture], axis=1)


def _with_captions(images: Pixels, columns: int, captions: Sequence[str]) -> Pixels:
    from PIL import Image, ImageDraw

    font, width = _font(), images.shape[2]
    strips = []
    for each in captions:
        strip = Image.new("RGB", (width, _LINE), "white")
        text = _shortened(each, width, font)
        ImageDraw.Draw(strip).text((width / 2, 2), text, fill=_INK, font=font, anchor="ma")
        strips.append(np.asarray(strip))
    return tile(np.concatenate([images, np.stack(strips)], axis=1), columns)


def _cut(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 3] + "..."
