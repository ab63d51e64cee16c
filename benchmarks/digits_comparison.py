"""StableVM compared with CFM on the handwritten digits: equal steps, the same network, several seeds.

    python benchmarks/digits_comparison.py WORK_FOLDER [--seeds 5] [--steps 800]

It prints a table with the spread over seeds. Finished runs in WORK_FOLDER are not repeated. All runs are evaluated by
the same extractor.
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
from stablevm.sampling.generation import generate
from stablevm.support.files import read_json
from stablevm.training.checkpoint import checkpoint_folder
from stablevm.training.trainer import train

METHODS: dict[str, dict[str, Any]] = {
    "CFM": {"loss_type": "si"},
    "StableVM, bank anchors": {"loss_type": "stablevm"},
    "StableVM, batch anchors": {"loss_type": "stablevm", "bank_anchors": "batch"},
    "StableVM, bank anchors, VA-REPA": {"loss_type": "stablevm", "use_proj_loss": True},
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare the methods."""

    folder: tyro.conf.Positional[Path]
    """Folder for data, runs and results."""
    seeds: int = 5
    steps: int = 800
    weighting: str = "logit_normal"
    methods: tuple[str, ...] = tuple(METHODS)
    """Names of the methods to run."""


def evaluated(options: Options, method: str, seed: int) -> dict[str, Any]:
    """Train, sample without guidance and evaluate one run; results of an earlier call are reused."""
    quick = QuickstartConfig(output_dir=options.folder, seed=seed, steps=options.steps)
    name = f"{method.replace(', ', '-').replace(' ', '-')}-{options.weighting}-{options.steps}-seed{seed}"
    result = options.folder / "samples" / f"{name}.json"
    if result.exists():
        return read_json(result, "result")
    config = dataclasses.replace(
        recipe.train_config(quick),
        exp_name=name,
        weighting=options.weighting,
        prefill_bank_fully=METHODS[method]["loss_type"] == "stablevm",
        sampling_steps=0,
        report_to="none",
        **{"use_proj_loss": False, **METHODS[method]},
    )
    weights = checkpoint_folder(config.folder, train(config))
    samples = generate(dataclasses.replace(recipe.generate_config(quick, weights, recipe.Guidance(1.0)), name=name))
    return evaluate(recipe.evaluate_config(quick, samples))


def main(options: Options) -> None:
    base = QuickstartConfig(output_dir=options.folder)
    prepare_digits(recipe.data_folder(base))
    extractor(recipe.extractor_config(base))
    results = {
        method: [evaluated(options, method, seed) for seed in range(options.seeds)] for method in options.methods
    }
    print(f"\n{options.steps} steps, {options.weighting} times, guidance 1, 500 samples, {options.seeds} seeds\n")
    print("| method | Fréchet distance to the test split (seeds) | accuracy | coverage |\n| --- | --- | --- | --- |")
    for method, runs in results.items():
        distances = [run["frechet_test"] for run in runs]
        means = {key: statistics.fmean(run[key] for run in runs) for key in ("accuracy", "coverage")}
        print(
            f"| {method} | {statistics.fmean(distances):.2f} ({' '.join(f'{d:.2f}' for d in distances)}) "
            f"| {means['accuracy']:.3f} | {means['coverage']:.3f} |"
        )
    first, *others = options.methods
    for method in others:
        a, b = ([run["frechet_test"] for run in results[name]] for name in (first, method))
        error = math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))
        gain = statistics.fmean(a) - statistics.fmean(b)
        print(f"{method} is lower than {first} by {gain:.2f} +- {error:.2f}: {gain / error:.1f} standard errors")


if __name__ == "__main__":
    main(tyro.cli(Options))
