"""Generating images from a checkpoint into an `.npz`, with one process or many, and resuming after interruptions.

Processes share only the folder of parts: each makes its own parts, and the first one assembles them. An image depends
only on its provenance and its index, so it does not matter which process makes it, or when.
"""

import json
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from stablevm.figures import sheets
from stablevm.interpolant import get_interpolant
from stablevm.networks.snapshot import ModelCard
from stablevm.sampling.archive import read_provenance, write_archive
from stablevm.sampling.config import GenerateConfig
from stablevm.sampling.image_sampler import ImageSampler
from stablevm.sampling.parts import PartFolder
from stablevm.sampling.provenance import (
    Provenance,
    check_same,
    decoding_notes,
    default_name,
    idle_claims,
    labels_of,
    newest_notes,
    provenance_of,
    resolved,
)
from stablevm.support.bars import progress_bar
from stablevm.support.compiler import check_compiler
from stablevm.support.errors import UserError
from stablevm.support.files import remove_temporary_of, replacing
from stablevm.support.images import save_gif, save_png
from stablevm.support.locks import owned
from stablevm.support.processes import Process

_POLL_SECONDS = 1.0
_WEIGHTS = {"ema": "EMA weights", "model": "last weights (not EMA)"}


@dataclass(frozen=True)
class Run:
    """One run of `generate`: what to make, and where."""

    config: GenerateConfig
    card: ModelCard
    provenance: Provenance
    process: Process

    @cached_property
    def name(self) -> str:
        return self.config.name or default_name(self.provenance)

    @property
    def target(self) -> Path:
        """The file that exists when the run is complete."""
        return self.file(".png" if self.config.grid else ".npz")

    def file(self, suffix: str) -> Path:
        return self.config.sample_dir / f"{self.name}{suffix}"

    @cached_property
    def parts(self) -> PartFolder:
        return PartFolder(self.file(".parts"), self.config.num_fid_samples, self.provenance)

    @cached_property
    def labels(self) -> Tensor:
        return labels_of(self.config, self.card)

    @cached_property
    def sampler(self) -> ImageSampler:
        return ImageSampler.load(self.config, self.card, self.process.device)


def generate(config: GenerateConfig) -> Path:
    """Make SAMPLE_DIR/NAME.npz, or complete it, and return its path; with `grid`, NAME.png instead.

    The archive holds `arr_0` uint8 (N, H, W, 3), `labels` int64 (N,) and `protocol`, a JSON string, which the picture
    has too, as a text chunk. Processes other than the first return when their own images are done. Raises UserError for
    options that are out of range or contradict the checkpoint, and if images of another provenance have this name; they
    are left unchanged.
    """
    config.validate()
    process = Process.from_environment()
    run = _prepare(config, process)
    with owned(config.sample_dir, run.name):
        if process.is_first:
            remove_temporary_of(*map(run.file, (".npz", ".png", ".gif")))
        _generate(run, process)
    return run.target


def _generate(run: Run, process: Process) -> None:
    # In this order: the result is written before parts are removed, so missing parts mean that it exists.
    missing = run.parts.missing(process.rank, process.world_size)
    complete = run.target.exists()
    if complete:
        check_same(run.provenance, read_provenance(run.target), run.target)
        if process.is_first:
            if not run.file(".png").exists() and not run.parts.missing() and not run.parts.drop_damaged():
                _plot_sheet(run)  # an interruption came between the archive and its picture
            run.parts.remove()
            print(f"{run.target} is already complete")
    else:
        _make(run, missing)
    if run.config.trajectory and process.is_first and not (complete and run.file(".gif").exists()):
        _make_film(run)


def _prepare(config: GenerateConfig, process: Process) -> Run:
    """Check the configuration against the checkpoint, and warn of options without effect."""
    given = config
    config, card = resolved(config)
    if config.compile:
        check_compiler(process.device)
    if process.is_first:
        for line in newest_notes(given, config):
            print(line)
        _print_warnings(config, card, process.device)
    config = config.effective()
    if config.grid:
        config = replace(config, num_fid_samples=sheets.quick_look_size(_num_classes(config, card)))
    return Run(config, card, provenance_of(config, card), process)


def _num_classes(config: GenerateConfig, card: ModelCard) -> int:
    return 1 if config.unconditional else len(config.class_indices() or card.trained_classes)


def _make(run: Run, missing: list[range]) -> None:
    """Make the missing parts of this process; the first process then waits for the others and assembles all parts."""
    started = time.monotonic()
    if missing or run.process.is_first:
        run.parts.open()
    try:
        damaged = run.parts.drop_damaged(run.process.rank, run.process.world_size)
    except FileNotFoundError:  # the first process has found all parts complete, and assembled them
        return
    if damaged:
        print(f"{run.parts.folder}: {len(damaged)} parts are damaged or hold other images; they are made again")
    missing = sorted([*missing, *damaged], key=lambda part: part.start)
    if run.process.is_first:
        print(f"{run.target}: {run.parts.num_images:,} images, {_WEIGHTS[run.config.weights]} of step {run.card.step}")
    with _progress(run) as progress:

        def show_progress() -> None:
            if run.process.is_first:
                progress.update(run.parts.num_present() - progress.n)

        evaluations = _sample(run, missing, show_progress) if missing else None
        others = run.process.is_first and _wait(run, show_progress)
    if others:
        print(f"{run.target}: another command has completed it")
    elif run.process.is_first:
        _assemble(run)
        cost = "" if evaluations is None else f"{evaluations} network evaluations per image, "
        picture = "" if run.config.grid else f"; some of the images: {run.file('.png')}"
        print(f"{run.target}: complete, {cost}{time.monotonic() - started:.1f} s{picture}")


def _sample(run: Run, missing: list[range], show_progress: Callable[[], None]) -> int:
    """Make the images of `missing` in batches, and write each part when it is full; return evaluations per image."""
    evaluations = 0
    indices = [index for part in missing for index in part]
    unwritten = deque(missing)
    sampled: list[NDArray[np.uint8]] = []
    for start in range(0, len(indices), run.config.per_proc_batch_size):
        batch = indices[start : start + run.config.per_proc_batch_size]
        images, evaluations = run.sampler.sample(batch, run.labels[batch])
        sampled.extend(images)
        while unwritten and len(sampled) >= len(unwritten[0]):
            part = unwritten.popleft()
            run.parts.write(part, np.stack(sampled[: len(part)]))
            del sampled[: len(part)]
        show_progress()
    return evaluations


def _wait(run: Run, show_progress: Callable[[], None]) -> bool:
    """Wait until all parts exist; True if another command has assembled them meanwhile, which locks prevent."""
    waits = False
    while run.parts.missing():
        if run.target.exists():
            return True
        if not run.parts.folder.exists():
            raise UserError(f"{run.parts.folder}: was removed while images were made; run the same command again")
        if not waits:
            tqdm.write(f"{run.target}: waiting for the other processes")
            waits = True
        time.sleep(_POLL_SECONDS)
        show_progress()
    return False


def _assemble(run: Run) -> None:
    """Make the archive and the picture from the parts, then remove the parts."""
    run.parts.sweep()
    if not run.config.grid:  # first, so that the images are safe whatever happens to the picture
        with replacing(run.target, scratch=run.parts.folder) as temporary:
            write_archive(temporary, run.parts.chunks(), run.labels.numpy(), run.provenance)
    _plot_sheet(run)
    run.parts.remove()


def _plot_sheet(run: Run) -> None:
    """Make the picture of some of the images, from the parts."""
    indices, columns = sheets.arrange(run.labels.numpy())
    captions = sheets.captions_of(run.labels[indices].tolist(), run.card)
    picture = sheets.plot_sheet(run.parts.pick(indices), columns, captions)
    # The temporary file is in the folder of parts, so that it is removed with the folder after an interruption.
    save_png(run.file(".png"), picture, {"protocol": json.dumps(run.provenance)}, scratch=run.parts.folder)


def _make_film(run: Run) -> None:
    """Make some of the images once more, and record the predictions on the way as a GIF."""
    fitting = sheets.film_columns_and_rows(run.sampler.image_side)
    indices, columns = sheets.arrange(run.labels.numpy(), *fitting)
    film = sheets.Film(get_interpolant(run.card.path_type), run.sampler.decode)
    images, _ = run.sampler.sample(indices, run.labels[indices], film)
    captions = sheets.captions_of(run.labels[indices].tolist(), run.card)
    frames = film.pictures(images, columns, captions)
    save_gif(run.file(".gif"), frames, sheets.FRAME_MILLISECONDS, sheets.LAST_FRAME_MILLISECONDS)
    print(f"{run.file('.gif')}: {len(indices)} images as the network predicts them at {len(film.frames)} times")


def _progress(run: Run) -> tqdm:
    return progress_bar(
        total=run.parts.num_images,
        initial=run.parts.num_present(),
        desc="images",
        unit="image",
        show=run.process.is_first,
    )


def _print_warnings(config: GenerateConfig, card: ModelCard, device: torch.device) -> None:
    warnings = config.warnings() + idle_claims(config, card) + decoding_notes(config.vae, card.latent)
    if config.tf32 and device.type == "cpu":
        warnings.append("--tf32 has no effect on a CPU")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
