"""The report of the quickstart: both methods' samples, losses and numbers on one page."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stablevm.data.dataset import PreparedDataset
from stablevm.data.opening import open_dataset
from stablevm.evaluation.digits import digits_rows
from stablevm.evaluation.page import Figure, write_page
from stablevm.figures.evaluation import plot_class_rows, plot_loss
from stablevm.figures.variance import plot_effective_size, plot_variance_alone
from stablevm.interpolant import get_interpolant
from stablevm.quickstart import recipe
from stablevm.quickstart.config import QuickstartConfig
from stablevm.quickstart.recipe import EVERYWHERE, HEADLINE, NONE, Guidance
from stablevm.support import rng
from stablevm.support.files import write_json
from stablevm.support.npz import NpzFile
from stablevm.support.options import command_line
from stablevm.training.tracker import METRICS_FILE, read_metrics
from stablevm.variance import VarianceCurve, variance_curve

CURVE_TIMES = torch.linspace(0.05, 0.95, 19)
CURVE_REFERENCES, CURVE_ROWS = 64, 2000
SHOWN_PER_CLASS = 8


@dataclass(frozen=True)
class Arm:
    """One method: its training's last weights, and its samples with the numbers about them by guidance."""

    name: str
    config: QuickstartConfig
    weights: Path
    samples: dict[Guidance, Path]
    results: dict[Guidance, dict[str, Any]]

    @property
    def headline(self) -> dict[str, Any]:
        return self.results[HEADLINE]


def write_quickstart_report(config: QuickstartConfig, arms: Sequence[Arm], summary: dict[str, Any]) -> None:
    """Write FOLDER/report.html with its pictures in FOLDER/figures; `summary` is what FOLDER/summary.json holds."""
    first = arms[0]
    distances = {f"Fréchet distance, {arm.name}": f"{arm.headline['frechet_test']:.2f}" for arm in arms}
    write_page(
        config.output_dir / "report.html",
        title="stablevm quickstart: handwritten digits",
        introduction=_introduction(config, arms),
        summary={
            f"recognised as their class, {first.name}": f"{first.headline['accuracy']:.1%}",
            **distances,
            "the same of real training digits (floor)": f"{summary['frechet_floor']:.2f}",
            "minutes of work": f"{summary['seconds'] / 60:.1f}",
            "processor minutes": f"{summary['processor_seconds'] / 60:.1f}",
        },
        figures=_figures(config, arms),
        metrics_table=_table(arms),
        commands=_commands(config, arms),
        protocol={
            key: json.dumps(value) if isinstance(value, list) else value for key, value in summary["protocol"].items()
        },
        links=_links(config, arms),
    )


def _introduction(config: QuickstartConfig, arms: Sequence[Arm]) -> str:
    network = recipe.train_config(config).model
    floor = f"{arms[0].headline['frechet_floor']:.2f}"
    distances = " and ".join(f"{arm.headline['frechet_test']:.2f} ({arm.name})" for arm in arms)
    if len(arms) == 1:
        return (
            f"A {network} learnt to make handwritten digits, those of scikit-learn, in {config.steps:,} steps with the "
            f"targets of {arms[0].name}. The Fréchet distance of its samples to digits that it has not seen is "
            f"{distances}; real training digits have {floor}."
        )
    return (
        f"A {network} learnt to make handwritten digits, those of scikit-learn, twice: with the targets of "
        f"{arms[0].name} and with those of {arms[1].name}, on the same data in the same {config.steps:,} steps from "
        f"the same first weights. The Fréchet distance of its samples to digits that it has not seen is then "
        f"{distances}; real training digits have {floor}. This is one seed, and it takes several to tell what is "
        "chance: docs/experiments.md has five, in which StableVM was nearer each time, without the alignment that both "
        "have here."
    )


def _figures(config: QuickstartConfig, arms: Sequence[Arm]) -> list[Figure]:
    folder = config.output_dir / "figures"
    train_set, test_set = open_dataset(recipe.data_folder(config)), open_dataset(recipe.data_folder(config), "test")
    real = test_set.images(range(len(test_set))).permute(0, 2, 3, 1).numpy()
    sheets = {"Real test digits": _by_class(real, test_set.labels().numpy())}
    for arm in arms:
        archive = NpzFile(arm.samples[HEADLINE])
        sheets[arm.name] = _by_class(archive.array("arr_0"), archive.array("labels"))
    paths = {title: folder / f"{title.lower().replace(' ', '-')}.png" for title in sheets}
    for title, images in sheets.items():
        plot_class_rows(images, train_set.class_names, title, paths[title])
    return [
        Figure("Samples beside real digits", list(paths.values()), f"Samples with {HEADLINE.name}, unselected."),
        _guidance(arms[0]),
        _losses(arms, folder),
        _noise(config, train_set, folder),
    ]


def _guidance(arm: Arm) -> Figure:
    """Why the headline is guided only near the data; words without a picture."""
    said = "; ".join(
        f"{_in_words(guide)}: {found['accuracy']:.1%} recognised, recall {found['recall']:.2f}, Fréchet distance "
        f"{found['frechet_test']:.2f}"
        for guide, found in arm.results.items()
    )
    return Figure(
        f"Why guidance stops at t = {HEADLINE.high:g}",
        [],
        "Classifier-free guidance makes samples look more like their class. At times near 1, where a sample is still "
        "mostly noise, it also draws all samples of a class to the same few shapes, so that fewer kinds of digits come "
        f"out; below t = {HEADLINE.high:g} the shape is settled, and guidance only makes it clearer. "
        f"{arm.name} here: {said}.",
    )


def _losses(arms: Sequence[Arm], folder: Path) -> Figure:
    runs = {arm.name: read_metrics(recipe.train_config(arm.config).folder / METRICS_FILE) for arm in arms}
    names = ("velocity_loss", "alignment_loss")
    paths = [folder / f"{name.replace('_', '-')}.png" for name in names]
    plot_loss(runs, "velocity_loss", paths[0])
    plot_loss(runs, "alignment_loss", paths[1])
    caption = "The velocity loss cannot reach zero: what remains is the spread of the images behind one noisy input"
    if len(arms) > 1:
        caption += (
            ", and with CFM also the noise of its targets; so a lower velocity loss is no better network by itself"
        )
    return Figure("Training", paths, f"{caption}.")


def _noise(config: QuickstartConfig, dataset: PreparedDataset, folder: Path) -> Figure:
    curve = _variance(config, dataset)
    write_json(config.output_dir / "variance.json", dataclasses.asdict(curve))
    paths = [folder / "variance.png", folder / "effective-sample-size.png"]
    plot_variance_alone(curve, "Variance of the targets", paths[0])
    plot_effective_size(curve, paths[1])
    return Figure(
        "Noise of the targets",
        paths,
        f"Variance about the exact velocity of each class, with {CURVE_REFERENCES} references. StableVM's training has "
        "the whole class as references, which makes its targets exact for these digits: variance 0.",
    )


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


def _table(arms: Sequence[Arm]) -> list[list[str]]:
    """A column for each method and guidance, the methods beside each other, between names and meanings of metrics."""
    guidances = [guide for guide in (HEADLINE, NONE, EVERYWHERE) if guide in arms[0].results]
    chosen = [(arm, guide) for guide in guidances for arm in arms if guide in arm.results]
    columns = [digits_rows(arm.results[guide])[1:-1] for arm, guide in chosen]  # all have one extractor
    head = ["", *(f"{arm.name}, {_in_words(guide)}" for arm, guide in chosen), ""]
    return [head, *([rows[0][0], *(row[1] for row in rows), rows[0][2]] for rows in zip(*columns, strict=True))]


def _in_words(guidance: Guidance) -> str:
    """Its name, which leaves out what is not limited."""
    return f"{guidance.name} at all times" if guidance == EVERYWHERE else guidance.name


def _commands(config: QuickstartConfig, arms: Sequence[Arm]) -> list[str]:
    lines = [
        f"stablevm prepare digits {recipe.data_folder(config)}",
        command_line("stablevm extractor", recipe.extractor_config(config)),
    ]
    for arm in arms:
        lines.append(command_line("stablevm train", recipe.train_config(arm.config)))
        for guide, path in arm.samples.items():
            sampling = recipe.generate_config(arm.config, arm.weights, guide)
            evaluation = recipe.evaluate_config(arm.config, path)
            lines.append(command_line("stablevm generate", sampling))
            lines.append(command_line("stablevm evaluate", evaluation, "samples"))
    return lines


def _links(config: QuickstartConfig, arms: Sequence[Arm]) -> dict[str, str]:
    """What lies beside the page, and the papers."""

    def beside(path: Path) -> str:
        return path.relative_to(config.output_dir).as_posix()

    metrics = {f"each logged step, {arm.name}": recipe.train_config(arm.config).folder / METRICS_FILE for arm in arms}
    archives = {f"samples, {arm.name} (.npz)": arm.samples[HEADLINE] for arm in arms}
    files = {"all numbers (summary.json)": config.output_dir / "summary.json", **metrics, **archives}
    return {
        **{text: beside(path) for text, path in files.items()},
        "Stable Velocity: StableVM and VA-REPA (Yang et al., 2026)": "https://arxiv.org/abs/2602.05435",
        "REPA: alignment with an encoder (Yu et al., 2024)": "https://arxiv.org/abs/2410.06940",
    }
