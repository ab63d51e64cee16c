"""The schedulers of StableVS for diffusers against their base classes, on mixtures whose flow is known in closed form.

    python benchmarks/schedulers.py [--dimensions 2 16 64] [--seeds 3] [--points 200] [--shift 3.0] [--output FILE.json]

At equal numbers of evaluations it prints the root mean square distance of the samples to the ends of their exact
trajectories (Heun's method, 400 steps), divided by the root mean square of those ends: mean and standard deviation over
mixtures. StableVS takes 9 of 20 steps below the split of 0.85, as published. "history kept" has `keep_history` True,
other rows of multistep solvers have it False; "even" has `grid_below` "even".
"""

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from stablevm import (
    StableVSDPMSolverMultistepScheduler,
    StableVSFlowMatchScheduler,
    StableVSUniPCMultistepScheduler,
)
from stablevm.interpolant import LINEAR
from stablevm.solvers.fixed_steps import heun, ode_times
from stablevm.support import rng
from stablevm.support.files import write_json
from stablevm.support.machine import describe_machine
from stablevm.toy.mixture import GaussianMixture, published_mixture

EVALUATIONS = (10, 15, 20, 30)
SHARE_BELOW = 9 / 20
EVEN_AND_KEPT = {"grid_below": "even", "keep_history": True}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@dataclass(frozen=True)
class Options:
    """Compare the schedulers."""

    dimensions: tuple[int, ...] = (2, 16, 64)
    seeds: int = 3
    points: int = 200
    shift: float = 3.0
    components: int = 20
    output: Path | None = None
    """A JSON file of all numbers."""


def rivals(shift: float) -> dict[str, tuple[type, dict[str, Any]]]:
    """Each column: a class and its arguments."""
    return {
        "Euler": (FlowMatchEulerDiscreteScheduler, {"shift": shift}),
        "StableVS": (StableVSFlowMatchScheduler, {"shift": shift}),
        "even, StableVS": (StableVSFlowMatchScheduler, {"shift": shift, "grid_below": "even"}),
        "DPM-Solver++": (DPMSolverMultistepScheduler, {"flow_shift": shift, **FLOW}),
        "StableVS, DPM-Solver++": (StableVSDPMSolverMultistepScheduler, {"shift": shift, "keep_history": False}),
        "history kept, DPM-Solver++": (StableVSDPMSolverMultistepScheduler, {"shift": shift, "keep_history": True}),
        "even and kept, DPM-Solver++": (StableVSDPMSolverMultistepScheduler, {"shift": shift, **EVEN_AND_KEPT}),
        "UniPC": (UniPCMultistepScheduler, {"flow_shift": shift, **FLOW}),
        "StableVS, UniPC": (StableVSUniPCMultistepScheduler, {"shift": shift, "keep_history": False}),
        "history kept, UniPC": (StableVSUniPCMultistepScheduler, {"shift": shift, "keep_history": True}),
        "even and kept, UniPC": (StableVSUniPCMultistepScheduler, {"shift": shift, **EVEN_AND_KEPT}),
    }


def ready(kind: type, given: dict[str, Any], evaluations: int) -> Any:
    """A scheduler that evaluates the network so many times: StableVS is asked for as many steps as that takes."""
    if "StableVS" in kind.__name__:
        given = {**given, "split_time": 0.85, "steps_below": round(SHARE_BELOW * evaluations)}
    scheduler = kind(**given)
    for steps in range(evaluations, 10 * evaluations):
        scheduler.set_timesteps(steps)
        if len(scheduler.timesteps) == evaluations:
            return scheduler
    raise ValueError(f"{kind.__name__}: no number of steps gives {evaluations} evaluations")


def ends(scheduler: Any, mixture: GaussianMixture, x: Tensor) -> Tensor:
    for t, sigma in zip(list(scheduler.timesteps), scheduler.sigmas.tolist(), strict=False):
        x = scheduler.step(mixture.field(LINEAR, x.double(), sigma), t, x).prev_sample.double()
    return x


def errors(options: Options, dimension: int) -> Iterator[tuple[str, int, float]]:
    """Of each column, for each number of evaluations and each mixture."""
    for seed in range(options.seeds):
        mixture = published_mixture(options.components, dimension, rng.generator(seed, "mixture", dimension))
        x = torch.randn(
            options.points, dimension, generator=rng.generator(seed, "noise", dimension), dtype=torch.float64
        )
        exact = heun(lambda x, t, mixture=mixture: mixture.field(LINEAR, x, t), x, ode_times(400))
        for name, (kind, given) in rivals(options.shift).items():
            for evaluations in EVALUATIONS:
                found = ends(ready(kind, given, evaluations), mixture, x)
                yield name, evaluations, math.sqrt((found - exact).square().mean() / exact.square().mean())


def main(options: Options) -> None:
    rows = []
    print("| dimensions | scheduler | " + " | ".join(f"{count}" for count in EVALUATIONS) + " |")
    print("| --- | --- |" + " --- |" * len(EVALUATIONS))
    for dimension in options.dimensions:
        found: dict[str, dict[int, list[float]]] = {}
        for name, evaluations, error in errors(options, dimension):
            found.setdefault(name, {}).setdefault(evaluations, []).append(error)
        for name, columns in found.items():
            cells = [
                f"{statistics.mean(each):.3f} ± {statistics.stdev(each) if len(each) > 1 else 0:.3f}"
                for each in columns.values()
            ]
            print(f"| {dimension} | {name} | " + " | ".join(cells) + " |", flush=True)
            rows.append({"dimension": dimension, "scheduler": name, "errors": columns})
    if options.output is not None:
        write_json(options.output, {"machine": describe_machine(), "rows": rows})


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
