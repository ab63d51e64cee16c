"""Figures of reports: losses, samples by class, nearest reference images, numbers over the number of samples."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from stablevm.figures.style import (
    BLUE,
    GREEN,
    HALF_WIDTH,
    INK,
    METHOD_COLOURS,
    PAGE_WIDTH,
    VERMILION,
    new_figure,
    panels,
    plain,
    plain_log_labels,
    save_figure,
    style,
)
from stablevm.metrics.metric import Metric
from stablevm.support.errors import UserError
from stablevm.support.images import save_png, tile
from stablevm.support.text import caption

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOSSES = {
    "velocity_loss": ("Velocity loss", "squared error per dimension"),
    "alignment_loss": ("Alignment loss", "minus cosine similarity"),
}
THIRD_WIDTH = 3.15  # inches
NEIGHBOUR_INCHES = 0.8  # of an image beside its nearest ones
NAME_INCHES = 0.09  # of a letter in a row's name
NAME_SHARE = 0.35  # of the width, at most, for names
GRID_COLUMNS, GRID_ROWS = 10, 6
GRID_SIDE = 100  # pixels of an image on the page, about: ten in a row fill it


class CurvePoint(Protocol):
    """A number of an evaluation at one number of samples: its mean over subsets, and their standard deviation."""

    @property
    def samples(self) -> int: ...
    @property
    def mean(self) -> float: ...
    @property
    def deviation(self) -> float | None: ...


def plot_loss(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], name: Literal["velocity_loss", "alignment_loss"], path: str | Path
) -> None:
    """A loss against the step, half a page wide: rows of the trainer's `metrics.jsonl` by the method that was trained.

    The velocity loss has a log scale. Rows without the loss (evaluations) are not training steps; UserError for a run
    with none that has it.
    """
    title, meaning = LOSSES[name]
    with style():
        figure, (panel,) = panels(1, row_height=3.2, width=HALF_WIDTH)
        for method, metrics in runs.items():
            rows = [row for row in metrics if name in row]
            if not rows:
                raise UserError(f"metrics of {method}: no row holds {name}; train for at least one logged step")
            _curve(panel, rows, name, method)
        if name == "velocity_loss":
            panel.set_yscale("log")
            plain_log_labels(panel)
        panel.set(title=title, ylabel=f"{meaning}, log scale" if name == "velocity_loss" else meaning)
        panel.set_xlabel("training step")
        panel.legend(loc="best")
        save_figure(figure, path)


def plot_class_rows(images: NDArray[np.uint8], row_names: Sequence[str], title: str, path: str | Path) -> None:
    """Images uint8 (classes, n, H, W, 3), a row for each class with its name: a third of the page wide."""
    if len(images) != len(row_names):
        raise UserError(f"images of {len(images)} classes, {len(row_names)} names: give a name for each row")
    _plot_rows({title: images}, row_names, path, THIRD_WIDTH)


def _plot_rows(parts: Mapping[str, NDArray[np.uint8]], row_names: Sequence[str], path: str | Path, page: float) -> None:
    """Sets of images uint8 (rows, n, H, W, 3) beside each other on `page` inches, each with its own n and title."""
    sheets = [_sheet(images) for images in parts.values()]
    pixels = sum(sheet.shape[1] for sheet in sheets)
    longest = int(NAME_SHARE * page / NAME_INCHES)
    names = [plain(caption(name, longest)) for name in row_names]
    margin = 0.25 + NAME_INCHES * min(longest, max(map(len, names)))  # for the rows' names
    gap = 0.35 if len(sheets) > 1 else 0.0
    inch = (page - margin - gap * (len(sheets) - 1)) / pixels
    height = sheets[0].shape[0] * inch + 0.45
    with style():
        figure = new_figure(height, page)
        left = margin
        for sheet, title in zip(sheets, parts, strict=True):
            width, tall = sheet.shape[1] * inch, sheet.shape[0] * inch
            axes = figure.add_axes((left / page, 0.05 / height, width / page, tall / height))
            axes.imshow(sheet, interpolation="nearest", aspect="auto")
            axes.set(title=title, xticks=[], yticks=[])
            axes.grid(False)
            axes.spines[:].set_visible(False)
            left += width + gap
        middles = (np.arange(len(row_names)) + 0.5) * sheets[0].shape[0] / len(row_names)
        figure.axes[0].set_yticks(middles, names, color=INK, fontsize=11)
        figure.axes[0].tick_params(length=0, pad=6)
        save_figure(figure, path)


def plot_sample_grid(images: NDArray[np.uint8], path: Path) -> None:
    """Plot images uint8 (n, H, W, 3) in rows of ten; small images are enlarged."""
    scale = max(1, round(2 * GRID_SIDE / images.shape[2]))
    save_png(path, tile(images, GRID_COLUMNS, scale=scale, pad=4))


def plot_neighbours(
    samples: NDArray[np.uint8], nearest: NDArray[np.uint8], row_names: Sequence[str], path: Path
) -> None:
    """A row for each of `samples` (n, H, W, 3), with its name: the sample, and its nearest reference images
    (n, k, H, W, 3).
    """
    parts = {"Sample": samples[:, None], "Nearest reference images": nearest}
    _plot_rows(parts, row_names, path, min(PAGE_WIDTH, NEIGHBOUR_INCHES * (2 + nearest.shape[1])))


def plot_metrics(metrics: Sequence[Metric], curves: Mapping[str, Sequence[CurvePoint]], path: Path) -> None:
    """Metrics that share a panel against the number of samples, half a page wide. Several are shares, from 0 to 1, and
    so are the ends of their error bars.
    """
    with style():
        figure, (panel,) = panels(1, row_height=3.2, width=HALF_WIDTH)
        shares = len(metrics) > 1
        for metric, color in zip(metrics, itertools.cycle((BLUE, VERMILION, GREEN)), strict=False):
            points = curves[metric.name]
            sizes, means = [point.samples for point in points], np.array([point.mean for point in points])
            below = above = np.array([point.deviation or 0.0 for point in points])
            if shares:
                below, above = np.minimum(below, means), np.minimum(above, 1 - means)
            panel.errorbar(sizes, means, np.stack([below, above]), color=color, marker="o", markersize=4, capsize=3,
                           label=metric.title)  # fmt: skip
        title = " and ".join(metric.title for metric in metrics)
        title = title if title[1:2].isupper() else title[:1].upper() + title[1:]  # but sFID
        panel.set(title=title, xlabel="number of samples (log scale)", xscale="log")
        panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
        panel.minorticks_off()
        if shares:
            panel.set_ylim(-0.03, 1.03)
            panel.legend(loc="best")
        save_figure(figure, path)


def _sheet(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Tile images with one class per row; small images are enlarged, so that gaps are thin in comparison."""
    classes, columns, height, width, channels = images.shape
    flat = images.reshape(classes * columns, height, width, channels)
    return tile(flat, columns=columns, scale=max(1, 64 // height), pad=4)


def _curve(axes: "Axes", rows: Sequence[Mapping[str, Any]], name: str, method: str) -> None:
    steps = np.array([row["step"] for row in rows])
    values = np.array([row[name] for row in rows], dtype=np.float64)
    window, color = max(1, len(values) // 25), METHOD_COLOURS[method]
    axes.plot(steps, values, color=color, alpha=0.2, linewidth=1)
    label = method if window == 1 else f"{method}, mean of {window} logged steps"
    axes.plot(steps, _moving_mean(values, window), color=color, label=label)


def _moving_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """The centred mean over `window` values, or over fewer at the ends."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")
