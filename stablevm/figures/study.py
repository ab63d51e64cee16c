"""The figure of a study: the distance of each arm over the steps of training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from stablevm.figures.style import panels, plain, plain_log_labels, save_figure, style

# Okabe and Ito's colours, then the same with other lines.
_COLOURS = ("#D55E00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00")
_LINES = ("-", "--", ":")


class Mean(Protocol):
    """A mean with its standard error, if it is known."""

    @property
    def mean(self) -> float: ...
    @property
    def error(self) -> float | None: ...


def plot_comparison(curves: Mapping[str, Sequence[tuple[int, Mean]]], path: Path) -> None:
    """Plot the Fréchet distance of each arm over steps, with bars of one standard error."""
    with style():
        figure, (axes,) = panels(1, row_height=4.2)
        for number, (arm, points) in enumerate(curves.items()):
            if points:
                steps, means = zip(*points, strict=True)
                line, colour = _LINES[number // len(_COLOURS) % len(_LINES)], _COLOURS[number % len(_COLOURS)]
                errors = [mean.error or 0.0 for mean in means]
                axes.errorbar(steps, [mean.mean for mean in means], errors, label=plain(arm), color=colour,
                              linestyle=line, marker="o", markersize=4, capsize=3)  # fmt: skip
        axes.set_yscale("log")
        plain_log_labels(axes)
        axes.set_xlabel("training steps")
        axes.set_ylabel("Fréchet distance to the test images (log scale)")
        axes.legend(fontsize=9)
        save_figure(figure, path)
