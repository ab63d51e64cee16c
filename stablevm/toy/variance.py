"""Variance curves of mixtures, where the velocity is exact, and of data sets, where the data is the distribution."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stablevm.data.dataset import PreparedDataset, drawn_latents
from stablevm.data.digits import prepare_digits
from stablevm.data.opening import open_dataset
from stablevm.interpolant import LINEAR
from stablevm.networks.autoencoder import pixels_to_unit
from stablevm.posterior import posterior
from stablevm.support import rng
from stablevm.support.errors import UserError
from stablevm.toy.config import ToyConfig
from stablevm.toy.mixture import GaussianMixture
from stablevm.toy.training import mixture_of
from stablevm.variance import VarianceCurve, streamed_variance_curve

TIMES = torch.linspace(0.05, 1.0, 20)
SHARE_OF_DATA = 4  # a small data set lends at most one in so many of its samples as references: with all, V is 0
DATA_ROWS = 100  # anchors per time on data sets, where each is weighed against all the data
BLOCK_ROWS = 1024
CIFAR_RECORD = 1 + 3 * 32 * 32  # bytes: the label, then the planes red, green and blue
CIFAR_FILES = [f"data_batch_{number}.bin" for number in range(1, 6)]


def curve_jobs(config: ToyConfig) -> dict[str, Callable[[], VarianceCurve]]:
    """How to compute the curves that the options ask for, by their titles; UserError for data that is not there."""
    jobs: dict[str, Callable[[], VarianceCurve]] = {
        f"Mixture, d = {d}": partial(mixture_curve, config, mixture_of(config, config.seed, d))
        for d in config.variance_dimensions
    }
    jobs["Handwritten digits"] = lambda: _prepared_curve(config, _digits(config))
    if config.cifar10_data_path is not None:
        files = cifar10_files(config.cifar10_data_path)
        jobs["CIFAR-10"] = lambda: _cifar10_curve(config, files)
    if config.imagenet_data_path is not None:
        dataset = open_dataset(config.imagenet_data_path)
        jobs[str(config.imagenet_data_path)] = lambda: _prepared_curve(config, dataset)
    return jobs


def in_field(config: ToyConfig, curve: VarianceCurve) -> VarianceCurve:
    """A curve of velocities as one of the field that is learnt: itself, or that of sigma times the score."""
    return curve if config.vector_field == "velocity" else curve.of_noise(LINEAR)


def mixture_curve(config: ToyConfig, mixture: GaussianMixture) -> VarianceCurve:
    """Errors about the closed-form velocity; each time has its own set of references, shared by its samples."""
    rows, references = config.variance_samples, config.references

    def samples_at(time: float) -> tuple[Tensor, Tensor, Tensor]:
        stream = rng.generator(config.seed, "variance", mixture.dimension, f"{time:.6f}")
        x0, others = mixture.sample(rows, stream), mixture.sample(references - 1, stream)
        noise, t = torch.randn(x0.shape, generator=stream), torch.full((rows,), time)
        found = posterior(LINEAR, x0, noise, t, others)
        exact = mixture.field(LINEAR, LINEAR.interpolate(x0, noise, t), time)
        plain = LINEAR.velocity(x0, noise, t)
        target = plain + LINEAR.offset_gain(t, x0) * found.offset
        return (plain - exact).square().mean(1), (target - exact).square().mean(1), found.ess

    return VarianceCurve.of(TIMES, references, [samples_at(time) for time in TIMES.tolist()])


def cifar10_files(folder: Path) -> list[Path]:
    """The five training files of CIFAR-10's binary version; UserError naming what is missing or of another size."""
    files = [folder / name for name in CIFAR_FILES]
    for path in files:
        if not path.is_file():
            raise UserError(
                f"--cifar10-data-path {folder}: no file {path.name}; give the folder of CIFAR-10's binary version "
                "(data_batch_1.bin to data_batch_5.bin; the Python version is a pickle, which is not read)"
            )
        if path.stat().st_size == 0 or path.stat().st_size % CIFAR_RECORD:
            raise UserError(f"--cifar10-data-path {folder}: {path.name} is not a multiple of {CIFAR_RECORD} bytes")
    return files


def _cifar10_curve(config: ToyConfig, files: list[Path]) -> VarianceCurve:
    maps = [np.memmap(path, np.uint8, "r").reshape(-1, CIFAR_RECORD)[:, 1:] for path in files]

    def blocks() -> Iterator[Tensor]:
        for records in maps:
            for start in range(0, len(records), BLOCK_ROWS):
                yield pixels_to_unit(torch.from_numpy(np.array(records[start : start + BLOCK_ROWS])))

    return _data_curve(config, blocks, sum(map(len, maps)))


def _prepared_curve(config: ToyConfig, dataset: PreparedDataset) -> VarianceCurve:
    """A draw of each latent, in the network's space, as training sees it."""

    def blocks() -> Iterator[Tensor]:
        for start in range(0, len(dataset), BLOCK_ROWS):
            rows = range(start, min(start + BLOCK_ROWS, len(dataset)))
            yield drawn_latents(dataset, rows, config.seed, "variance", "latent")

    return _data_curve(config, blocks, len(dataset))


def _data_curve(config: ToyConfig, blocks: Callable[[], Iterator[Tensor]], count: int) -> VarianceCurve:
    return streamed_variance_curve(
        LINEAR,
        blocks,
        count,
        TIMES,
        references=max(2, min(config.references, count // SHARE_OF_DATA)),
        rows=DATA_ROWS,
        generator=rng.generator(config.seed, "variance", count),
    )


def _digits(config: ToyConfig) -> PreparedDataset:
    folder = config.output_dir / "data" / "digits"
    prepare_digits(folder)
    return open_dataset(folder)
