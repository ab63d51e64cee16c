"""Figures of the toy study: divergence over updates, and animations of fields and of samples as they form."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stablevm.figures.style import BLUE, GREEN, SOFT_INK, VERMILION, panels, plain_log_labels, save_figure, style
from stablevm.support.images import save_gif

COLOURS = {"cfm": VERMILION, "stf": GREEN, "stable_vm": BLUE, "stable_vm_efficient": "#CC79A7"}
LABELS = {
    "cfm": "CFM",
    "stf": "STF",
    "stable_vm": "StableVM",
    "stable_vm_efficient": "StableVM, streamed",
}
FIELD_NAMES = {"velocity": "velocity", "score": "score times sigma"}
COLUMNS = 3
LOG_SPAN = 5.0  # ratio of the largest to the smallest value from which the scale is logarithmic
PATHS_REACH = 3.0  # samples are shown on the plane from minus this to this, in both coordinates
FRAME_MILLISECONDS = 160


class Run(Protocol):
    """The measurements of a training run of the toy study: `divergence[i][j]` after updates[i] at times[j]."""

    @property
    def updates(self) -> Sequence[int]: ...
    @property
    def times(self) -> Sequence[float]: ...
    @property
    def divergence(self) -> Sequence[Sequence[float]]: ...


def plot_divergence(results: Mapping[Any, Sequence[Run]], vector_field: str, path: Path) -> None:
    """One panel per time: the divergence over updates, mean over seeds, with the range of several as a band."""
    times = next(iter(results.values()))[0].times
    with style():
        figure, axes = panels(COLUMNS, -(-len(times) // COLUMNS), row_height=2.6)
        for column, (time, panel) in enumerate(zip(times, axes, strict=False)):
            for method, runs in results.items():
                _divergence_line(panel, method, runs, column)
            panel.set_title(f"t = {time:g}, {_choose_scale(panel)} scale")
            if column % COLUMNS == 0:
                panel.set_ylabel("Fisher divergence")
            if column >= len(times) - COLUMNS:
                panel.set_xlabel("update")
        for panel in axes[len(times) :]:
            panel.set_visible(False)
        axes[0].legend(loc="upper right")
        title = f"E |predicted - exact|², {FIELD_NAMES[vector_field]}: {_seeds(max(map(len, results.values())))}"
        figure.suptitle(title, x=0.02, ha="left", fontsize=11)
        save_figure(figure, path)


def _choose_scale(panel: Any) -> str:
    """Logarithmic where the values span much of a decade; a scale of less has no round numbers on it. Returns which."""
    low, high = panel.dataLim.intervaly
    if high <= LOG_SPAN * low:
        return "linear"
    panel.set_yscale("log")
    plain_log_labels(panel)
    return "log"


def _seeds(count: int) -> str:
    """What a line and its band are; one seed has no range."""
    return "one seed" if count == 1 else f"mean and range of {count} seeds"


def _divergence_line(panel: Any, method: str, runs: Sequence[Run], column: int) -> None:
    updates = runs[0].updates
    values = np.array([[row[column] for row in run.divergence] for run in runs])
    panel.plot(updates, values.mean(0), color=COLOURS[method], label=LABELS[method], linewidth=1.6)
    if len(runs) > 1:
        panel.fill_between(updates, values.min(0), values.max(0), color=COLOURS[method], alpha=0.15, linewidth=0)


def plot_fields(
    grid: NDArray[np.float64], fields: Mapping[str, NDArray[np.float64]], t: float, vector_field: str, path: Path
) -> None:
    """Plot the fields "predicted", "exact" and "difference" (n, 2) as arrows at points of a plane, grid (n, 2).

    All have the scale of the exact field, so that their arrows can be compared.
    """
    length = float(np.quantile(np.linalg.norm(fields["exact"], axis=1), 0.9))
    with style():
        figure, axes = panels(3, row_height=3.9)
        for panel, (title, field), colour in zip(axes, fields.items(), (BLUE, GREEN, VERMILION), strict=True):
            panel.quiver(*grid.T, *field.T, color=colour, angles="xy", scale=length * 12, width=0.005)
            panel.set(title=f"{title}, t = {t:.2f}", xlabel="x₁", aspect="equal")
        axes[0].set_ylabel("x₂")
        figure.suptitle(f"{FIELD_NAMES[vector_field]} on a plane through the mean of the mixture", x=0.02, ha="left")
        save_figure(figure, path)


def plot_paths(samples: Mapping[str, NDArray[np.float64]], means: NDArray[np.float64], t: float, path: Path) -> None:
    """Plot samples (n, d) at time t, by title for the network and the exact field, with the components' means (K, d).

    Only the first two coordinates are shown.
    """
    with style():
        figure, axes = panels(2, row_height=4.8)
        for panel, (title, x), colour in zip(axes, samples.items(), (BLUE, GREEN), strict=True):
            panel.scatter(means[:, 0], means[:, 1], s=18, marker="+", color=SOFT_INK, label="component means")
            panel.scatter(x[:, 0], x[:, 1], s=7, color=colour, alpha=0.7, label="samples")
            panel.set(title=f"{title}, t = {t:.2f}", xlabel="x₁", aspect="equal")
            panel.set(xlim=(-PATHS_REACH, PATHS_REACH), ylim=(-PATHS_REACH, PATHS_REACH))
            panel.legend(loc="upper right", fontsize=8.5)
        axes[0].set_ylabel("x₂")
        save_figure(figure, path)


def plot_film(path: Path, frames: Sequence[Path]) -> None:
    """Write a GIF of frames, which are PNG files of equal size, at half that size."""
    from PIL import Image

    def halved(frame: Path) -> NDArray[np.uint8]:
        image = Image.open(frame).convert("RGB")
        return np.asarray(image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS))

    save_gif(path, map(halved, frames), FRAME_MILLISECONDS)
