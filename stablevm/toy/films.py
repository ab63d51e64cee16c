"""Animations of the toy study: predicted and exact fields on a plane, and samples on their way from noise to data."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stablevm.figures.toy import plot_fields, plot_film, plot_paths
from stablevm.interpolant import LINEAR
from stablevm.solvers.fixed_steps import ode_times
from stablevm.support import rng
from stablevm.toy.config import ToyConfig
from stablevm.toy.mixture import GaussianMixture
from stablevm.toy.network import ToyNetwork
from stablevm.toy.training import mixture_of, to_field

FRAME_TIMES = np.linspace(0.95, 0.1, 18)
ARROWS, REACH = 17, 1.6  # arrows per side of the plane, which spans [-REACH, REACH] in both coordinates
PATHS, PATH_STEPS, SHOWN_STEPS = 400, 200, 25


def make_films(config: ToyConfig, network: ToyNetwork, name: str, seed: int) -> list[Path]:
    """Write `NAME/field-*.png`, `NAME-field.gif`, `NAME/path-*.png` and `NAME-paths.gif`; return the GIFs."""
    mixture = mixture_of(config, seed)
    folder = config.output_dir / name
    fields = [folder / f"field-{number:02d}.png" for number in range(len(FRAME_TIMES))]
    for path, t in zip(fields, FRAME_TIMES.tolist(), strict=True):
        grid, predicted, exact = _fields(config, network, mixture, t)
        shown = {"predicted": predicted, "exact": exact, "difference": predicted - exact}
        plot_fields(grid.numpy(), {title: field[:, :2].numpy() for title, field in shown.items()}, t,
                    config.vector_field, path)  # fmt: skip
    paths = []
    for number, (t, ours, exact) in enumerate(_trajectories(config, network, mixture, seed)):
        paths.append(folder / f"path-{number:02d}.png")
        plot_paths({"network": ours.numpy(), "exact field": exact.numpy()}, mixture.means.numpy(), t, paths[-1])
    gifs = [config.output_dir / f"{name}-field.gif", config.output_dir / f"{name}-paths.gif"]
    for gif, frames in zip(gifs, (fields, paths), strict=True):
        plot_film(gif, frames)
    return gifs


@torch.no_grad()
def _fields(
    config: ToyConfig, network: ToyNetwork, mixture: GaussianMixture, t: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Points (n, 2) of the plane of the first two coordinates through the mixture's mean, and the network's field and
    the exact field there, float64 (n, d).
    """
    axis = torch.linspace(-REACH, REACH, ARROWS)
    grid = torch.cartesian_prod(axis, axis)
    points = (mixture.weights @ mixture.means).repeat(len(grid), 1)
    points[:, :2] = grid
    time = torch.full((len(points),), t)
    velocity = mixture.field(LINEAR, points, t)
    return grid, network(points, time).double(), to_field(config, velocity, points.double(), time.double())


@torch.no_grad()
def _trajectories(
    config: ToyConfig, network: ToyNetwork, mixture: GaussianMixture, seed: int
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Yield times, and samples (PATHS, d) of the network's ODE and of the exact one, by Euler's method.

    Both start from the same noise, which is taken as x_t one step below t = 1, because at t = 1 the score does not
    depend on the data.
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
