"""Moving pictures: predicted, exact and difference fields on a plane, and samples on their way from noise to data."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablevm.figures.style import BLUE, GREEN, SOFT_INK, VERMILION, panels, save_figure, style
from stablevm.figures.toy import FIELD_NAMES
from stablevm.interpolant import LINEAR
from stablevm.solvers.fixed_steps import ode_times
from stablevm.support import rng
from stablevm.support.images import save_gif
from stablevm.toy.config import ToyConfig
from stablevm.toy.mixture import GaussianMixture
from stablevm.toy.network import ToyNetwork
from stablevm.toy.training import mixture_of, to_field

FRAME_TIMES = np.linspace(0.95, 0.1, 18)
ARROWS, REACH = 17, 1.6  # arrows per side of the plane, which spans [-REACH, REACH] in both coordinates
PATHS, PATH_STEPS, SHOWN_STEPS = 400, 200, 25
FRAME_MILLISECONDS = 160


def visualize(config: ToyConfig, network: ToyNetwork, name: str, seed: int) -> list[Path]:
    """Write `NAME/field-*.png` with `NAME-field.gif`, and `NAME/path-*.png` with `NAME-paths.gif`; returns the GIFs."""
    mixture = mixture_of(config, seed)
    folder = config.output_dir / name
    fields = [folder / f"field-{number:02d}.png" for number in range(len(FRAME_TIMES))]
    for path, t in zip(fields, FRAME_TIMES.tolist(), strict=True):
        _field_frame(config, network, mixture, t, path)
    paths = []
    for number, (t, ours, exact) in enumerate(_trajectories(config, network, mixture, seed)):
        paths.append(folder / f"path-{number:02d}.png")
        _path_frame(t, ours, exact, mixture, paths[-1])
    gifs = [config.output_dir / f"{name}-field.gif", config.output_dir / f"{name}-paths.gif"]
    for gif, frames in zip(gifs, (fields, paths), strict=True):
        _write_gif(gif, frames)
    return gifs


def _plane(mixture: GaussianMixture) -> tuple[Tensor, Tensor]:
    """The plane of the first two coordinates through the mixture's mean: grid (n, 2) and points (n, d)."""
    axis = torch.linspace(-REACH, REACH, ARROWS)
    grid = torch.cartesian_prod(axis, axis)
    points = (mixture.weights @ mixture.means).repeat(len(grid), 1)
    points[:, :2] = grid
    return grid, points


@torch.no_grad()
def _field_frame(config: ToyConfig, network: ToyNetwork, mixture: GaussianMixture, t: float, path: Path) -> None:
    grid, points = _plane(mixture)
    time = torch.full((len(points),), t)
    predicted = network(points, time).double()
    velocity = mixture.field(LINEAR, points, t)
    exact = to_field(config, velocity, points.double(), time.double())
    length = exact.norm(dim=1).quantile(0.9).item()  # one scale for all three, so that their arrows compare
    with style():
        figure, axes = panels(3, row_height=3.9)
        shown = (("predicted", predicted, BLUE), ("exact", exact, GREEN), ("difference", predicted - exact, VERMILION))
        for panel, (title, field, colour) in zip(axes, shown, strict=True):
            x, y = grid.T.numpy()
            u, v = field[:, :2].T.numpy()
            panel.quiver(x, y, u, v, color=colour, angles="xy", scale=length * 12, width=0.005)
            panel.set(title=f"{title}, t = {t:.2f}", xlabel="x₁", aspect="equal")
        axes[0].set_ylabel("x₂")
        figure.suptitle(
            f"{FIELD_NAMES[config.vector_field]} on a plane through the mean of the mixture", x=0.02, ha="left"
        )
        save_figure(figure, path)


@torch.no_grad()
def _trajectories(
    config: ToyConfig, network: ToyNetwork, mixture: GaussianMixture, seed: int
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Times, and samples of the network's and of the exact ODE (PATHS, d) from the same noise, by Euler's method.

    The noise stands for x_t one step below t = 1, because at t = 1 itself the score says nothing of the data.
    """
    noise = torch.randn(PATHS, config.dimension, generator=rng.generator(seed, "paths"))
    ours, exact = noise.double(), noise.double()
    times = ode_times(PATH_STEPS)[1:]
    for step, (t, after) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True)):
        if step % (PATH_STEPS // SHOWN_STEPS) == 0:
            yield t, ours, exact
        predicted = network(ours.float(), torch.full((PATHS,), t)).double()
        if config.vector_field == "score":
            predicted = LINEAR.convert(-predicted, ours, torch.tensor(t, dtype=torch.float64), "noise", "velocity")
        ours = ours + (after - t) * predicted
        exact = exact + (after - t) * mixture.field(LINEAR, exact, t)
    yield 0.0, ours, exact


def _path_frame(t: float, ours: Tensor, exact: Tensor, mixture: GaussianMixture, path: Path) -> None:
    limit = 3.0
    with style():
        figure, axes = panels(2, row_height=4.8)
        for panel, (title, x, colour) in zip(
            axes, (("network", ours, BLUE), ("exact field", exact, GREEN)), strict=True
        ):
            panel.scatter(
                mixture.means[:, 0].numpy(),
                mixture.means[:, 1].numpy(),
                s=18,
                marker="+",
                color=SOFT_INK,
                label="component means",
            )
            panel.scatter(x[:, 0].numpy(), x[:, 1].numpy(), s=7, color=colour, alpha=0.7, label="samples")
            panel.set(
                title=f"{title}, t = {t:.2f}", xlabel="x₁", aspect="equal", xlim=(-limit, limit), ylim=(-limit, limit)
            )
            panel.legend(loc="upper right", fontsize=8.5)
        axes[0].set_ylabel("x₂")
        save_figure(figure, path)


def _write_gif(path: Path, frames: list[Path]) -> None:
    from PIL import Image

    def halved(frame: Path) -> NDArray[np.uint8]:
        image = Image.open(frame).convert("RGB")
        return np.asarray(image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS))

    save_gif(path, map(halved, frames), FRAME_MILLISECONDS)
