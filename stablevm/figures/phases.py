"""The figure of what training steps cost, phase by phase."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from stablevm.figures.style import panels, save_figure, style

PHASES = ("data_wait", "draw", "encoder", "forward", "backward", "optimizer", "ema", "logging")
# The colours differ in hue and lightness; the phases that this library adds to a plain step stand out.
COLOURS = ("#9aa5b1", "#D55E00", "#E69F00", "#56B4E9", "#0072B2", "#009E73", "#CC79A7", "#616e7c")


class StepCost(Protocol):
    """The cost of a training step: the seconds of each phase, and images per second."""

    @property
    def name(self) -> str: ...
    @property
    def seconds(self) -> Mapping[str, float]: ...
    @property
    def images_per_second(self) -> float: ...


def plot_phases(costs: Sequence[StepCost], title: str, path: Path) -> None:
    """Plot a bar for each training, with the phases of its step in milliseconds."""
    with style():
        figure, (axes,) = panels(1, row_height=1.6 + 0.5 * len(costs))
        names = [cost.name for cost in costs]
        left = [0.0] * len(names)
        for phase, colour in zip(PHASES, COLOURS, strict=True):
            widths = [1e3 * cost.seconds.get(phase, 0.0) for cost in costs]
            axes.barh(names, widths, left=left, color=colour, label=phase.replace("_", " "))
            left = [start + width for start, width in zip(left, widths, strict=True)]
        for row, (end, cost) in enumerate(zip(left, costs, strict=True)):
            axes.text(end, row, f"  {figures_of(cost.images_per_second)} images/s", va="center")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, 1.18 * max(left))
        axes.set_xlabel("milliseconds per step")
        axes.set_title(title)
        figure.legend(loc="outside lower center", ncols=len(PHASES), fontsize=9)
        save_figure(figure, path)


def figures_of(value: float) -> str:
    """A number with three significant figures, or all those before the decimal point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
