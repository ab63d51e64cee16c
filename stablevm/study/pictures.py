"""The picture of a study's samples: a row of images for each arm, below a row of real ones."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stablevm.data.opening import open_dataset
from stablevm.evaluation.samples import open_samples
from stablevm.figures.sheets import plot_sheet
from stablevm.study.config import StudyConfig
from stablevm.study.results import name_of
from stablevm.support.images import save_png

COLUMNS = 20
SEED = 0  # of the samples that are shown


def samples_path(config: StudyConfig, arm: str, seed: int, step: int) -> Path:
    """The file of the samples that are evaluated at a point."""
    return config.output_dir / "samples" / f"{name_of(arm, seed, step)}.npz"


def draw_samples(config: StudyConfig, arms: Iterable[str], path: Path) -> None:
    """Write the picture of the arms that have samples of the first seed at the last point; nothing if none has.

    Images in a column have the same class, and those of the arms the same noise. They are the first ones, not chosen.
    """
    files = {arm: samples_path(config, arm, SEED, config.steps[-1]) for arm in arms}
    samples = {arm: open_samples(file) for arm, file in files.items() if file.exists()}
    labels = [each.labels for each in samples.values() if each.labels is not None]
    assert len(labels) == len(samples), "generate writes the classes of its samples"
    test = open_dataset(config.data_dir, "test")
    places = list(_places([test.labels().numpy(), *labels]))
    if not labels or not places:
        return
    rows = [test.images(places[0]).permute(0, 2, 3, 1).numpy()]
    rows += [each.source.images(chosen) for each, chosen in zip(samples.values(), places[1:], strict=True)]
    captions = [name for name in ("test images", *samples) for _ in places[0]]
    save_png(path, plot_sheet(np.concatenate(rows), len(places[0]), captions))


def _places(sets: Sequence[NDArray[np.int64]]) -> Iterator[list[int]]:
    """For each set of labels the places of the first ones of each class, equally many in all; nothing if the sets have
    no class in common.
    """
    classes = sorted(set.intersection(*(set(labels.tolist()) for labels in sets)))[:COLUMNS]
    if not classes:
        return
    each = min(COLUMNS // len(classes), *(int((labels == label).sum()) for labels in sets for label in classes))
    for labels in sets:
        yield [int(place) for label in classes for place in np.flatnonzero(labels == label)[:each]]
