"""Results on disk: a JSON file and a file of weights for each method, field, seed and set of options."""

import hashlib
import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from stablevm.support import rng
from stablevm.support.cards import read_card
from stablevm.support.errors import UserError
from stablevm.support.files import write_json
from stablevm.support.tensor_files import save_tensors
from stablevm.support.text import shown
from stablevm.toy.config import METHODS, Method, ToyConfig
from stablevm.toy.network import ToyNetwork, make_network

_REMEDY = "remove it and run the same command again"


@dataclass(frozen=True)
class Result:
    """The Fisher divergences of a training run: `divergence[i][j]` after updates[i] at times[j]."""

    method: Method
    seed: int
    updates: list[int]
    times: list[float]
    divergence: list[list[float]]
    seconds: dict[str, float]
    settings: dict[str, Any] = field(default_factory=dict)  # the options that it depends on

    def __post_init__(self) -> None:
        """Raise UserError for an incomplete table."""
        whole = len(self.divergence) == len(self.updates) and all(
            len(row) == len(self.times) for row in self.divergence
        )
        if not (whole and self.times and self.updates):
            raise UserError(
                f"{len(self.divergence)} rows of divergence for {len(self.updates)} updates, each of "
                f"{len(self.times)} times"
            )


def result_path(config: ToyConfig, method: Method, seed: int) -> Path:
    """The path of a result, whose name has the method, the field, the seed, and a checksum of the options."""
    settings = hashlib.sha256(json.dumps(config.result_settings(), sort_keys=True).encode()).hexdigest()[:8]
    return config.output_dir / "data" / f"{method}-{config.vector_field}-seed{seed}-{settings}.json"


def save(
    config: ToyConfig,
    method: Method,
    seed: int,
    rows: list[dict[str, Any]],
    network: ToyNetwork,
    seconds: dict[str, float],
) -> None:
    """Write the network's weights, then the result, so that a result always has its weights."""
    path = result_path(config, method, seed)
    save_tensors(path.with_suffix(".safetensors"), network.state_dict())
    write_json(
        path,
        {
            "method": method,
            "seed": seed,
            "settings": config.result_settings(),
            "updates": [row["update"] for row in rows],
            "times": list(config.eval_times),
            "divergence": [row["divergence"] for row in rows],
            "seconds": seconds,
        },
    )


def load(config: ToyConfig, method: Method, seed: int) -> Result:
    return read_card(result_path(config, method, seed), Result, "toy result", finite=False, remedy=_REMEDY)


def load_network(config: ToyConfig, method: Method, seed: int) -> ToyNetwork:
    network = make_network(config, rng.generator(seed, "network"))
    path = result_path(config, method, seed).with_suffix(".safetensors")
    try:
        network.load_state_dict(load_file(path))
    except (FileNotFoundError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{path}: not the weights of this network ({shown(str(error))}); {_REMEDY}") from None
    return network.requires_grad_(False)


def find_all(config: ToyConfig) -> dict[Method, list[Result]]:
    """All finished results with these options, for all methods and the requested seeds."""
    seeds = range(config.seed, config.seed + config.seeds)
    found = {
        method: [load(config, method, seed) for seed in seeds if result_path(config, method, seed).exists()]
        for method in METHODS
    }
    return {method: results for method, results in found.items() if results}


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error, which is NaN for a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def table(results: dict[Method, list[Result]]) -> str:
    """A Markdown table of the divergence after the last update at each time, mean ± standard error over seeds."""
    times = next(iter(results.values()))[0].times
    lines = ["| method (seeds) | " + " | ".join(f"t = {t:g}" for t in times) + " |", "| --- |" + " --- |" * len(times)]
    for method, runs in results.items():
        cells = [mean_and_error([run.divergence[-1][column] for run in runs]) for column in range(len(times))]
        shown = [f"{mean:.3g}" + ("" if math.isnan(error) else f" ± {error:.2g}") for mean, error in cells]
        lines.append(f"| {method} ({len(runs)}) | " + " | ".join(shown) + " |")
    return "\n".join(lines)
