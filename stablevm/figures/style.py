"""The style of all figures, with matplotlib's object-oriented interface, without global state or a display.

Figures are PNG files with 200 dots per inch, shown at half their size in pixels, where text is 13 to 16 px high.
"""

import io
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stablevm.support.files import write_with
from stablevm.support.text import caption

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 200
PAGE_WIDTH = 10.0  # inches: 1000 px on the page
PART_OF_A_DECADE = 6  # the largest ratio of the ends of a log axis at which 1, 2, 5 could be a single label
HALF_WIDTH = 4.8  # of pictures that stand side by side on a page, and below each other on a phone
# Okabe and Ito's palette, whose colours can be distinguished with every kind of colour vision.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
METHOD_COLOURS = {"CFM": VERMILION, "StableVM": BLUE, "STF": GREEN}
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
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": SOFT_INK,
    "ytick.color": SOFT_INK,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
}


def plain_log_labels(axes: "Axes") -> None:
    """Label a log axis 0.02, 0.05, 0.1 instead of by powers of ten, of which it often spans only one or none.

    A part of a decade gets more labels: 0.8, 1, 1.2.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    class Few(LogLocator):
        def tick_values(self, vmin: float, vmax: float) -> Any:
            low, high = sorted((vmin, vmax))
            self.set_params(
                subs=(1, 2, 5) if high > PART_OF_A_DECADE * low else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8)
            )
            return super().tick_values(vmin, vmax)

    axes.yaxis.set_major_locator(Few())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def panels(
    columns: int, rows: int = 1, row_height: float = 3.9, width: float = PAGE_WIDTH
) -> tuple["Figure", list["Axes"]]:
    """A figure of that width in inches, and its axes row by row."""
    figure = new_figure(height=rows * row_height, width=width)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def new_figure(height: float, width: float = PAGE_WIDTH) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white")


def style() -> AbstractContextManager[None]:
    import matplotlib

    return matplotlib.rc_context(STYLE)


def plain(text: str) -> str:
    """Untrusted text, such as the name of a class, for a figure: one line that is not read as a formula."""
    return caption(text).replace("$", r"\$")


def save_figure(figure: "Figure", path: str | Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    content = io.BytesIO()  # in memory first, because Pillow may report disk errors without an error number
    FigureCanvasAgg(figure).print_png(content)
    write_with(path, lambda temporary: temporary.write_bytes(content.getbuffer()))
