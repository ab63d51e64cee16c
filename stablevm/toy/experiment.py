"""`gmm_exp.py`: train what is asked for and not there yet, then draw and tabulate what there is."""

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from stablevm.figures.toy import FIELD_NAMES, divergence_figure
from stablevm.figures.variance import variance_figure
from stablevm.support.errors import UserError
from stablevm.support.files import is_temporary, remove_temporary, remove_temporary_of, write_json, write_text
from stablevm.support.locks import owned
from stablevm.toy import results
from stablevm.toy.config import ToyConfig
from stablevm.toy.training import train_method
from stablevm.toy.variance import curve_jobs, in_field
from stablevm.toy.visualization import visualize
from stablevm.training.tracker import Trackers
from stablevm.variance import VarianceCurve

FROM_THE_START = -1  # of an interrupted run no row is kept, not even that of update 0


def run(config: ToyConfig) -> None:
    """Everything that the options ask for. UserError for bad options; no result overwrites another."""
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
        _compare(config)
        if jobs:
            _draw_variance(config, jobs)
        if config.enable_visualization:
            _visualize(config)


def _curves_path(config: ToyConfig) -> Path:
    return config.output_dir / "data" / f"variance-{config.vector_field}.json"


def _sweep(config: ToyConfig) -> None:
    """Remove what interrupted commands left of figures, frames and curves, but nothing of results in the making."""
    folder = config.output_dir
    remove_temporary_of(_curves_path(config))
    for path in (*folder.glob("*"), *folder.glob("*/*.png")):
        if is_temporary(path):
            path.unlink()


def _train(config: ToyConfig, method: results.Method, seed: int) -> None:
    path = results.result_path(config, method, seed)
    with owned(path.parent, path.name):  # others may train other methods, or with other seeds
        if path.exists():
            print(f"{path}: is there already")
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


def _compare(config: ToyConfig) -> None:
    """The comparison figure and table of all finished results of these options."""
    found = results.find_all(config)
    if not found:
        if config.only_plot:
            print(f"{config.output_dir}: no finished result of these options to plot")
            return
        raise AssertionError("nothing was trained")
    text = results.table(found)
    write_text(config.output_dir / f"divergence-{config.vector_field}.md", text + "\n")
    divergence_figure(found, config.vector_field, config.output_dir / f"divergence-{config.vector_field}.png")
    print(f"\nFisher divergence after {config.updates:,} updates ({config.vector_field})\n\n{text}\n")
    print(f"figure: {config.output_dir / f'divergence-{config.vector_field}.png'}")


def _draw_variance(config: ToyConfig, jobs: dict[str, Callable[[], VarianceCurve]]) -> None:
    bar = tqdm(jobs.items(), desc="variance curves", unit="curve")
    curves = {title: in_field(config, job()) for title, job in bar}
    values = {
        title: {**dataclasses.asdict(curve), "split_point": curve.split_point()} for title, curve in curves.items()
    }
    figure = config.output_dir / f"variance-{config.vector_field}.png"
    write_json(_curves_path(config), values)
    target = "" if config.vector_field == "velocity" else FIELD_NAMES[config.vector_field]
    variance_figure(curves, figure, target=target)
    for title, curve in curves.items():
        print(f"split point of {title}: {curve.split_point():.2f}")
    print(f"figure: {figure}")


def _visualize(config: ToyConfig) -> None:
    for method in config.methods:
        path = results.result_path(config, method, config.seed)
        if not path.exists():
            raise UserError(f"--enable-visualization: there is no result {path}; run without --only-plot first")
        network = results.load_network(config, method, config.seed)
        for gif in visualize(config, network, f"{method}-{config.vector_field}", config.seed):
            print(f"moving picture: {gif}")
