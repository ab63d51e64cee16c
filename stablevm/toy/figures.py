"""Figures of the toy study."""

from pathlib import Path
from typing import Any

import numpy as np

from stablevm.plotting import BLUE, GREEN, SOFT_INK, VERMILION, panels, plain_log_labels, save_figure, style
from stablevm.toy.config import Method
from stablevm.toy.results import Result
from stablevm.variance import VarianceCurve

COLOURS: dict[Method, str] = {"cfm": VERMILION, "stf": GREEN, "stable_vm": BLUE, "stable_vm_efficient": "#CC79A7"}
LABELS: dict[Method, str] = {
    "cfm": "CFM",
    "stf": "STF",
    "stable_vm": "StableVM",
    "stable_vm_efficient": "StableVM, streamed",
}
FIELD_NAMES = {"velocity": "velocity", "score": "score times sigma"}
COLUMNS = 3
LEGEND_ROOM = 1.6  # height of a panel in terms of its highest curve
LOG_SPAN = 5.0  # from this ratio of the largest to the smallest value on


def divergence_figure(results: dict[Method, list[Result]], vector_field: str, path: Path) -> None:
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


def _divergence_line(panel: Any, method: Method, runs: list[Result], column: int) -> None:
    updates = runs[0].updates
    values = np.array([[row[column] for row in run.divergence] for run in runs])
    panel.plot(updates, values.mean(0), color=COLOURS[method], label=LABELS[method], linewidth=1.6)
    panel.fill_between(updates, values.min(0), values.max(0), color=COLOURS[method], alpha=0.15, linewidth=0)


def variance_figure(curves: dict[str, VarianceCurve], path: Path) -> None:
    """One row per distribution: variances with their bands and the split point; the effective sample size."""
    with style():
        figure, axes = panels(2, len(curves), row_height=2.9)
        for row, (title, curve) in enumerate(curves.items()):
            _variance_panel(axes[2 * row], title, curve)
            _ess_panel(axes[2 * row + 1], curve)
        for panel in axes[-2:]:
            panel.set_xlabel("time t  (0 data, 1 noise)")
        save_figure(figure, path)


def _variance_panel(panel: Any, title: str, curve: VarianceCurve) -> None:
    lines = (
        ("CFM", curve.cfm, curve.cfm_band, VERMILION),
        (f"StableVM, {curve.references:,} references", curve.stablevm, curve.stablevm_band, BLUE),
    )
    for label, mean, band, colour in lines:
        low, high = zip(*band, strict=True)
        panel.fill_between(curve.t, low, high, color=colour, alpha=0.15, linewidth=0)
        panel.plot(curve.t, mean, color=colour, marker="o", markersize=3, label=label)
    split = curve.split_point()
    panel.axvline(split, color=SOFT_INK, linestyle=(0, (4, 3)), linewidth=1.2, label=f"split point ξ = {split:.2f}")
    highest = max(high for _, high in curve.cfm_band)
    panel.set(title=title, ylabel="variance per dimension", xlim=(0, 1), ylim=(0, LEGEND_ROOM * highest))
    panel.legend(loc="upper left", fontsize=8.5)


def _ess_panel(panel: Any, curve: VarianceCurve) -> None:
    panel.axhline(curve.references, color=SOFT_INK, linestyle=(0, (4, 3)), linewidth=1.2, label="all references")
    panel.plot(curve.t, curve.ess, color=GREEN, marker="o", markersize=3, label="effective")
    panel.set(title="Effective sample size", ylabel="number of references", xlim=(0, 1), yscale="log")
    panel.set_ylim(0.9, 1.5 * curve.references)
    plain_log_labels(panel)
    panel.legend(loc="center left", fontsize=8.5)
