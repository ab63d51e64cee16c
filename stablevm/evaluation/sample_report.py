"""The HTML report of an evaluation, and the dependence of metrics on the number of samples."""

import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from stablevm.evaluation.page import Figure, Value, write_page
from stablevm.evaluation.samples import Reference, Samples
from stablevm.figures.evaluation import (
    GRID_COLUMNS,
    GRID_ROWS,
    plot_metrics,
    plot_neighbours,
    plot_sample_grid,
)
from stablevm.metrics.metric import FeatureSets
from stablevm.metrics.neighbours import Neighbourhood, nearest, radii
from stablevm.metrics.points import points
from stablevm.metrics.table import metrics_in, panels_of, results_of
from stablevm.support import rng
from stablevm.support.bars import progress_bar
from stablevm.support.text import caption
from stablevm.support.version import __version__

NEIGHBOUR_ROWS, NEIGHBOURS = 10, 5
MAX_CLASSES = 100  # rows of the table of classes
SUBSETS = (8, 4, 2)  # numbers of subsets into which the samples are divided
MIN_SUBSET = 8  # images; fewer have hardly any neighbours and no useful covariance
Rows = Sequence[Sequence[Value]]


def write_sample_report(
    path: Path,
    samples: Samples,
    reference: Reference,
    comparisons: Sequence[FeatureSets],
    results: Mapping[str, Any],
    rows: Rows,
) -> None:
    """Write the page with its pictures embedded; rows: the table of metrics."""
    tables: dict[str, Rows] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        figures = [_samples_figure(samples, folder)]
        for number, comparison in enumerate(comparisons):
            values = results[comparison.section]
            if reference.source is not None:
                distances = _distances(comparison)
                picture = folder / f"neighbours-{number}.png"
                figures.append(_neighbours_figure(comparison, distances, samples, reference, picture))
                tables[f"Classes ({comparison.extractor})"] = _class_rows(comparison, distances, samples, reference)
            figures.append(_curves_figure(comparison, values, folder, number))
        write_page(
            path,
            title=f"Evaluation of {Path(samples.title).name}",
            introduction=f"{len(samples):,} generated images beside {reference.path.name}: how near, how varied, and "
            " whether they are copies.",
            summary=_headlines(results, rows),
            figures=figures,
            metrics_table=rows,
            tables={title: table for title, table in tables.items() if len(table) > 2},
            notes=results["warnings"],
            commands=_command(),
            protocol=_protocol(results, comparisons, reference),
        )
    print(f"report written to {path}")


def _command() -> list[str]:
    """The command that is running; empty if the library is called from other code."""
    path = Path(sys.argv[0])  # of `python -m stablevm`, which launchers use, it is stablevm/__main__.py
    name = path.parent.name if path.stem == "__main__" else path.stem
    program = {"stablevm": "stablevm", "evaluate": "python evaluate.py"}.get(name)
    return [f"{program} {shlex.join(sys.argv[1:])}"] if program else []


def _headlines(results: Mapping[str, Any], rows: Rows) -> Mapping[str, Value]:
    """The metrics of the first network."""
    values = results.get("inception") or results["encoder"]
    return {metric.title: metric.shown(values) for metric in metrics_in(values)} | {"samples": f"{rows[1][1]:,}"}


def _samples_figure(samples: Samples, folder: Path) -> Figure:
    shown = min(len(samples), GRID_COLUMNS * GRID_ROWS)
    plot_sample_grid(samples.source.images(range(shown)), folder / "samples.png")
    return Figure("Samples", [folder / "samples.png"], f"The first {shown} of {len(samples):,}, unselected.")


def _distances(comparison: FeatureSets) -> tuple[Tensor, Tensor]:
    """The distances of samples to the nearest reference image, and of reference images to the nearest other one."""
    members = comparison.membership
    if isinstance(members, Neighbourhood):
        return members.to_reference, members.within_reference
    reference = comparison.reference["pool"]
    _, distances = nearest(comparison.samples["pool"], reference, device=comparison.device)
    (prepared,) = points(reference, device=comparison.device)
    return distances, radii(prepared, 1).sqrt().cpu()


def _neighbours_figure(
    comparison: FeatureSets, distances: tuple[Tensor, Tensor], samples: Samples, reference: Reference, picture: Path
) -> Figure:
    """The sample of each class nearest to a reference image; copies of training images would be among them."""
    assert reference.source is not None
    labels, what = _classes(comparison, samples), "The samples"
    closest = _closest(distances[0], labels)
    pool = comparison.samples["pool"][closest].double()
    count = min(NEIGHBOURS, len(reference.source))
    found = torch.stack(
        [(comparison.reference["pool"].double() - row).square().sum(1).topk(count, largest=False).indices
         for row in pool]
    )  # fmt: skip
    images = reference.source.images(found.flatten().tolist())
    if images.shape[1:3] != samples.size:
        images = np.stack([_scaled(image, samples.size) for image in images])
    images = images.reshape(*found.shape, *images.shape[1:])
    names = [_digits(distance) for distance in distances[0][closest]]
    if labels is not None:
        what, known = "Of each class, of ten at most, the samples", samples.labels is not None
        names = [f"{_class_name(int(labels[index]), reference, known=known)}: {name}"
                 for index, name in zip(closest.tolist(), names, strict=True)]  # fmt: skip
    plot_neighbours(samples.source.images(closest.tolist()), images, names, picture)
    return Figure(
        f"Nearest reference images, {comparison.extractor}",
        [picture],
        f"{what} that lie nearest to a reference image, nearest first, with their distances. Median over all "
        f"samples: {_digits(distances[0].median())}; between a reference image and its nearest other: "
        f"{_digits(distances[1].median())}, at least {_digits(distances[1].min())}. Copies would show here, if the "
        "reference holds what the network was trained on.",
    )


def _classes(comparison: FeatureSets, samples: Samples) -> NDArray[np.int64] | None:
    """Of each sample: its label, or else the class that the network sees; None where there is neither."""
    if samples.labels is None and "logits" in comparison.samples:
        return comparison.samples["logits"].argmax(1).numpy()
    return samples.labels


def _digits(distance: Tensor) -> str:
    """Three digits, also where the last ones are 0."""
    return f"{float(distance):#.3g}".removesuffix(".")


def _closest(distances: Tensor, labels: NDArray[np.int64] | None) -> Tensor:
    """The NEIGHBOUR_ROWS samples of least distance, as many of each class as go into the rows, at least one; ascending.

    labels: of samples, (N,); without any, whatever their class.
    """
    order = distances.argsort()
    if labels is None:
        return order[:NEIGHBOUR_ROWS]
    of_each = max(1, NEIGHBOUR_ROWS // len(np.unique(labels)))
    taken: Counter[int] = Counter()
    chosen = []
    for index in order.tolist():
        label = int(labels[index])
        taken[label] += 1
        if taken[label] <= of_each:
            chosen.append(index)
        if len(chosen) == NEIGHBOUR_ROWS:
            break
    return torch.tensor(chosen)


def _scaled(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Scale an image (H, W, 3) to another height and width, to show it beside others."""
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))


def _curves_figure(comparison: FeatureSets, values: Mapping[str, Any], folder: Path, number: int) -> Figure:
    with progress_bar(total=sum(SUBSETS), desc="subsets of the samples", unit="subset") as bar:
        curves = metric_curves(comparison, values, progress=bar.update)
    paths = []
    for metrics in panels_of(curves):
        paths.append(folder / f"curves-{number}-{metrics[0].name}.png")
        plot_metrics(metrics, curves, paths[-1])
    return Figure(
        f"Dependence on the number of samples, {comparison.extractor}",
        paths,
        "Mean and standard deviation over disjoint random subsets; the last point is all samples. Fréchet distances of "
        "few samples are biased upwards: compare those of equally many.",
    )


def _class_rows(
    comparison: FeatureSets, distances: tuple[Tensor, Tensor], samples: Samples, reference: Reference
) -> Rows:
    """A row for each class, worst first: samples, their precision and distances; reference images and their recall."""
    labels, members = _classes(comparison, samples), comparison.membership
    if labels is None or members is None:
        return []
    rows: list[tuple[Value, ...]] = []
    for label in np.unique(labels):
        mine = torch.from_numpy(labels == label)
        row: tuple[Value, ...] = (
            _class_name(int(label), reference, known=samples.labels is not None),
            int(mine.sum()),
            f"{float(members.samples[mine].double().mean()):.3f}",
            _digits(distances[0][mine].median()),
        )
        if samples.labels is not None and reference.labels is not None:
            theirs = torch.from_numpy(reference.labels == label)
            recall = f"{float(members.reference[theirs].double().mean()):.3f}" if theirs.any() else "none"
            row += (int(theirs.sum()), recall)
        rows.append(row)
    rows.sort(key=lambda each: float(each[2]))
    what = "class" if samples.labels is not None else "class that the network sees"
    head = (f"{what} (worst of {len(rows)})" if len(rows) > MAX_CLASSES else what, "samples", "precision",
            "median distance to the nearest reference image", "reference images", "recall")  # fmt: skip
    return [head[: len(rows[0])], *rows[:MAX_CLASSES]]


def _class_name(label: int, reference: Reference, *, known: bool) -> str:
    names = reference.class_names
    return caption(names[label]) if known and 0 <= label < len(names) else str(label)


def _protocol(results: Mapping[str, Any], comparisons: Sequence[FeatureSets], reference: Reference) -> dict[str, Value]:
    protocol: dict[str, Value] = {
        "samples": results["samples"],
        "reference": results["reference"],
        "reference images": results["reference_images"],
    }
    for comparison in comparisons:
        protocol[f"statistics, {comparison.extractor}"] = reference.statistics_text(bool(comparison.stored))
        protocol[f"precision and recall, {comparison.extractor}"] = comparison.arithmetic
    return {**protocol, "stablevm": __version__, "torch": torch.__version__}


@dataclass(frozen=True)
class Point:
    """A metric of `samples` images: its mean over subsets, and their standard deviation (None for a single one)."""

    samples: int
    mean: float
    deviation: float | None


def metric_curves(
    comparison: FeatureSets, whole: Mapping[str, Any], progress: Callable[[], object] = lambda: None
) -> dict[str, list[Point]]:
    """The points of each metric by its name in the results, smallest subsets first.

    whole: the results of all samples. progress: called after each subset.
    """
    count = len(comparison.samples["pool"])
    order = torch.randperm(count, generator=rng.generator("evaluation", "subsets"))
    names = [metric.name for metric in metrics_in(whole) if not metric.whole_set]
    found: dict[str, list[Point]] = {name: [] for name in names}
    for parts in SUBSETS:
        size = count // parts
        if size < MIN_SUBSET:
            continue
        results = []
        for part in range(parts):
            rows = order[part * size : (part + 1) * size]
            samples = {kind: features[rows] for kind, features in comparison.samples.items()}
            part_of = replace(comparison, samples=samples, stored=comparison.moments)
            results.append(results_of(part_of, subset=True))
            progress()
        for name in names:
            values = torch.tensor([each[name] for each in results], dtype=torch.float64)
            found[name].append(Point(size, float(values.mean()), float(values.std())))
    for name in names:
        found[name].append(Point(count, whole[name], None))
    return found
