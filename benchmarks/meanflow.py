"""MeanFlow on the handwritten digits: the velocities of CFM compared with StableVM's, at equal steps, several seeds.

    python benchmarks/meanflow.py WORK_FOLDER [--seeds 5] [--steps 1000] [--powers 1.0 0.5]

It prints a table for each number of sampling steps, and writes WORK_FOLDER/meanflow.json. Finished runs in WORK_FOLDER
are not repeated. All runs are evaluated by the same extractor.
"""

import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any

import tyro

from stablevm.data.digits import prepare_digits
from stablevm.evaluation.evaluate import evaluate
from stablevm.evaluation.small_extractor import extractor
from stablevm.quickstart import recipe
from stablevm.quickstart.config import QuickstartConfig
from stablevm.sampling.config import GenerateConfig
from stablevm.sampling.generation import generate
from stablevm.support.files import read_json, write_json
from stablevm.training.checkpoint import checkpoint_folder
from stablevm.training.config import TrainConfig
from stablevm.training.trainer import train

VELOCITIES: dict[str, dict[str, Any]] = {
    "CFM": {"loss_type": "si"},
    "StableVM": {"loss_type": "stablevm", "bank_capacity_per_class": "all", "bank_anchors": "batch"},
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare the velocities."""

    folder: tyro.conf.Positional[Path]
    """Folder for data, runs and results."""
    seeds: int = 5
    steps: int = 1000
    powers: tuple[float, ...] = (1.0,)
    """Powers of the adaptive weight."""
    evaluations: tuple[int, ...] = (1, 2, 4)
    """Steps of sampling."""


def trained(options: Options, velocity: str, power: float, seed: int) -> Path:
    """The checkpoint of one run."""
    return checkpoint_folder(
        options.folder / name_of(options, velocity, power, seed),
        train(
            TrainConfig(
                exp_name=name_of(options, velocity, power, seed),
                output_dir=options.folder,
                data_dir=recipe.data_folder(QuickstartConfig(output_dir=options.folder)),
                model="SiT-XS/2",
                max_train_steps=options.steps,
                batch_size=64,
                learning_rate=2e-3,
                ema_decay=0.995,
                adam_beta2=0.99,
                weighting="logit_normal",
                meanflow=True,
                meanflow_instants=0.5,
                meanflow_power=power,
                sampling_steps=0,
                checkpointing_steps=options.steps,
                mixed_precision="no",
                num_workers=0,
                report_to="none",
                seed=seed,
                **VELOCITIES[velocity],
            )
        ),
    )


def name_of(options: Options, velocity: str, power: float, seed: int) -> str:
    return f"{velocity}-power{power:g}-{options.steps}-seed{seed}"


def evaluated(options: Options, velocity: str, power: float, seed: int) -> dict[str, dict[str, Any]]:
    """The results of one run by the number of sampling steps; those of an earlier call are reused."""
    found, base = {}, QuickstartConfig(output_dir=options.folder)
    for steps in options.evaluations:
        name = f"{name_of(options, velocity, power, seed)}-{steps}"
        result = options.folder / "samples" / f"{name}.json"
        if not result.exists():
            samples = generate(
                GenerateConfig(
                    ckpt=trained(options, velocity, power, seed),
                    mode="meanflow",
                    num_steps=steps,
                    num_fid_samples=recipe.NUM_SAMPLES,
                    sample_dir=options.folder / "samples",
                    name=name,
                    global_seed=seed,
                )
            )
            evaluate(recipe.evaluate_config(base, samples))
        found[str(steps)] = read_json(result, "result")
    return found


def main(options: Options) -> None:
    base = QuickstartConfig(output_dir=options.folder)
    prepare_digits(recipe.data_folder(base))
    extractor(recipe.extractor_config(base))
    results: dict[str, list[dict[str, dict[str, Any]]]] = {}
    for seed in range(options.seeds):  # seeds in order, so that an interrupted comparison has all arms
        for power in options.powers:
            for velocity in VELOCITIES:
                arm = f"{velocity}, power {power:g}"
                results.setdefault(arm, []).append(evaluated(options, velocity, power, seed))
                write_json(options.folder / "meanflow.json", {"options": shown(options), "results": results})
    print(f"\n{options.steps} steps, {recipe.NUM_SAMPLES} samples, {options.seeds} seeds")
    for steps in map(str, options.evaluations):
        print_table(results, steps)


def print_table(results: dict[str, list[dict[str, dict[str, Any]]]], steps: str) -> None:
    print(f"\nFréchet distance to the test split, {steps} steps\n")
    print("| velocities | mean | seeds | accuracy | coverage |\n| --- | --- | --- | --- | --- |")
    distances = {arm: [run[steps]["frechet_test"] for run in runs] for arm, runs in results.items()}
    for arm, runs in results.items():
        accuracy, coverage = (statistics.fmean(run[steps][key] for run in runs) for key in ("accuracy", "coverage"))
        seeds = " ".join(f"{value:.2f}" for value in distances[arm])
        print(f"| {arm} | {statistics.fmean(distances[arm]):.2f} | {seeds} | {accuracy:.3f} | {coverage:.3f} |")
    for arm in results:
        velocity, _, power = arm.partition(", ")
        if velocity == "StableVM" and len(distances[arm]) > 1:
            gains = [a - b for a, b in zip(distances[f"CFM, {power}"], distances[arm], strict=True)]
            error = statistics.stdev(gains) / math.sqrt(len(gains))
            gain = statistics.fmean(gains)
            print(
                f"{power}: StableVM is lower by {gain:.2f} +- {error:.2f} (paired), {gain / error:.1f} standard errors"
            )


def shown(options: Options) -> dict[str, Any]:
    return dataclasses.asdict(options) | {"folder": None}


if __name__ == "__main__":
    main(tyro.cli(Options))
