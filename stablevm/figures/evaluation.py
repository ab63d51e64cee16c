"""Figures of reports: training curves, samples beside real images, nearest references, numbers over sample sizes."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stablevm.figures.style import (
    BLUE,
    GREEN,
    INK,
    PAGE_WIDTH,
    VERMILION,
    new_figure,
    panels,
    plain,
    plain_log_labels,
    save_figure,
    style,
)
from stablevm.metrics.table import panels_of
from stablevm.support.errors import UserError
from stablevm.support.images import save_png, tile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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


def plot_training_curves(metrics: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Plot the velocity loss (log scale), and the alignment loss if there is one, against the step.

    metrics: rows of the trainer's `metrics.jsonl`; rows without `velocity_loss` are evaluations. UserError if there is
    no row of a training step.
    """
    rows = [row for row in metrics if "velocity_loss" in row]
    if not rows:
        raise UserError("metrics: no row holds velocity_loss; train for at least one logged step")
    aligned = [row for row in rows if "alignment_loss" in row]
    with style():
        figure, axes = panels(2 if aligned else 1)
        _curve(axes[0], rows, "velocity_loss", BLUE)
        axes[0].set(title="Velocity loss", ylabel="mean squared error per dimension", yscale="log")
        plain_log_labels(axes[0])
        if aligned:
            _curve(axes[1], aligned, "alignment_loss", VERMILION)
            axes[1].set(title="Alignment loss", ylabel="minus cosine similarity")
        save_figure(figure, path)


def plot_samples_beside_real(
    samples: NDArray[np.uint8], real: NDArray[np.uint8], path: str | Path, class_names: Sequence[str]
) -> None:
    """Plot real images on the left and generated images on the right, one row per class.

    samples, real: uint8 (classes, n, H, W, 3), each with its own n but the same H and W.
    """
    if not len(samples) == len(real) == len(class_names):
        raise UserError(
            f"samples of {len(samples)} classes, real images of {len(real)}, {len(class_names)} names: "
            "give one row each"
        )
    plot_rows_side_by_side({"Real": real, "Generated": samples}, class_names, path)


def plot_rows_side_by_side(halves: Mapping[str, NDArray[np.uint8]], row_names: Sequence[str], path: str | Path) -> None:
    """Plot sets of images uint8 (rows, n, H, W, 3) beside each other, each with its own n and its title."""
    sheets = [_sheet(images) for images in halves.values()]
    pixels = sum(sheet.shape[1] for sheet in sheets)
    margin, gap = 0.8, 0.35  # inches: row names on the left, between the halves
    inch = (PAGE_WIDTH - margin - gap) / pixels
    height = sheets[0].shape[0] * inch + 0.45
    with style():
        figure = new_figure(height)
        left = margin
        for sheet, title in zip(sheets, halves, strict=True):
            width, tall = sheet.shape[1] * inch, sheet.shape[0] * inch
            axes = figure.add_axes((left / PAGE_WIDTH, 0.05 / height, width / PAGE_WIDTH, tall / height))
            axes.imshow(sheet, interpolation="nearest", aspect="auto")
            axes.set(title=title, xticks=[], yticks=[])
            axes.grid(False)
            axes.spines[:].set_visible(False)
            left += width + gap
        middles = (np.arange(len(row_names)) + 0.5) * sheets[0].shape[0] / len(row_names)
        figure.axes[0].set_yticks(middles, list(map(plain, row_names)), color=INK, fontsize=11)
        figure.axes[0].tick_params(length=0, pad=6)
        save_figure(figure, path)


def plot_sample_grid(images: NDArray[np.uint8], path: Path) -> None:
    """Plot images uint8 (n, H, W, 3) in rows of ten; small images are enlarged."""
    scale = max(1, round(2 * GRID_SIDE / images.shape[2]))
    save_png(path, tile(images, GRID_COLUMNS, scale=scale, pad=4))


def plot_neighbours(
    samples: NDArray[np.uint8], nearest: NDArray[np.uint8], distances: Sequence[float], path: Path
) -> None:
    """Plot each of `samples` (n, H, W, 3) with its distance and its nearest reference images (n, k, H, W, 3)."""
    names = [f"{distance:.3g}" for distance in distances]
    plot_rows_side_by_side({"Sample": samples[:, None], "Nearest reference images": nearest}, names, path)


def plot_metric_curves(curves: Mapping[str, Sequence[CurvePoint]], path: Path) -> None:
    """Plot metrics, by name, against the number of samples, in the panels of `metrics.table`."""
    shown = panels_of(curves)
    with style():
        figure, axes = panels(2, rows=-(-len(shown) // 2), row_height=3.4)
        for panel, metrics in zip(axes, shown, strict=False):
            for metric, color in zip(metrics, itertools.cycle((BLUE, VERMILION, GREEN)), strict=False):
                points = curves[metric.name]
                sizes = [point.samples for point in points]
                bars = [point.deviation or 0.0 for point in points]
                panel.errorbar(sizes, [point.mean for point in points], bars, color=color, marker="o", markersize=4,
                               capsize=3, label=metric.title)  # fmt: skip
            panel.set(title=" and ".join(metric.title for metric in metrics).capitalize()
                      if len(metrics) > 1 else metrics[0].title, xlabel="number of samples", xscale="log")  # fmt: skip
            panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
            panel.minorticks_off()
            if len(metrics) > 1:
                panel.set_ylim(-0.03, 1.03)
                panel.legend(loc="best")
        for panel in axes[len(shown) :]:
            panel.set_axis_off()
        save_figure(figure, path)


def _sheet(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Tile images with one class per row; small images are enlarged, so that gaps are thin in comparison."""
    classes, columns, height, width, channels = images.shape
    flat = images.reshape(classes * columns, height, width, channels)
    return tile(flat, columns=columns, scale=max(1, 64 // height), pad=4)


def _curve(axes: "Axes", rows: Sequence[Mapping[str, Any]], key: str, color: str) -> None:
    steps = np.array([row["step"] for row in rows])
    values = np.array([row[key] for row in rows], dtype=np.float64)
    window = max(1, len(values) // 25)
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=1, label="each logged step")
    axes.plot(steps, _moving_mean(values, window), color=color, label=f"mean of {window}")
    axes.set_xlabel("training step")
    axes.legend(loc="best")


def _moving_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """The centred mean over `window` values, or over fewer at the ends."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")
