"""Distance of samples, by number of network evaluations, for every sampler.

    python benchmarks/solvers.py mixture
    python benchmarks/solvers.py dimensions
    python benchmarks/solvers.py digits QUICKSTART_FOLDER ...

mixture: the mixture of the toy study with its exact velocity; sliced Wasserstein-1 distance, three seeds.
dimensions: the same mixture in more dimensions; root mean square distance to the end of the exact trajectory, for 20
steps of Euler's method and of StableVS.
digits: checkpoints of `stablevm quickstart --seed S --steps 2000 --no-compare --output-dir QUICKSTART_FOLDER`, one
folder per seed; Fréchet distance of 500 samples without guidance to the test split. All samplers start from the same
noise. Finished samples in QUICKSTART_FOLDER/solvers are not repeated.
"""

import contextlib
import dataclasses
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from stablevm.evaluation.evaluate import evaluate
from stablevm.interpolant import LINEAR
from stablevm.networks.snapshot import load_card, load_model
from stablevm.quickstart import recipe
from stablevm.quickstart.config import QuickstartConfig
from stablevm.sampling.config import GenerateConfig
from stablevm.sampling.generation import generate
from stablevm.sampling.guidance import sample_latents
from stablevm.sampling.provenance import labels_of
from stablevm.solvers.integration import integrate
from stablevm.solvers.settings import SamplerSettings, settings_of
from stablevm.support.files import read_json
from stablevm.support.rng import RowGenerators, generator
from stablevm.toy.mixture import published_mixture
from stablevm.training.checkpoint import checkpoint_folder, saved_steps

EVALUATIONS = (10, 20, 40)
MIXTURE_SEEDS, MIXTURE_SAMPLES, MIXTURE_DIRECTIONS = range(3), 20_000, 16

DIMENSIONS = (10, 100, 500)


def heun_steps(evaluations: int) -> int:
    """The steps of Heun's method with at most this many evaluations: two for each step, but one for the last."""
    return (evaluations + 1) // 2


def samplers(evaluations: int) -> dict[str, dict[str, Any]]:
    """The name and options of each sampler, with a fixed number of evaluations."""
    even, heun = {"num_steps": evaluations}, {"num_steps": heun_steps(evaluations), "solver": "heun"}
    below = {"steps_below": round(evaluations * 9 / 20)}  # 11 + 9 of 20, and in proportion
    stablevs = {"mode": "stablevs", **even, **below}
    return {
        "ODE, Euler": {"mode": "ode", **even},
        "ODE, Euler, EDM's grid": {"mode": "ode", "edm_schedule": True, **even},
        "ODE, Heun": {"mode": "ode", **heun},
        "SDE, Euler-Maruyama": {"mode": "sde", **even},
        "SDE, stochastic Heun": {"mode": "sde", **heun},
        "StableVS, split 0.85": stablevs,
        "StableVS, split 0.4": {**stablevs, "split_time": 0.4},
        "StableVS, split 0.85, noise 0.3": {**stablevs, "noise_factor": 0.3},
    }


ADAPTIVE = {f"ODE, dopri5, rtol {rtol:g}": {"mode": "ode", "solver": "dopri5", "rtol": rtol} for rtol in (1e-2, 1e-3)}
LONG = {"SDE, Euler-Maruyama, 250 steps": {"mode": "sde", "num_steps": 250}}


def mixture() -> None:
    directions = torch.nn.functional.normalize(torch.randn(MIXTURE_DIRECTIONS, 10, generator=generator("lines")), dim=1)
    targets = {seed: published_mixture(100, 10, generator("mixture", seed)) for seed in MIXTURE_SEEDS}

    def distances(**settings: Any) -> list[float]:
        found = []
        for seed, target in targets.items():
            stream = generator("noise", seed)
            samples = integrate(
                lambda x, t, rows=None, target=target: target.field(LINEAR, x, t),
                lambda stream=stream: torch.randn(MIXTURE_SAMPLES, 10, generator=stream, dtype=torch.float64),
                LINEAR,
                SamplerSettings(**settings),
            )
            found.append(target.sliced_distance(samples, directions))
        return found

    own = [
        target.sliced_distance(target.sample(MIXTURE_SAMPLES, generator("floor", seed)), directions)
        for seed, target in targets.items()
    ]
    print(f"of {MIXTURE_SAMPLES} samples of the mixture itself: {_summary(own, 4)}")
    _print_table({evaluations: samplers(evaluations) for evaluations in EVALUATIONS}, distances, digits=4)
    _print_rows(LONG, distances, digits=4)


def dimensions() -> None:
    split_times = (0.4, 0.6, 0.85)
    print("| dimensions | Euler | " + " | ".join(f"StableVS, split {time}" for time in split_times) + " |")
    print("| --- |" + " --- |" * (1 + len(split_times)))
    rivals = [{"mode": "ode", "num_steps": 20}]
    rivals += [{"mode": "stablevs", "num_steps": 20, "split_time": time} for time in split_times]
    for dimension in DIMENSIONS:
        errors = [[_endpoint_error(dimension, seed, rival) for seed in MIXTURE_SEEDS] for rival in rivals]
        print(f"| {dimension} | " + " | ".join(_summary(row, 3) for row in errors) + " |", flush=True)


def _endpoint_error(dimension: int, seed: int, settings: dict[str, Any]) -> float:
    """The distance to the end of the exact trajectory (Heun's method, 200 steps), over 500 samples."""
    target = published_mixture(100, dimension, generator("mixture", seed))
    start = torch.randn(500, dimension, generator=generator("noise", seed), dtype=torch.float64)

    def end(settings: dict[str, Any]) -> torch.Tensor:
        return integrate(
            lambda x, t, rows=None: target.field(LINEAR, x, t), lambda: start, LINEAR, SamplerSettings(**settings)
        )

    exact = end({"mode": "ode", "solver": "heun", "num_steps": 200})
    return float((end(settings) - exact).square().sum(1).mean().sqrt())


def digits(folders: list[Path]) -> None:
    def distances(**settings: Any) -> list[float]:
        return [_evaluated(folder, settings)["frechet_test"] for folder in folders]

    floors = [_evaluated(folder, samplers(10)["ODE, Euler"])["frechet_floor"] for folder in folders]
    print(f"of the training split: {_summary(floors, 2)}")
    _print_table({evaluations: samplers(evaluations) for evaluations in EVALUATIONS}, distances, digits=2)
    _print_rows(LONG, distances, digits=2)
    for name, settings in ADAPTIVE.items():
        mean = statistics.fmean(_evaluations(folder, settings) for folder in folders)
        _print_rows({f"{name}: {mean:.0f} evaluations": settings}, distances, digits=2)


def _evaluated(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    quick, config = _request(folder, settings)
    result = config.sample_dir / f"{config.name}.json"
    if result.exists():
        return read_json(result, "result")
    with contextlib.redirect_stdout(sys.stderr):
        return evaluate(recipe.evaluate_config(quick, generate(config)))


def _request(folder: Path, settings: dict[str, Any]) -> tuple[QuickstartConfig, GenerateConfig]:
    seed = read_json(folder / "quickstart.json", "quickstart")["seed"]
    quick = QuickstartConfig(output_dir=folder, seed=seed)
    run = folder / quick.loss_type
    weights = checkpoint_folder(run, saved_steps(run)[-1])
    config = dataclasses.replace(
        recipe.generate_config(quick, weights, recipe.Guidance(1.0)),
        sample_dir=folder / "solvers",
        name="-".join(f"{option}={value}" for option, value in settings.items()),
        grid=False,
        **settings,
    )
    return quick, config


def _evaluations(folder: Path, settings: dict[str, Any]) -> int:
    """The network evaluations per image of an adaptive solver, from one batch."""
    _, config = _request(folder, settings)
    card = load_card(config.ckpt)
    streams = RowGenerators.for_keys("generate", config.global_seed, positions=range(50))
    labels = labels_of(config, card)[:50]
    return sample_latents(load_model(config.ckpt, card), card, labels, streams, settings_of(config.effective()), "cpu")[
        1
    ]


def _print_table(by_evaluations: dict[int, dict[str, dict[str, Any]]], distances: Any, digits: int) -> None:
    print("| sampler | " + " | ".join(f"{evaluations} evaluations" for evaluations in by_evaluations) + " |")
    print("| --- |" + " --- |" * len(by_evaluations))
    for name in samplers(EVALUATIONS[0]):
        cells = [_summary(distances(**named[name]), digits) for named in by_evaluations.values()]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def _print_rows(named: dict[str, dict[str, Any]], distances: Any, digits: int) -> None:
    for name, settings in named.items():
        print(f"{name}: {_summary(distances(**settings), digits)}", flush=True)


def _summary(values: list[float], digits: int) -> str:
    """The mean and standard error over seeds, as text."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.fmean(values):.{digits}f} ± {error:.{digits}f}"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["mixture"]:
            mixture()
        case ["dimensions"]:
            dimensions()
        case ["digits", *folders] if folders:
            digits([Path(folder) for folder in folders])
        case _:
            sys.exit(__doc__)
