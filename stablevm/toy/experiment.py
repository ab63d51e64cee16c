"""The command `stablevm toy`: train the methods that have no result yet, then plot and tabulate all results."""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stablevm.advice.variance import BLOCK_ROWS, data_curve, dataset_curve
from stablevm.data.dataset import PreparedDataset
from stablevm.data.digits import prepare_digits
from stablevm.data.opening import open_dataset
from stablevm.figures.toy import FIELD_NAMES, plot_divergence
from stablevm.figures.variance import plot_variance
from stablevm.interpolant import LINEAR
from stablevm.networks.autoencoder import pixels_to_unit
from stablevm.support.bars import progress_bar
from stablevm.support.errors import UserError
from stablevm.support.files import is_temporary, remove_temporary, remove_temporary_of, write_json, write_text
from stablevm.support.locks import owned
from stablevm.toy import results
from stablevm.toy.config import ToyConfig
from stablevm.toy.films import make_films
from stablevm.toy.mixture import mixture_curve
from stablevm.toy.training import mixture_of, train_method
from stablevm.training.tracker import Trackers
from stablevm.variance import VarianceCurve

CURVE_TIMES = torch.linspace(0.05, 1.0, 20)
CIFAR_RECORD = 1 + 3 * 32 * 32  # bytes: the label, then the planes red, green and blue
CIFAR_FILES = [f"data_batch_{number}.bin" for number in range(1, 6)]
FROM_THE_START = -1  # no row of an interrupted run is kept, not even that of update 0


def run(config: ToyConfig) -> None:
    """Run everything that the options request; UserError for bad options. No result overwrites another."""
    config.validate()
    for line in config.warnings():
        print(f"warning: {line}", file=sys.stderr)
    jobs = {} if config.no_plot_variance else curve_jobs(config)  # data that is missing is told before training
    if not config.only_plot:
        for seed in range(config.seed, config.seed + config.seeds):
            for method in config.methods:
                _train(config, method, seed)
    with owned(config.output_dir, "figures", patience=math.inf):
        _sweep(config)
        _plot_divergence(config)
        if jobs:
            _plot_variance(config, jobs)
        if config.enable_visualization:
            _film(config)


def _curves_path(config: ToyConfig) -> Path:
    return config.output_dir / "data" / f"variance-{config.vector_field}.json"


def _sweep(config: ToyConfig) -> None:
    """Remove temporary files of figures, frames and curves, but not those of results in progress."""
    folder = config.output_dir
    remove_temporary_of(_curves_path(config))
    for path in (*folder.glob("*"), *folder.glob("*/*.png")):
        if is_temporary(path):
            path.unlink()


def _train(config: ToyConfig, method: results.Method, seed: int) -> None:
    path = results.result_path(config, method, seed)
    with owned(path.parent, path.name):  # others may train other methods, or with other seeds
        if path.exists():
            print(f"{path}: exists already")
            return
        remove_temporary_of(path, path.with_suffix(".safetensors"))
        _train_anew(config, method, seed, path)


def _train_anew(config: ToyConfig, method: results.Method, seed: int, path: Path) -> None:
    names = [name for name, wanted in (("wandb", config.use_wandb), ("tensorboard", config.use_tensorboard)) if wanted]
    folder = config.output_dir / "logs" / path.stem
    if folder.exists():
        remove_temporary(folder)
    trackers = Trackers(folder, names, config.result_settings(), first_step=FROM_THE_START)
    try:
        rows, network, seconds = train_method(method, config, seed, trackers)
    finally:
        trackers.close()
    results.save(config, method, seed, rows, network, seconds)
    shares = ", ".join(f"{part} {value:.1f} s" for part, value in seconds.items())
    print(f"{path}: {shares}")


def _plot_divergence(config: ToyConfig) -> None:
    """Plot and tabulate all finished results with these options."""
    found = results.find_all(config)
    if not found:
        if config.only_plot:
            print(f"{config.output_dir}: no finished result of these options to plot")
            return
        raise AssertionError("nothing was trained")
    text = results.table(found)
    write_text(config.output_dir / f"divergence-{config.vector_field}.md", text + "\n")
    plot_divergence(found, config.vector_field, config.output_dir / f"divergence-{config.vector_field}.png")
    print(f"\nFisher divergence after {config.updates:,} updates ({config.vector_field})\n\n{text}\n")
    print(f"figure: {config.output_dir / f'divergence-{config.vector_field}.png'}")


def _plot_variance(config: ToyConfig, jobs: dict[str, Callable[[], VarianceCurve]]) -> None:
    bar = progress_bar(jobs.items(), desc="variance curves", unit="curve")
    curves = {title: in_field(config, job()) for title, job in bar}
    values = {
        title: {**dataclasses.asdict(curve), "split_point": curve.split_point()} for title, curve in curves.items()
    }
    figure = config.output_dir / f"variance-{config.vector_field}.png"
    write_json(_curves_path(config), values)
    target = "" if config.vector_field == "velocity" else FIELD_NAMES[config.vector_field]
    plot_variance(curves, figure, target=target)
    for title, curve in curves.items():
        print(f"split point of {title}: {curve.split_point():.2f}")
    print(f"figure: {figure}")


def curve_jobs(config: ToyConfig) -> dict[str, Callable[[], VarianceCurve]]:
    """Functions that compute the requested curves, by title; UserError if data is missing."""
    jobs: dict[str, Callable[[], VarianceCurve]] = {
        f"Mixture, d = {d}": partial(_mixture_curve, config, d) for d in config.variance_dimensions
    }
    jobs["Handwritten digits"] = lambda: _dataset_curve(config, _digits(config))
    if config.cifar10_data_path is not None:
        files = cifar10_files(config.cifar10_data_path)
        jobs["CIFAR-10"] = lambda: _cifar10_curve(config, files)
    if config.imagenet_data_path is not None:
        dataset = open_dataset(config.imagenet_data_path)
        jobs[str(config.imagenet_data_path)] = lambda: _dataset_curve(config, dataset)
    return jobs


def in_field(config: ToyConfig, curve: VarianceCurve) -> VarianceCurve:
    """Convert a curve of velocities to the field that is learnt: itself, or sigma times the score."""
    return curve if config.vector_field == "velocity" else curve.of_noise(LINEAR)


def _mixture_curve(config: ToyConfig, dimension: int) -> VarianceCurve:
    mixture = mixture_of(config, config.seed, dimension)
    return mixture_curve(
        mixture, CURVE_TIMES, references=config.references, rows=config.variance_samples, seed=config.seed
    )


def _dataset_curve(config: ToyConfig, dataset: PreparedDataset) -> VarianceCurve:
    return dataset_curve(LINEAR, dataset, CURVE_TIMES, references=config.references, seed=config.seed)


def cifar10_files(folder: Path) -> list[Path]:
    """The five training files of CIFAR-10's binary version; UserError if one is missing or of another size."""
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

    count = sum(map(len, maps))
    return data_curve(LINEAR, blocks, count, CURVE_TIMES, references=config.references, seed=config.seed)


def _digits(config: ToyConfig) -> PreparedDataset:
    folder = config.output_dir / "data" / "digits"
    prepare_digits(folder)
    return open_dataset(folder)


def _film(config: ToyConfig) -> None:
    for method in config.methods:
        path = results.result_path(config, method, config.seed)
        if not path.exists():
            raise UserError(f"--enable-visualization: there is no result {path}; run without --only-plot first")
        network = results.load_network(config, method, config.seed)
        for gif in make_films(config, network, f"{method}-{config.vector_field}", config.seed):
            print(f"moving picture: {gif}")
