"""The command `stablevm variance`, the variance of targets on a user's data, and curves for whole data sets."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stablevm.advice.config import VarianceConfig
from stablevm.data.dataset import PreparedDataset, drawn_latents
from stablevm.data.mirrored import MirroredDataset
from stablevm.data.opening import open_dataset
from stablevm.figures.variance import plot_variance
from stablevm.interpolant import Interpolant, get_interpolant
from stablevm.support import rng
from stablevm.support.bars import progress_bar
from stablevm.support.cards import entry_of
from stablevm.support.errors import UserError
from stablevm.support.files import remove_temporary_of, write_json
from stablevm.support.locks import owned
from stablevm.support.options import check_options
from stablevm.times import draw_times
from stablevm.variance import VarianceCurve, class_variance_curve, streamed_variance_curve

FILES = ("variance.json", "variance.png")
DEFAULT_CLASSES = 10
BLOCK_ROWS = 1024  # latents read at a time
SHARE_OF_DATA = 4  # at most one in this many samples of a data set is a reference; with all, the variance would be 0
TIMES_DRAWN = 2**16  # training times over which the advice averages
Worth = Literal["yes", "unclear", "no"]
# By the share of samples with more than one reference, and the share of the variance that these remove, at the times of
# the training (docs/results.md): on the digits, 0.6 and 0.9, images were nearer after 800 steps; on Fashion-MNIST,
# 0.3 and 0.8, at first alone. With a tenth, nine of ten targets are those of CFM.
MUCH, LITTLE = 0.5, 0.1
VERDICTS: dict[Worth, str] = {
    "yes": "worth its cost, as on the digits, whose images became better",
    "unclear": "expect a faster start and little later, as on Fashion-MNIST; stablevm study compares both on your data",
    "no": "not worth its cost, since the targets are nearly those of CFM",
}
DATA_ROWS = 100  # anchors per time on a whole data set, each of which is compared with all the data


def measure_variance(config: VarianceConfig) -> Path:
    """Measure the variance, write OUTPUT_DIR/variance.json and variance.png, print the recommendations, and return the
    folder.

    Raises UserError, before anything is written, for options out of range, data that can't be read, and classes with
    too few samples.
    """
    config.validate()
    with owned(config.output_dir, FILES[0]):
        remove_temporary_of(*(config.output_dir / name for name in FILES))
        _check_replaced(config)
        return _measure(config)


def _options(config: VarianceConfig) -> dict[str, Any]:
    """The options as JSON values."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(config).items()}


def _check_replaced(config: VarianceConfig) -> None:
    """UserError where the folder holds a curve with other options, or a file of that name that is not a curve."""
    path, remedy = config.output_dir / FILES[0], "give another --output-dir"
    if not path.exists():
        return
    earlier = entry_of(path, "options")
    if earlier is None:
        raise UserError(f"{path} exists, and was not made by this command: {remedy}")
    options = _options(config)
    check_options(path, options, earlier | {"output_dir": options["output_dir"]}, remedy)


def dataset_curve(
    path: Interpolant, dataset: PreparedDataset, times: Tensor, *, references: int, seed: int
) -> VarianceCurve:
    """The curve of a whole data set without classes, with latents sampled as in training."""

    def blocks() -> Iterator[Tensor]:
        for start in range(0, len(dataset), BLOCK_ROWS):
            rows = range(start, min(start + BLOCK_ROWS, len(dataset)))
            yield drawn_latents(dataset, rows, seed, "variance", "latent")

    return data_curve(path, blocks, len(dataset), times, references=references, seed=seed)


def data_curve(
    path: Interpolant,
    blocks: Callable[[], Iterator[Tensor]],
    count: int,
    times: Tensor,
    *,
    references: int,
    seed: int,
) -> VarianceCurve:
    """The curve of `count` samples that `blocks()` reads; references are at most a quarter of the data."""
    return streamed_variance_curve(
        path,
        blocks,
        count,
        times,
        references=max(2, min(references, count // SHARE_OF_DATA)),
        rows=DATA_ROWS,
        generator=rng.generator(seed, "variance", count),
    )


def _measure(config: VarianceConfig) -> Path:
    dataset = open_dataset(config.data_dir)
    if config.horizontal_flips:
        dataset = MirroredDataset(dataset)
    labels = dataset.labels()
    counts = torch.bincount(labels, minlength=dataset.num_classes).tolist()
    chosen = _choose_classes(config, counts)
    path = get_interpolant(config.path_type)
    classes = [_Blocks(dataset, (labels == label).nonzero().squeeze(1), config) for label in chosen]
    with progress_bar(total=len(chosen) * config.rows, desc="variance", unit="sample") as bar:
        curve = class_variance_curve(
            path,
            [(len(blocks), blocks) for blocks in classes],
            torch.linspace(0, 1, config.times + 1, dtype=torch.float64)[1:],
            references=config.references,
            rows=config.rows,
            generator=rng.generator(config.seed, "variance"),
            references_from=config.references_from,
            progress=bar.update,
        )
    noise, advice = _share_of_noise(classes), Advice.of(curve, path, config)
    title = f"{len(chosen)} class{'es' * (len(chosen) > 1)} of {config.data_dir}"
    write_json(
        config.output_dir / "variance.json",
        {
            **dataclasses.asdict(advice),
            "noise_share": noise,
            **dataclasses.asdict(curve),
            "classes": chosen,
            "options": _options(config),
        },
    )
    plot_variance({title: curve}, config.output_dir / "variance.png", {title: advice.tau})
    _report(config, curve.references, [len(blocks) for blocks in classes], advice, noise)
    return config.output_dir


@dataclasses.dataclass(frozen=True)
class Advice:
    """What a curve says about the options of training."""

    tau: float  # of the alignment
    xi: float  # the split point
    worth: Worth  # whether StableVM can be worth its cost
    active_share: float  # of training samples, at times with an effective number of references of 2 or more
    removed_share: float  # of the variance of CFM's targets at training times, by averaging over references
    references_from: float  # the latest time from which on references lose next to nothing; 1: they remove nothing
    idle_share: float  # of training samples at earlier times, whose references need not be weighed

    @classmethod
    def of(cls, curve: VarianceCurve, path: Interpolant, config: VarianceConfig) -> "Advice":
        """The advice for training times as in `config`."""
        times = draw_times(config.weighting, path, TIMES_DRAWN, rng.generator(config.seed, "variance", "times"))
        active, removed, start = (
            each(times) for each in (curve.active_share, curve.removed_share, curve.references_start)
        )
        least = min(active, removed)
        worth: Worth = "yes" if least >= MUCH else "no" if least < LITTLE else "unclear"
        idle = float((times < start).double().mean())
        return cls(curve.recommended_tau(path), curve.split_point(), worth, active, removed, start, idle)

    def sentence(self, references: int) -> str:
        """What it means for StableVM with that many references, in one line."""
        return (
            f"StableVM: two or more of {references} references take part in {self.active_share:.0%} of the "
            f"samples, and take {self.removed_share:.0%} of the targets' variance away: {VERDICTS[self.worth]}"
        )

    def start_line(self) -> str:
        """The time from which on references are worth their cost, in one line."""
        return (
            f"--references-from {self.references_from:.2f}: {self.idle_share:.0%} of the samples, at earlier times, go "
            "without references, and less than 3 % of what they remove is lost"
        )


class _Blocks:
    """Reads the latents of `rows` at each call, always with the same random numbers, which are those of a bank."""

    def __init__(self, dataset: PreparedDataset, rows: Tensor, config: VarianceConfig) -> None:
        self.dataset, self.rows, self.seed = dataset, rows, config.seed

    def __len__(self) -> int:
        return len(self.rows)

    def __call__(self) -> Iterator[Tensor]:
        for part in self.rows.split(BLOCK_ROWS):
            yield drawn_latents(self.dataset, part.tolist(), self.seed, "prefill")

    def variances(self) -> tuple[float, float]:
        """The variance of the autoencoder's noise, and that between the samples' means, averaged over dimensions."""
        spec = self.dataset.latent
        own = total = squares = torch.zeros(spec.shape, dtype=torch.float64)
        for part in self.rows.split(BLOCK_ROWS):
            moments = self.dataset.moments(part)
            means = spec.means(moments)
            deviations = spec.from_moments(moments, torch.ones_like(means)) - means
            own = own + deviations.double().square().sum(0)
            total, squares = total + means.double().sum(0), squares + means.double().square().sum(0)
        between = squares / len(self) - (total / len(self)).square()
        return float(own.mean() / len(self)), float(between.mean())


def _share_of_noise(classes: Sequence[_Blocks]) -> float:
    """The share of the latents' variance within their classes that is due to the autoencoder's noise."""
    own, between = map(sum, zip(*(blocks.variances() for blocks in classes), strict=True))
    return own / (own + between) if own + between > 0 else 0.0


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


def _report(config: VarianceConfig, references: int, counts: list[int], advice: Advice, noise: float) -> None:
    """Print the advice. references: those of a sample, on average."""
    short = sum(count < config.references for count in counts)
    if short:
        print(
            f"{short} of {len(counts)} classes have fewer than {config.references} samples: all of such a class are "
            "references, and StableVM's variance is 0 there"
        )
    print(f"--proj-tau {advice.tau:.2f}: up to there x_t leaves less than half of a class's variance open")
    print(f"split point xi = {advice.xi:.2f}: up to there fewer than two of the {references} references take part")
    print(f"{noise:.1%} of the variance within classes is the autoencoder's own noise, which no reference resembles")
    print("finite classes are easier to tell apart than what they were drawn from: take both as upper bounds")
    print(advice.start_line())
    print(advice.sentence(references))
    print(f"written to {config.output_dir}: variance.png, variance.json")
