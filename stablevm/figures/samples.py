"""Pictures of an evaluation: samples, their nearest reference images, and numbers against the number of samples."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stablevm.figures.evaluation import rows_side_by_side
from stablevm.figures.style import BLUE, GREEN, VERMILION, panels, save_figure, style
from stablevm.metrics.table import panels_of
from stablevm.support.images import save_png, tile

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


def sample_grid(images: NDArray[np.uint8], path: Path) -> None:
    """Images uint8 (n, H, W, 3) in rows of ten; small ones enlarged."""
    scale = max(1, round(2 * GRID_SIDE / images.shape[2]))
    save_png(path, tile(images, GRID_COLUMNS, scale=scale, pad=4))


def neighbour_rows(
    samples: NDArray[np.uint8], nearest: NDArray[np.uint8], distances: Sequence[float], path: Path
) -> None:
    """A row for each of `samples` (n, H, W, 3): it, its distance, and its nearest reference images (n, k, H, W, 3)."""
    names = [f"{distance:.3g}" for distance in distances]
    rows_side_by_side({"Sample": samples[:, None], "Nearest reference images": nearest}, names, path)


def metric_panels(curves: Mapping[str, Sequence[CurvePoint]], path: Path) -> None:
    """The metrics by their names, in panels as `metrics.table` groups them, against the number of samples."""
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
