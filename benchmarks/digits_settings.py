"""Settings of 2025 and 2026 on the handwritten digits, each alone beside the quickstart's recipe, at equal steps.

    python benchmarks/digits_settings.py WORK_FOLDER [--seeds 3] [--steps 800] [--arms baseline muon]

The settings: LightningDiT's blocks instead of SiT's, the automatic time shift, contrastive flow matching, Muon, and
REG's class token, with the published weight of its loss and with 1. Muon's products of matrices are in float32 here:
torch rounds them to bfloat16, with which processors that have no such arithmetic take twenty times as long. Each run is
sampled without guidance and with the recipe's, and evaluated by an extractor that no network was aligned with. Each arm
and seed has a JSON file in WORK_FOLDER/results, which is not computed again, and an interrupted run resumes, so run it
again after an interruption, or to add seeds. It prints one table.
"""

import dataclasses
import datetime
import math
import statistics
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import tyro

from stablevm.data.digits import prepare_digits
from stablevm.evaluation.config import ExtractorConfig
from stablevm.evaluation.evaluate import evaluate
from stablevm.evaluation.small_extractor import extractor
from stablevm.networks.snapshot import load_card, load_model
from stablevm.quickstart import recipe
from stablevm.quickstart.config import QuickstartConfig
from stablevm.sampling.generation import generate
from stablevm.support.files import read_json, write_json
from stablevm.support.machine import describe_machine
from stablevm.training.checkpoint import checkpoint_folder
from stablevm.training.trainer import train

ARMS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "lightningdit": {"model": "LightningDiT-XS/2"},
    "time-shift": {"time_shift": "auto"},
    "contrastive": {"contrastive_coeff": 0.05},
    "muon": {"optimizer": "muon"},
    "class-token": {"cls_token": True},
    "class-token-1": {"cls_token": True, "cls_coeff": 1.0},
}
GUIDANCES = {"plain": recipe.NONE, "guided": recipe.HEADLINE}
MEASURES = ("frechet_test", "accuracy", "precision", "recall", "density", "coverage", "memorisation")
ALIGNED_SEED = 1  # of the extractor that networks are aligned with; the one that evaluates has 0


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare the settings."""

    folder: tyro.conf.Positional[Path]
    """Folder for data, runs and results."""
    seeds: int = 3
    steps: int = 800
    arms: tuple[str, ...] = tuple(ARMS)
    """Names of the arms; the others are compared with the first."""


def evaluated(options: Options, arm: str, seed: int) -> dict[str, Any]:
    """Train, sample and evaluate one run; the result of an earlier call is reused."""
    result = options.folder / "results" / f"{arm}-{options.steps}-seed{seed}.json"
    if result.exists():
        found: dict[str, Any] = read_json(result, "result")
        return found
    quick = QuickstartConfig(output_dir=options.folder, seed=seed, steps=options.steps)
    config = dataclasses.replace(
        recipe.train_config(quick),
        exp_name=f"{arm}-{options.steps}-seed{seed}",
        encoder_weights=str(aligned_folder(options) / "extractor.safetensors"),
        sampling_steps=0,
        report_to="none",
        **ARMS[arm],
    )
    with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.float):  # only Muon calls it here
        weights = checkpoint_folder(config.folder, train(config, is_part=True))
    measures = {}
    for name, guidance in GUIDANCES.items():
        request = dataclasses.replace(
            recipe.generate_config(quick, weights, guidance), name=f"{config.exp_name}-{name}"
        )
        found = evaluate(recipe.evaluate_config(QuickstartConfig(output_dir=options.folder), generate(request)))
        measures[name] = {measure: found[measure] for measure in MEASURES}
    network = load_model(weights, load_card(weights))
    record = {
        "arm": arm,
        "seed": seed,
        "steps": options.steps,
        "options": ARMS[arm],
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "samples": recipe.NUM_SAMPLES,
        "measures": measures,
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(torch.device("cpu")),
    }
    write_json(result, record)
    return record


def aligned_folder(options: Options) -> Path:
    return options.folder / "aligned-extractor"


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """A row for each arm: means over seeds with their standard errors, and the difference from the first arm."""
    columns = [(guidance, measure) for guidance in GUIDANCES for measure in ("frechet_test", "accuracy", "coverage")]
    heads = [f"{guidance}: {measure}" for guidance, measure in columns]
    lines = [
        "| "
        + " | ".join(["setting", "seeds", "parameters", *heads, "plain distance, less than the first's by"])
        + " |",
        "| " + " | ".join(["---"] * (len(heads) + 4)) + " |",
    ]
    first = next(iter(results))
    for arm, runs in results.items():
        cells = [mean([run["measures"][guidance][measure] for run in runs]) for guidance, measure in columns]
        gain = "" if arm == first else difference(results[first], runs)
        lines.append("| " + " | ".join([arm, str(len(runs)), f"{runs[0]['parameters']:,}", *cells, gain]) + " |")
    return "\n".join(lines)


def mean(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def difference(first: list[dict[str, Any]], other: list[dict[str, Any]]) -> str:
    """The mean of the differences of equal seeds, which share their noise and the order of data, and its error."""
    one, two = ([run["measures"]["plain"]["frechet_test"] for run in runs] for runs in (first, other))
    return mean([a - b for a, b in zip(one, two, strict=True)])


def main(options: Options) -> None:
    base = QuickstartConfig(output_dir=options.folder)
    prepare_digits(recipe.data_folder(base))
    extractor(recipe.extractor_config(base))
    extractor(ExtractorConfig(recipe.data_folder(base), aligned_folder(options), ALIGNED_SEED))
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in options.arms}
    for seed in range(options.seeds):  # so that all arms have the first seed before any has the second
        for arm in options.arms:
            results[arm].append(evaluated(options, arm, seed))
    samples = f"{recipe.NUM_SAMPLES} samples, {options.seeds} seeds, mean and standard error"
    print(f"\n{options.steps} steps, {samples}; {describe_machine(torch.device('cpu'))}\n\n{table(results)}")


if __name__ == "__main__":
    main(tyro.cli(Options))
