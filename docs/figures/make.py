"""Draw the figures of docs/idea.md from scikit-learn's handwritten digits:  python docs/figures/make.py"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from stablevm import LINEAR
from stablevm.figures.style import PAGE_WIDTH, SOFT_INK, new_figure, save_figure, style
from stablevm.posterior import posterior

if TYPE_CHECKING:
    from matplotlib.axes import Axes

IMAGES = Path(__file__).parents[1] / "images"
DIGIT = 0
TIMES = (0.2, 0.4, 0.6, 0.8, 0.95)
SHOWN = 7  # references with the largest weights
FEW = 16


def scans() -> Tensor:
    """All scans of the digit, (n, 64) in [-1, 1]."""
    digits = load_digits()
    return torch.tensor(digits.data[digits.target == DIGIT]) / 8 - 1


def draw(panel: "Axes", image: Tensor, title: str = "", limit: float = 1.0) -> None:
    panel.imshow(image.reshape(8, 8), cmap="gray", vmin=-limit, vmax=limit, interpolation="nearest")
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set_visible(False)
    panel.set_title(title, fontsize=10, fontweight="normal", loc="center", pad=4)


def weights_figure(digits: Tensor, noise: Tensor) -> None:
    """For each time: x_t, the references that most probably made it with their weights, and their weighted mean."""
    figure = new_figure(height=PAGE_WIDTH * len(TIMES) / (SHOWN + 2) * 1.12)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02)
    grid = figure.subplots(len(TIMES), SHOWN + 2)
    for row, t in zip(grid, TIMES, strict=True):
        x_t = (1 - t) * digits[0] + t * noise
        weights = (-(x_t - (1 - t) * digits).square().sum(1) / (2 * t**2)).softmax(0)
        draw(row[0], x_t, "$x_t$", limit=1 + t)
        row[0].set_ylabel(f"t = {t}", rotation=0, ha="right", va="center", color=SOFT_INK)
        for panel, index in zip(row[1:-1], weights.argsort(descending=True), strict=False):
            draw(panel, digits[index], f"{weights[index]:.1%}" + (" (own)" if index == 0 else ""))
        draw(row[-1], weights @ digits, f"mean of {1 / weights.square().sum():.1f}")
    save_figure(figure, IMAGES / "posterior-weights.png")


def targets_figure(digits: Tensor, noise: Tensor) -> None:
    """The data that each kind of target points at, E[x0 | x_t] as it is estimated, over time."""
    figure = new_figure(height=PAGE_WIDTH * 4 / (len(TIMES) + 1) * 0.97)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02)
    grid = figure.subplots(4, len(TIMES))
    x0, names = digits[:1], ("$x_t$", "CFM:\none sample", f"StableVM:\n{FEW} samples", f"all {len(digits)}\nsamples")
    for name, panel in zip(names, grid[:, 0], strict=True):
        panel.set_ylabel(name, rotation=0, ha="right", va="center", color=SOFT_INK)
    for column, t in zip(grid.T, TIMES, strict=True):
        time = torch.tensor([t])
        draw(column[0], LINEAR.interpolate(x0, noise, time), f"t = {t}", limit=1 + t)
        draw(column[1], x0)
        for panel, others in zip(column[2:], (digits[1:FEW], digits[1:]), strict=True):
            draw(panel, x0 - posterior(LINEAR, x0, noise[None], time, others).offset)
    save_figure(figure, IMAGES / "targets.png")


def main() -> None:
    digits, noise = scans(), torch.randn(64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with style():
        weights_figure(digits, noise)
        targets_figure(digits, noise)


if __name__ == "__main__":
    main()
