"""Pictures for the report: training curves, the variance of the targets, samples beside real images.

PNG files at 200 dots per inch, made for half their pixel size on a page: text is then 13 to 16 px high.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stablevm.errors import UserError
from stablevm.files import write_with
from stablevm.images import tile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 200
PAGE_WIDTH = 10.0  # inches: 1000 px on the page
# Okabe and Ito's palette, told apart with every kind of colour vision.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
INK, SOFT_INK, GRID = "#1f2933", "#616e7c", "#e4e7eb"
STYLE: dict[Any, Any] = {
    "font.size": 10.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa5b1",
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "xtick.color": SOFT_INK,
    "ytick.color": SOFT_INK,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
}


def training_curves(metrics: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Velocity loss (log scale) and, where the run aligns features, the alignment loss, against the step.

    `metrics` are rows of the trainer's `metrics.jsonl`; rows without `velocity_loss` (evaluations) are not training
    steps. UserError when no training step is left.
    """
    rows = [row for row in metrics if "velocity_loss" in row]
    if not rows:
        raise UserError("metrics: no row holds velocity_loss; train for at least one logged step")
    aligned = [row for row in rows if "alignment_loss" in row]
    with _style():
        figure, panels = _panels(2 if aligned else 1)
        _curve(panels[0], rows, "velocity_loss", BLUE)
        panels[0].set(title="Velocity loss", ylabel="mean squared error per dimension", yscale="log")
        _plain_log_labels(panels[0])
        if aligned:
            _curve(panels[1], aligned, "alignment_loss", VERMILION)
            panels[1].set(title="Alignment loss", ylabel="minus cosine similarity")
        _save(figure, path)


def variance_figure(curve: Mapping[str, Any], path: str | Path) -> None:
    """Variance of the CFM and StableVM targets about the exact velocity, and the effective sample size, against t.

    `curve` holds equally long lists `t`, `cfm`, `stablevm` (variance per dimension) and `ess`, the number of
    `references`, and a `title`.
    """
    t = curve["t"]
    with _style():
        figure, (variance, ess) = _panels(2)
        variance.fill_between(t, curve["stablevm"], curve["cfm"], color=BLUE, alpha=0.08, linewidth=0)
        variance.plot(t, curve["cfm"], color=VERMILION, marker="s", markersize=4, label="CFM")
        label = f"StableVM, {curve['references']:,} references"
        variance.plot(t, curve["stablevm"], color=BLUE, marker="o", markersize=4, label=label)
        variance.set(title=curve["title"], ylabel="variance per dimension", xlim=(0, 1))
        variance.set_ylim(0, 1.35 * max(max(curve["cfm"]), max(curve["stablevm"])))  # room for the legend
        variance.legend(loc="upper left")
        ess.axhline(curve["references"], color=SOFT_INK, linestyle=(0, (4, 3)), linewidth=1.2, label="all references")
        ess.plot(t, curve["ess"], color=GREEN, marker="o", markersize=4, label="effective")
        ess.set(title="Effective sample size", ylabel="number of references", xlim=(0, 1), yscale="log")
        ess.legend(loc="center left")
        ess.set_ylim(0.9, 1.3 * curve["references"])
        _plain_log_labels(ess)
        for panel in (variance, ess):
            panel.set_xlabel("time t  (0 data, 1 noise)")
        _save(figure, path)


def samples_beside_real(
    samples: NDArray[np.uint8], real: NDArray[np.uint8], path: str | Path, class_names: Sequence[str]
) -> None:
    """One row per class: real images on the left, generated ones on the right.

    `samples` and `real` are uint8 (classes, n, H, W, 3), each with its own n and the same H and W.
    """
    if not len(samples) == len(real) == len(class_names):
        raise UserError(
            f"samples of {len(samples)} classes, real images of {len(real)}, {len(class_names)} names: "
            "give one row each"
        )
    sheets = [_sheet(images) for images in (real, samples)]
    pixels = sum(sheet.shape[1] for sheet in sheets)
    margin, gap = 0.8, 0.35  # inches: class names on the left, between the halves
    inch = (PAGE_WIDTH - margin - gap) / pixels
    height = sheets[0].shape[0] * inch + 0.45
    with _style():
        figure = _figure(height)
        left = margin
        for sheet, title in zip(sheets, ("Real", "Generated"), strict=True):
            width, tall = sheet.shape[1] * inch, sheet.shape[0] * inch
            axes = figure.add_axes((left / PAGE_WIDTH, 0.05 / height, width / PAGE_WIDTH, tall / height))
            axes.imshow(sheet, interpolation="nearest", aspect="auto")
            axes.set(title=title, xticks=[], yticks=[])
            axes.grid(False)
            axes.spines[:].set_visible(False)
            left += width + gap
        middles = (np.arange(len(class_names)) + 0.5) * sheets[0].shape[0] / len(class_names)
        figure.axes[0].set_yticks(middles, class_names, color=INK, fontsize=11)
        figure.axes[0].tick_params(length=0, pad=6)
        _save(figure, path)


def _sheet(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Classes in rows; small images enlarged, so that the gap is thin beside them."""
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
    """Centred mean over `window` values, over fewer at the ends."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def _plain_log_labels(axes: "Axes") -> None:
    """0.02, 0.05, 0.1 rather than powers of ten, on a scale that often spans only one of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _panels(count: int) -> tuple["Figure", list["Axes"]]:
    figure = _figure(height=3.9)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _figure(height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(PAGE_WIDTH, height), dpi=DOTS_PER_INCH, facecolor="white")


def _style() -> AbstractContextManager[None]:
    import matplotlib

    return matplotlib.rc_context(STYLE)


def _save(figure: "Figure", path: str | Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    write_with(path, lambda temporary: FigureCanvasAgg(figure).print_png(temporary))
