"""The steps of the quickstart, each of which resumes from its earlier result."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stablevm.data.dataset import PreparedDataset
from stablevm.data.digits import prepare_digits
from stablevm.data.opening import open_dataset
from stablevm.evaluation.digits import DigitsExtractor, digits_rows, extractor
from stablevm.evaluation.evaluate import evaluate
from stablevm.evaluation.page import Figure, write_page
from stablevm.figures.evaluation import plot_samples_beside_real, plot_training_curves
from stablevm.figures.variance import plot_variance
from stablevm.interpolant import get_interpolant
from stablevm.quickstart import recipe
from stablevm.quickstart.config import QuickstartConfig
from stablevm.quickstart.recipe import Guidance
from stablevm.sampling.generation import generate
from stablevm.support import rng
from stablevm.support.cards import read_card, read_object
from stablevm.support.errors import UserError
from stablevm.support.files import write_json
from stablevm.support.locks import is_foreign, owned
from stablevm.support.text import brief
from stablevm.support.version import __version__
from stablevm.training import checkpoint
from stablevm.training.tracker import METRICS_FILE, read_metrics
from stablevm.training.trainer import train
from stablevm.variance import VarianceCurve, variance_curve

CONFIG_FILE = "quickstart.json"
CURVE_TIMES = torch.linspace(0.05, 0.95, 19)
CURVE_REFERENCES, CURVE_ROWS = 64, 2000
SHOWN_PER_CLASS = 8
HEADLINE = recipe.GUIDANCES[0]


def quickstart(config: QuickstartConfig) -> dict[str, Any]:
    """Run all steps from data to report, and return the summary; UserError if the folder holds another quickstart."""
    config.validate()
    with owned(config.output_dir):
        return _quickstart(config)


def _quickstart(config: QuickstartConfig) -> dict[str, Any]:
    clock = Clock(config.output_dir)
    _claim_folder(config)
    with clock:
        _announce(1, "prepare the digits")
        print(prepare_digits(recipe.data_folder(config)))
        _announce(2, "train the extractor that evaluates them")
        digits_extractor = extractor(recipe.extractor_config(config))
        _announce(3, f"train SiT-XS/2 ({config.loss_type})")
        run = recipe.train_config(config)
        step = train(run, is_part=True)
        _announce(4, f"sample {recipe.NUM_SAMPLES} digits")
        weights = checkpoint.checkpoint_folder(run.folder, step)
        samples = {guide: generate(recipe.generate_config(config, weights, guide)) for guide in recipe.GUIDANCES}
        _announce(5, "evaluate them")
        results = {guide: evaluate(recipe.evaluate_config(config, path)) for guide, path in samples.items()}
        _announce(6, "draw the report")
        figures = _figures(config, samples[HEADLINE])
    summary = _summary(config, results, digits_extractor, clock.seconds)
    write_json(config.output_dir / "summary.json", summary)
    _write_report(config, summary, results, figures, weights, samples)
    _print_summary(config, summary)
    return summary


@dataclasses.dataclass(frozen=True)
class _Seconds:
    seconds: float


class Clock:
    """The seconds of work over all commands that were needed to finish, kept in FOLDER/seconds.json."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "seconds.json"
        self._start = time.perf_counter()
        self.seconds = 0.0

    def __enter__(self) -> "Clock":
        self.seconds = read_card(self._path, _Seconds, "quickstart").seconds if self._path.exists() else 0.0
        return self

    def __exit__(self, *exception: object) -> None:
        self.seconds += time.perf_counter() - self._start
        write_json(self._path, {"seconds": self.seconds})


def _claim_folder(config: QuickstartConfig) -> None:
    path = config.output_dir / CONFIG_FILE
    mine = {"seed": config.seed, "loss_type": config.loss_type, "steps": config.steps}
    if path.exists():
        theirs = read_object(path, "quickstart", remedy="give another folder")
        for option, value in mine.items():
            if theirs.get(option) != value:
                raise UserError(
                    f"--output-dir {config.output_dir}: holds a quickstart with {option} {brief(theirs.get(option))}, "
                    f"this one has {value}; give another folder"
                )
    elif config.output_dir.exists() and any(map(is_foreign, config.output_dir.iterdir())):
        raise UserError(f"--output-dir {config.output_dir}: holds other files; give an empty or a new folder")
    write_json(path, mine)


def _figures(config: QuickstartConfig, samples: Path) -> list[Figure]:
    folder = config.output_dir / "figures"
    train_set, test_set = open_dataset(recipe.data_folder(config)), open_dataset(recipe.data_folder(config), "test")
    run = recipe.train_config(config)
    with np.load(samples) as archive:
        generated = _by_class(archive["arr_0"], archive["labels"])
    real = _by_class(test_set.images(range(len(test_set))).permute(0, 2, 3, 1).numpy(), test_set.labels().numpy())
    plot_samples_beside_real(generated, real, folder / "samples.png", train_set.class_names)
    plot_training_curves(read_metrics(run.folder / METRICS_FILE), folder / "training.png")
    curve = _variance(config, train_set)
    write_json(config.output_dir / "variance.json", dataclasses.asdict(curve))
    plot_variance({"Handwritten digits": curve}, folder / "variance.png")
    return [
        Figure("Samples beside real digits", folder / "samples.png",
               f"Left: digits of the test split. Right: samples, {HEADLINE.name}, unselected."),
        Figure("Training", folder / "training.png",
               "The velocity loss cannot reach zero: what remains is the spread of the images behind one noisy input."),
        Figure("Noise of the targets", folder / "variance.png",
               f"Variance about the exact velocity of each class. The run itself uses "
               f"{'the whole class as references: variance 0' if config.loss_type == 'stablevm' else 'CFM targets'}."),
    ]  # fmt: skip


def _variance(config: QuickstartConfig, dataset: PreparedDataset) -> VarianceCurve:
    return variance_curve(
        get_interpolant(recipe.train_config(config).path_type),
        dataset.latent.means(dataset.moments(range(len(dataset)))),
        dataset.labels(),
        CURVE_TIMES,
        references=CURVE_REFERENCES,
        rows=CURVE_ROWS,
        generator=rng.generator(config.seed, "variance"),
    )


def _by_class(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The first few images of each class: (classes, n, H, W, 3)."""
    return np.stack([images[labels == label][:SHOWN_PER_CLASS] for label in range(int(labels.max()) + 1)])


def _summary(
    config: QuickstartConfig, results: dict[Guidance, dict[str, Any]], digits_extractor: DigitsExtractor, seconds: float
) -> dict[str, Any]:
    run, headline = recipe.train_config(config), results[HEADLINE]
    return {
        "accuracy": headline["accuracy"],
        "frechet_test": headline["frechet_test"],
        "frechet_floor": headline["frechet_floor"],
        "seconds": round(seconds, 1),
        "precision": headline["precision"],
        "recall": headline["recall"],
        "coverage": headline["coverage"],
        "by_guidance": {guide.name: result for guide, result in results.items()},
        "protocol": {
            "version": __version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "seed": config.seed,
            "loss_type": config.loss_type,
            "steps": config.steps,
            "model": run.model,
            "batch_size": run.batch_size,
            "samples": recipe.NUM_SAMPLES,
            "sampler": f"Euler ODE, {recipe.EULER_STEPS} steps, EMA weights",
            "guidance": HEADLINE.name,
            "extractor": digits_extractor.name,
            "extractor_test_accuracy": digits_extractor.test_accuracy,
            "alignment_encoder": "the extractor's convolutional patch features (supervised)",
        },
    }


def _write_report(
    config: QuickstartConfig,
    summary: dict[str, Any],
    results: dict[Guidance, dict[str, Any]],
    figures: list[Figure],
    weights: Path,
    samples: dict[Guidance, Path],
) -> None:
    write_page(
        config.output_dir / "report.html",
        title="stablevm quickstart: handwritten digits",
        summary={
            "recognised as their class": f"{summary['accuracy']:.1%}",
            "Fréchet distance to the test split": summary["frechet_test"],
            "the same of the training split (floor)": summary["frechet_floor"],
            "minutes of work": summary["seconds"] / 60,
        },
        figures=figures,
        metrics_table=_table(results),
        commands=_commands(config, weights, samples),
        protocol={
            key: json.dumps(value) if isinstance(value, list) else value for key, value in summary["protocol"].items()
        },
    )


def _table(results: dict[Guidance, dict[str, Any]]) -> list[list[str | float | int]]:
    """A table of the metrics with their names and explanations, and one column for each guidance."""
    columns = [digits_rows(result) for result in results.values()]
    head: list[str | float | int] = ["", *(guide.name for guide in results), ""]
    return [head] + [
        [rows[0][0], *(row[1] for row in rows), rows[0][2]] for rows in list(zip(*columns, strict=True))[1:]
    ]


def _commands(config: QuickstartConfig, weights: Path, samples: dict[Guidance, Path]) -> list[str]:
    return [
        f"stablevm prepare digits {recipe.data_folder(config)}",
        recipe.command_line("stablevm extractor", recipe.extractor_config(config)),
        recipe.command_line("accelerate launch train.py", recipe.train_config(config)),
        *(
            recipe.command_line("python generate.py", recipe.generate_config(config, weights, guide))
            for guide in samples
        ),
        *(
            recipe.command_line("python evaluate.py", recipe.evaluate_config(config, path), "samples")
            for path in samples.values()
        ),
    ]


def _announce(number: int, what: str) -> None:
    print(f"\n[{number}/6] {what}", flush=True)


def _print_summary(config: QuickstartConfig, summary: dict[str, Any]) -> None:
    print(
        f"\n{summary['accuracy']:.1%} of {recipe.NUM_SAMPLES} samples are recognised as their class "
        f"({HEADLINE.name})\n"
        f"Fréchet distance to the test split {summary['frechet_test']:.2f} (training split: "
        f"{summary['frechet_floor']:.2f})\n"
        f"precision {summary['precision']:.2f}, recall {summary['recall']:.2f}, coverage {summary['coverage']:.2f}\n"
        f"{summary['seconds']:.0f} seconds of work, seed {config.seed}, {config.loss_type}, {config.steps} steps\n"
        f"report: {config.output_dir / 'report.html'}"
    )
