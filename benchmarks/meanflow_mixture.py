"""MeanFlow on a Gaussian mixture: the velocities of CFM compared with StableVM's, for powers of the adaptive weight.

    python benchmarks/meanflow_mixture.py [--seeds 5] [--updates 2000] [--powers 1.0 0.5 0.0] [--output FILE.json]

For each number of sampling steps it prints the sliced Wasserstein distance of the samples to the mixture (mean and
standard error over seeds), and the variance of the gradient of the plain squared error at equal parameters: those of
the run with CFM. (The adaptive weight would scale the gradients of both velocities differently.)
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn

from stablevm import FlowMatching, MeanFlow, ObjectiveSettings, StableTargetField
from stablevm.draw import Draw
from stablevm.interpolant import LINEAR
from stablevm.solvers.integration import integrate
from stablevm.solvers.settings import SamplerSettings
from stablevm.support import rng
from stablevm.support.files import write_json
from stablevm.support.machine import describe_machine
from stablevm.toy.mixture import GaussianMixture, published_mixture
from stablevm.training.weights import MovingAverage

SETTINGS = ObjectiveSettings(weighting="logit_normal", instant_share=0.5)
REFERENCES, BATCH, WIDTH, SAMPLES, DIRECTIONS = 2048, 256, 256, 10_000, 200
VELOCITIES = ("CFM", "StableVM")
STEPS = (1, 2, 4)


@dataclass(frozen=True)
class Options:
    """Compare the velocities."""

    seeds: int = 5
    updates: int = 2000
    powers: tuple[float, ...] = (1.0, 0.5, 0.0)
    dimension: int = 10
    components: int = 20
    batches: int = 64
    """Batches from which the variance of the gradient is estimated."""
    output: Path | None = None
    """A JSON file of all numbers."""


class Network(nn.Module):
    """A perceptron of x, t and t - r, whose weights are drawn from a generator."""

    def __init__(self, dimension: int, generator: torch.Generator) -> None:
        super().__init__()
        sizes = [dimension + 2, WIDTH, WIDTH, WIDTH, dimension]
        self.layers = nn.ModuleList(nn.utils.skip_init(nn.Linear, *pair) for pair in pairwise(sizes))
        for layer in self.layers:
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None, *, r: Tensor) -> Tensor:
        h = torch.cat([x, t[:, None], (t - r)[:, None]], dim=1)
        for layer in self.layers[:-1]:
            h = nn.functional.silu(layer(h))
        return self.layers[-1](h)


def draws(velocity: str, mixture: GaussianMixture, generator: torch.Generator) -> Callable[[], Draw]:
    """A function that draws a batch; both velocities perturb the first samples of a set, at the same times."""

    def draw() -> Draw:
        x0 = mixture.sample(REFERENCES, generator)
        if velocity == "CFM":
            return FlowMatching(SETTINGS).draw(x0[:BATCH], torch.zeros(BATCH, dtype=torch.int64), generator)
        return StableTargetField(SETTINGS).draw(x0, None, generator, anchors=torch.arange(BATCH))

    return draw


def trained(options: Options, velocity: str, power: float, seed: int, mixture: GaussianMixture) -> MovingAverage:
    network = Network(options.dimension, rng.generator(seed, "network"))
    meanflow, average = MeanFlow(power=power), MovingAverage(network, 0.995)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    draw_next = draws(velocity, mixture, rng.generator(seed, "training"))
    for update in range(options.updates):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * update / options.updates))
        loss_of(meanflow, network, draw_next()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update(network, update)
    return average


def loss_of(meanflow: MeanFlow, network: nn.Module, draw: Draw) -> Tensor:
    target = meanflow.target(network, draw)
    return meanflow.loss(network(draw.x_t, draw.t, r=draw.r), target).mean()


@torch.no_grad()
def distances(network: nn.Module, mixture: GaussianMixture, seed: int) -> dict[str, float]:
    """The sliced distance of samples made in each number of steps, from the same noise."""
    directions = torch.randn(DIRECTIONS, mixture.dimension, generator=rng.generator(seed, "directions"))
    directions = directions / directions.norm(dim=1, keepdim=True)
    noise = torch.randn(SAMPLES, mixture.dimension, generator=rng.generator(seed, "noise"))

    def mean_velocity(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return network(x, t.float().expand(len(x)), r=r.float().expand(len(x)))

    found = {}
    for steps in STEPS:
        end = integrate(mean_velocity, lambda: noise, LINEAR, SamplerSettings(mode="meanflow", num_steps=steps))
        found[str(steps)] = mixture.sliced_distance(end, directions)
    return found


def gradient_variance(options: Options, network: nn.Module, velocity: str, seed: int) -> float:
    """The variance of the gradient of a batch's mean squared error, summed over parameters."""
    network.requires_grad_(True)
    draw_next = draws(velocity, mixture_of(options, seed), rng.generator(seed, "gradient"))
    gradients = []
    for _ in range(options.batches):
        loss = loss_of(MeanFlow(power=0.0), network, draw_next())
        parts = torch.autograd.grad(loss, list(network.parameters()))
        gradients.append(torch.cat([part.flatten() for part in parts]))
    return float(torch.stack(gradients).var(dim=0).sum())


def mixture_of(options: Options, seed: int) -> GaussianMixture:
    return published_mixture(options.components, options.dimension, rng.generator(seed, "mixture"))


def main(options: Options) -> None:
    results: dict[str, list[dict[str, float]]] = {}
    for seed in range(options.seeds):
        mixture = mixture_of(options, seed)
        for power in options.powers:
            variances = {}
            for velocity in VELOCITIES:
                average = trained(options, velocity, power, seed, mixture)
                results.setdefault(f"{velocity}, power {power:g}", []).append(distances(average.model, mixture, seed))
                if velocity == "CFM":
                    at = average.model
                variances[velocity] = gradient_variance(options, at, velocity, seed)
                results[f"{velocity}, power {power:g}"][-1]["gradient variance"] = variances[velocity]
        if options.output:
            write_json(options.output, {"options": shown(options), "results": results})
    print(describe_machine())
    print_table(results)


def print_table(results: dict[str, list[dict[str, float]]]) -> None:
    print("| velocities | 1 step | 2 steps | 4 steps | variance of the gradient |\n| --- | --- | --- | --- | --- |")
    for arm, runs in results.items():
        cells = [
            f"{statistics.fmean(values):.4g} +- {statistics.stdev(values) / math.sqrt(len(values)):.2g}"
            if len(values) > 1
            else f"{values[0]:.4g}"
            for key in (*map(str, STEPS), "gradient variance")
            for values in [[run[key] for run in runs]]
        ]
        print(f"| {arm} | {' | '.join(cells)} |")


def shown(options: Options) -> dict[str, object]:
    return {name: value for name, value in vars(options).items() if name != "output"}


if __name__ == "__main__":
    main(tyro.cli(Options))
