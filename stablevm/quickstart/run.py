"""The steps of the quickstart, each of which resumes from its earlier result."""

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from stablevm.data.digits import prepare_digits
from stablevm.evaluation.evaluate import evaluate
from stablevm.evaluation.small_extractor import DigitsExtractor, extractor
from stablevm.quickstart import recipe
from stablevm.quickstart.config import QuickstartConfig
from stablevm.quickstart.recipe import HEADLINE, NAMES
from stablevm.quickstart.report import Arm, write_quickstart_report
from stablevm.sampling.generation import generate
from stablevm.support.cards import read_card, read_object
from stablevm.support.errors import UserError
from stablevm.support.files import write_json
from stablevm.support.locks import is_foreign, owned
from stablevm.support.machine import describe_machine
from stablevm.support.text import brief
from stablevm.support.version import __version__
from stablevm.training import checkpoint
from stablevm.training.trainer import train

CONFIG_FILE = "quickstart.json"


def quickstart(config: QuickstartConfig) -> dict[str, Any]:
    """Run all steps from data to report, and return the summary; UserError if the folder holds another quickstart."""
    config.validate()
    with owned(config.output_dir):
        return _quickstart(config)


def _quickstart(config: QuickstartConfig) -> dict[str, Any]:
    clock, announce = Clock(config.output_dir), Announcer(3 + 3 * len(recipe.arms(config)))
    _claim_folder(config)
    with clock:
        announce("prepare the digits")
        print(prepare_digits(recipe.data_folder(config)))
        announce("train the extractor that evaluates them")
        digits_extractor = extractor(recipe.extractor_config(config))
        arms = [_finish(config, arm, announce) for arm in recipe.arms(config)]
        announce("write the report")
    summary = _summary(config, arms, digits_extractor, clock)
    write_json(config.output_dir / "summary.json", summary)
    write_quickstart_report(config, arms, summary)
    _print_summary(config, arms, summary)
    return summary


def _finish(config: QuickstartConfig, arm: QuickstartConfig, announce: "Announcer") -> Arm:
    """Train, sample and evaluate one of the methods."""
    run, name = recipe.train_config(arm), NAMES[arm.loss_type]
    announce(f"train {run.model} with {name}'s targets")
    weights = checkpoint.checkpoint_folder(run.folder, train(run, is_part=True))
    announce(f"sample {recipe.NUM_SAMPLES} digits from it")
    guidances = recipe.guidances(config, arm)
    samples = {guide: generate(recipe.generate_config(arm, weights, guide)) for guide in guidances}
    announce("evaluate them")
    results = {guide: evaluate(recipe.evaluate_config(arm, path)) for guide, path in samples.items()}
    return Arm(name, arm, weights, samples, results)


class Announcer:
    """Says which of `total` steps begins."""

    def __init__(self, total: int) -> None:
        self.total, self.number = total, 0

    def __call__(self, what: str) -> None:
        self.number += 1
        print(f"\n[{self.number}/{self.total}] {what}", flush=True)


@dataclass(frozen=True)
class _Seconds:
    seconds: float
    processor_seconds: float = 0.0


class Clock:
    """Seconds of work over all commands that it took to finish, kept in FOLDER/seconds.json: by the wall's clock, and
    of all processor cores together, which other work on the machine hardly changes.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "seconds.json"
        self._start = time.perf_counter(), time.process_time()
        self.seconds = self.processor_seconds = 0.0

    def __enter__(self) -> "Clock":
        before = read_card(self._path, _Seconds, "quickstart") if self._path.exists() else _Seconds(0.0)
        self.seconds, self.processor_seconds = before.seconds, before.processor_seconds
        return self

    def __exit__(self, *exception: object) -> None:
        self.seconds += time.perf_counter() - self._start[0]
        self.processor_seconds += time.process_time() - self._start[1]
        write_json(self._path, {"seconds": self.seconds, "processor_seconds": self.processor_seconds})


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


def _summary(
    config: QuickstartConfig, arms: list[Arm], digits_extractor: DigitsExtractor, clock: Clock
) -> dict[str, Any]:
    run, (first, *others) = recipe.train_config(config), arms
    names = ("accuracy", "frechet_test", "frechet_floor", "precision", "recall", "coverage")
    return {
        **{name: first.headline[name] for name in names},
        "seconds": round(clock.seconds, 1),
        "processor_seconds": round(clock.processor_seconds, 1),
        "by_guidance": {guide.name: result for guide, result in first.results.items()},
        "comparison": {arm.name: {guide.name: result for guide, result in arm.results.items()} for arm in others},
        "protocol": {
            "date": datetime.now(UTC).date().isoformat(),
            "version": __version__,
            "machine": describe_machine(),
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
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
    }


def _print_summary(config: QuickstartConfig, arms: list[Arm], summary: dict[str, Any]) -> None:
    print()
    for arm in arms:
        found = arm.headline
        print(
            f"{arm.name}: {found['accuracy']:.1%} of {recipe.NUM_SAMPLES} samples are recognised as their class, "
            f"Fréchet distance {found['frechet_test']:.2f}, precision {found['precision']:.2f}, recall "
            f"{found['recall']:.2f}, coverage {found['coverage']:.2f} ({HEADLINE.name})"
        )
    print(
        f"Fréchet distance to the test digits of real training digits: {summary['frechet_floor']:.2f}\n"
        f"{summary['seconds']:.0f} seconds of work ({summary['processor_seconds']:.0f} of processors), seed "
        f"{config.seed}, {config.steps:,} steps each\n"
        f"report: {config.output_dir / 'report.html'}"
    )
