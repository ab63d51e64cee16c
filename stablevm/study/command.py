"""`stablevm variance`: the variance of the targets on a user's own data, as a picture and as JSON."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from stablevm import rng
from stablevm.data.dataset import PreparedDataset
from stablevm.data.opening import open_dataset
from stablevm.errors import UserError
from stablevm.files import remove_temporary_of, write_json
from stablevm.interpolant import get_interpolant
from stablevm.locks import owned
from stablevm.study.config import VarianceConfig
from stablevm.variance import class_variance_curve
from stablevm.variance_figure import variance_figure

FILES = ("variance.json", "variance.png")
DEFAULT_CLASSES = 10
BLOCK_ROWS = 1024  # latents that are read at a time


def measure_variance(config: VarianceConfig) -> Path:
    """Measure, write OUTPUT_DIR/variance.json and variance.png, print what they recommend; returns the folder.

    Raises UserError, before anything is written, for options out of range, data that can't be read, and classes that
    the data lacks or holds too few samples of.
    """
    config.validate()
    with owned(config.output_dir, FILES[0]):
        remove_temporary_of(*(config.output_dir / name for name in FILES))
        return _measure(config)


def _measure(config: VarianceConfig) -> Path:
    dataset = open_dataset(config.data_dir)
    labels = dataset.labels()
    counts = torch.bincount(labels, minlength=dataset.num_classes).tolist()
    chosen = _choose_classes(config, counts)
    path = get_interpolant(config.path_type)
    classes = [(counts[label], _Blocks(dataset, (labels == label).nonzero().squeeze(1))) for label in chosen]
    with tqdm(total=len(chosen) * config.rows, desc="variance", unit="sample") as bar:
        curve = class_variance_curve(
            path,
            classes,
            torch.linspace(0, 1, config.times + 1, dtype=torch.float64)[1:],
            references=config.references,
            rows=config.rows,
            stream=rng.generator(config.seed, "variance"),
            progress=bar.update,
        )
    tau, xi = curve.recommended_tau(path), curve.split_point()
    title = f"{len(chosen)} class{'es' * (len(chosen) > 1)} of {config.data_dir}"
    options = {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(config).items()}
    write_json(
        config.output_dir / "variance.json",
        {"tau": tau, "xi": xi, **dataclasses.asdict(curve), "classes": chosen, "options": options},
    )
    variance_figure({title: curve}, config.output_dir / "variance.png", {title: tau})
    _report(config, [counts[label] for label in chosen], tau, xi)
    return config.output_dir


class _Blocks:
    """Reads the means of the latents at `rows`, in the network's space, from the start at every call."""

    def __init__(self, dataset: PreparedDataset, rows: Tensor) -> None:
        self.dataset, self.rows = dataset, rows

    def __call__(self) -> Iterator[Tensor]:
        for part in self.rows.split(BLOCK_ROWS):
            yield self.dataset.latent.means(self.dataset.moments(part))


def _choose_classes(config: VarianceConfig, counts: list[int]) -> list[int]:
    """Indices, ascending. Without --classes: of those with two samples or more, which a variance needs."""
    able = [label for label, count in enumerate(counts) if count >= 2]
    given = config.class_indices()
    if given is not None:
        wrong = [label for label in given if label not in able]
        if wrong:
            held = f"{counts[wrong[0]]} samples of it" if wrong[0] < len(counts) else f"classes 0 to {len(counts) - 1}"
            raise UserError(f"--classes {config.classes}: {config.data_dir} has {held}; name classes with 2 or more")
        return sorted(given)
    if not able:
        raise UserError(f"--data-dir {config.data_dir}: no class has two samples or more, so none has a variance")
    if config.classes == "all":
        return able
    order = torch.randperm(len(able), generator=rng.generator(config.seed, "classes"))
    return sorted(able[position] for position in order[:DEFAULT_CLASSES].tolist())


def _report(config: VarianceConfig, counts: list[int], tau: float, xi: float) -> None:
    short = sum(count < config.references for count in counts)
    if short:
        print(
            f"{short} of {len(counts)} classes have fewer than {config.references} samples: all of such a class are "
            "references, and StableVM's variance is 0 there"
        )
    print(f"--proj-tau {tau:.2f}: up to there x_t leaves less than half of a class's variance open")
    print(f"split point xi = {xi:.2f}: up to there fewer than two of the {config.references} references take part")
    print("finite classes are easier to tell apart than what they were drawn from: take both as upper bounds")
    print(f"written to {config.output_dir}: variance.png, variance.json")
