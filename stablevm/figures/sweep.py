"""The figure of a sweep: a distance over one setting, with a line for each combination of the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stablevm.figures.style import SOFT_INK, new_figure, save_figure, style

WIDTH, HEIGHT = 8.0, 4.6  # inches
MOST_IN_LEGEND = 12
TITLES = {"fid": "FID", "frechet_distance": "Fréchet distance", "frechet_test": "Fréchet distance to the test split"}


@dataclass(frozen=True)
class Line:
    """A line of the figure; points: (setting, distance), ascending; ticks: names of the settings 0, 1, ... if words."""

    label: str
    points: Sequence[tuple[float, float]]
    ticks: Sequence[str] = ()


def plot_sweep(lines: Sequence[Line], axis: str, distance: str, path: Path) -> None:
    """Plot the lines, which are coloured in order, and mark the lowest point of all."""
    import matplotlib

    with style():
        figure = new_figure(HEIGHT, WIDTH)
        figure.set_layout_engine("constrained")
        panel = figure.subplots()
        colours = matplotlib.colormaps["viridis"]
        for number, line in enumerate(lines):
            xs, ys = zip(*line.points, strict=True)
            panel.plot(
                xs, ys, marker="o", markersize=4, color=colours(0.9 * number / max(1, len(lines) - 1)), label=line.label
            )
        x, y = min((point for line in lines for point in line.points), key=lambda point: point[1])
        panel.plot(
            [x], [y], marker="o", markersize=11, markerfacecolor="none", markeredgecolor=SOFT_INK, linestyle="none"
        )
        panel.annotate(f"{y:.4g}", (x, y), xytext=(0, -18), textcoords="offset points", ha="center", color=SOFT_INK)
        panel.margins(y=0.18)
        panel.set(xlabel=axis, ylabel=TITLES.get(distance, distance))
        if lines[0].ticks:
            panel.set_xticks(range(len(lines[0].ticks)), lines[0].ticks)
        if len(lines) > 1:
            columns = 1 if len(lines) <= MOST_IN_LEGEND else 2
            figure.legend(loc="outside right upper", fontsize=8.5, ncols=columns)
        save_figure(figure, path)
