"""Figures of the toy study."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stablevm.figures.style import BLUE, GREEN, VERMILION, panels, plain_log_labels, save_figure, style

COLOURS = {"cfm": VERMILION, "stf": GREEN, "stable_vm": BLUE, "stable_vm_efficient": "#CC79A7"}
LABELS = {
    "cfm": "CFM",
    "stf": "STF",
    "stable_vm": "StableVM",
    "stable_vm_efficient": "StableVM, streamed",
}
FIELD_NAMES = {"velocity": "velocity", "score": "score times sigma"}
COLUMNS = 3
LOG_SPAN = 5.0  # from this ratio of the largest to the smallest value on


class Run(Protocol):
    """What a training of the toy study measured: `divergence[i][j]` after updates[i] at times[j]."""

    @property
    def updates(self) -> Sequence[int]: ...
    @property
    def times(self) -> Sequence[float]: ...
    @property
    def divergence(self) -> Sequence[Sequence[float]]: ...


def divergence_figure(results: Mapping[Any, Sequence[Run]], vector_field: str, path: Path) -> None:
    """One panel per time: the divergence over updates, mean over seeds, with the range of the seeds as a band."""
    times = next(iter(results.values()))[0].times
    with style():
        figure, axes = panels(COLUMNS, -(-len(times) // COLUMNS), row_height=2.6)
        for column, (time, panel) in enumerate(zip(times, axes, strict=False)):
            for method, runs in results.items():
                _divergence_line(panel, method, runs, column)
            panel.set_title(f"t = {time:g}")
            _choose_scale(panel)
            if column % COLUMNS == 0:
                panel.set_ylabel("Fisher divergence")
            if column >= len(times) - COLUMNS:
                panel.set_xlabel("update")
        for panel in axes[len(times) :]:
            panel.set_visible(False)
        axes[0].legend(loc="upper right")
        seeds = max(len(runs) for runs in results.values())
        figure.suptitle(
            f"E |predicted - exact|², {FIELD_NAMES[vector_field]}: mean and range of {seeds} seed{'s' * (seeds > 1)}",
            x=0.02, ha="left", fontsize=11,
        )  # fmt: skip
        save_figure(figure, path)


def _choose_scale(panel: Any) -> None:
    """Logarithmic where the values span much of a decade; a scale of less has no round numbers on it."""
    low, high = panel.dataLim.intervaly
    if high > LOG_SPAN * low:
        panel.set_yscale("log")
        plain_log_labels(panel)


def _divergence_line(panel: Any, method: str, runs: Sequence[Run], column: int) -> None:
    updates = runs[0].updates
    values = np.array([[row[column] for row in run.divergence] for run in runs])
    panel.plot(updates, values.mean(0), color=COLOURS[method], label=LABELS[method], linewidth=1.6)
    panel.fill_between(updates, values.min(0), values.max(0), color=COLOURS[method], alpha=0.15, linewidth=0)
