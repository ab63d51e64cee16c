"""The figure of variance curves."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stablevm.figures.style import (
    BLUE,
    GREEN,
    HALF_WIDTH,
    SOFT_INK,
    VERMILION,
    panels,
    plain_log_labels,
    save_figure,
    style,
)
from stablevm.variance import VarianceCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEGEND_ROOM = 1.7  # height of a panel in terms of its highest curve
LOG_LEGEND_ROOM = 1.4  # the same on a logarithmic scale
TIME = "time t  (0 data, 1 noise)"
DASHES, DOTS = (0, (4, 3)), (0, (1, 1.5))


def plot_variance(
    curves: Mapping[str, VarianceCurve], path: Path, taus: Mapping[str, float] | None = None, target: str = ""
) -> None:
    """Plot variance curves, one row per distribution, by title.

    On the left are the variances with their bands, the split point and, if given, tau; on the right the effective
    sample size. target: the kind of target, if it is not the velocity.
    """
    with style():
        figure, axes = panels(2, len(curves), row_height=2.9)
        for row, (title, curve) in enumerate(curves.items()):
            _variance_panel(axes[2 * row], title, curve, (taus or {}).get(title))
            axes[2 * row].set_ylabel("variance per dimension" + (f" of {target}" if target else ""))
            _ess_panel(axes[2 * row + 1], curve)
        for panel in axes[-2:]:
            panel.set_xlabel(TIME)
        save_figure(figure, path)


def plot_variance_alone(curve: VarianceCurve, title: str, path: Path) -> None:
    """The variances of one distribution, half a page wide."""
    with style():
        figure, (panel,) = panels(1, row_height=3.2, width=HALF_WIDTH)
        _variance_panel(panel, title, curve, None)
        panel.set(xlabel=TIME, ylabel="variance per dimension")
        save_figure(figure, path)


def plot_effective_size(curve: VarianceCurve, path: Path) -> None:
    """How many references take part over time, half a page wide."""
    with style():
        figure, (panel,) = panels(1, row_height=3.2, width=HALF_WIDTH)
        _ess_panel(panel, curve)
        panel.set_xlabel(TIME)
        save_figure(figure, path)


def _variance_panel(panel: "Axes", title: str, curve: VarianceCurve, tau: float | None) -> None:
    lines = (
        ("CFM", curve.cfm, curve.cfm_band, VERMILION),
        (f"StableVM, {curve.references:,} references", curve.stablevm, curve.stablevm_band, BLUE),
    )
    for label, mean, band, colour in lines:
        low, high = zip(*band, strict=True)
        panel.fill_between(curve.t, low, high, color=colour, alpha=0.15, linewidth=0)
        panel.plot(curve.t, mean, color=colour, marker="o", markersize=3, label=label)
    split = curve.split_point()
    line = {"ymax": 1 / LEGEND_ROOM, "linewidth": 1.4}  # up to the highest curve: the legend stands above
    panel.axvline(split, color=SOFT_INK, linestyle=DASHES, label=f"split point ξ = {split:.2f}", **line)
    if tau is not None:
        panel.axvline(tau, color=GREEN, linestyle=DOTS, label=f"half the variance unexplained, τ = {tau:.2f}", **line)
    highest = max(high for _, high in curve.cfm_band)
    panel.set(title=title, xlim=(0, 1), ylim=(0, LEGEND_ROOM * highest))
    panel.legend(loc="upper left", fontsize=8.5)


def _ess_panel(panel: "Axes", curve: VarianceCurve) -> None:
    label = f"all {curve.references:,} references"
    panel.axhline(curve.references, color=SOFT_INK, linestyle=DASHES, linewidth=1.2, label=label)
    panel.plot(curve.t, curve.ess, color=GREEN, marker="o", markersize=3, label="effective number")
    panel.set(title="Effective sample size", ylabel="references (log scale)", xlim=(0, 1), yscale="log")
    panel.set_ylim(0.9, 1.2 * curve.references**LOG_LEGEND_ROOM)
    plain_log_labels(panel)
    panel.legend(loc="upper left", fontsize=8.5)
