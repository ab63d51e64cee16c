"""Fill an `.npz` with images from a checkpoint, by one process or many, in one go or several.

Processes share nothing but the folder of parts: each draws the parts that fall to it, and the first one assembles
them. An image depends on the protocol and its own index alone, so it does not matter who draws it or when.
"""

import sys
import time
from collections import deque
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from stablevm.autoencoder import load_autoencoder
from stablevm.errors import UserError
from stablevm.files import write_with
from stablevm.images import save_png, tile
from stablevm.precision import tf32
from stablevm.processes import Process
from stablevm.rng import RowGenerators
from stablevm.sampling.archive import read_protocol, write_archive
from stablevm.sampling.config import GenerateConfig
from stablevm.sampling.parts import PartFolder
from stablevm.sampling.protocol import (
    Protocol,
    check_claims,
    check_same,
    default_name,
    labels_of,
    protocol_of,
    sampler_settings,
)
from stablevm.sampling.sampler import draw_latents
from stablevm.snapshot import ModelCard, load_card, load_model

_POLL_SECONDS = 1.0
_GRID_COLUMNS = 8
_GRID_MAX_CLASSES = 16  # with more classes than this, a row for each would be too tall a picture
_GRID_IMAGE_PIXELS = 64  # smaller images are enlarged to about this many pixels a side


@dataclass(frozen=True)
class Run:
    """One request: what to draw, and where it goes."""

    config: GenerateConfig
    card: ModelCard
    protocol: Protocol
    process: Process

    @property
    def target(self) -> Path:
        return self.config.sample_dir / f"{self.name}.npz"

    @property
    def name(self) -> str:
        return self.config.name or default_name(self.protocol)

    @cached_property
    def parts(self) -> PartFolder:
        return PartFolder(self.config.sample_dir / f"{self.name}.parts", self.config.num_fid_samples)

    @cached_property
    def labels(self) -> Tensor:
        return labels_of(self.config, self.card)


def generate(config: GenerateConfig) -> Path:
    """Make SAMPLE_DIR/NAME.npz, or what is still missing of it, and return its path.

    The archive holds `arr_0` uint8 (N, H, W, 3), `labels` int64 (N,) and `protocol`, a JSON string. Other processes
    than the first return when their share is drawn. Raises UserError for options out of range or against the
    checkpoint, and where images of another protocol have the name: those stay untouched.
    """
    config.validate()
    process = Process.from_environment()
    if process.is_first:
        _print_warnings(config, process.device)
    config = config.effective()
    card = _card(config)
    check_claims(config, card)
    run = Run(config, card, protocol_of(config, card), process)

    # In this order: the archive appears before the first part goes, so parts that are gone mean that it is there.
    missing = run.parts.missing(process.rank, process.world_size)
    if run.target.exists():
        check_same(run.protocol, read_protocol(run.target), run.target)
        if process.is_first:
            run.parts.remove()
            print(f"{run.target} is complete already")
    elif missing or process.is_first:
        _make(run, missing)
    return run.target


def _make(run: Run, missing: list[range]) -> None:
    """Draw the missing parts of this process; the first process then waits for the others and assembles them all."""
    started = time.monotonic()
    run.parts.open(run.protocol)
    with _progress(run) as progress:
        evaluations = _draw(run, missing, progress) if missing else None
        if run.process.is_first:
            _wait(run, progress)
    if run.process.is_first:
        _assemble(run)
        _report(run, evaluations, time.monotonic() - started)


def _draw(run: Run, missing: list[range], progress: tqdm) -> int:
    """Draw the images of `missing` in batches and write each part once it is full; the evaluations per image."""
    config, device = run.config, run.process.device
    settings = sampler_settings(config)
    model = load_model(config.ckpt, run.card, weights=config.weights, device=device)
    autoencoder = load_autoencoder(run.card.latent, name=config.vae, device=device)
    evaluations = 0
    indices = [index for part in missing for index in part]
    unwritten = deque(missing)
    drawn: list[NDArray[np.uint8]] = []
    for start in range(0, len(indices), config.per_proc_batch_size):
        batch = indices[start : start + config.per_proc_batch_size]
        streams = RowGenerators.for_keys("generate", config.global_seed, positions=batch)
        with tf32(config.tf32):
            latents, evaluations = draw_latents(model, run.card, run.labels[batch], streams, settings, device)
            _check_finite(latents, batch, config)
            drawn.extend(autoencoder.decode(latents).permute(0, 2, 3, 1).numpy())
        while unwritten and len(drawn) >= len(unwritten[0]):
            part = unwritten.popleft()
            run.parts.write(part, np.stack(drawn[: len(part)]))
            del drawn[: len(part)]
        progress.update(run.parts.num_present() - progress.n)
    return evaluations


def _check_finite(latents: Tensor, batch: list[int], config: GenerateConfig) -> None:
    broken = (~latents.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
    if broken:
        raise UserError(
            f"--precision {config.precision}: image {batch[broken[0]]} came out with values that are not finite; "
            "use fp32, or a checkpoint from before the training diverged"
        )


def _wait(run: Run, progress: tqdm) -> None:
    while run.parts.missing():
        progress.set_description("waiting for the other processes")
        time.sleep(_POLL_SECONDS)
        progress.update(run.parts.num_present() - progress.n)


def _assemble(run: Run) -> None:
    """Make the picture and the archive of the parts, then remove them."""
    if run.config.grid:
        save_png(run.target.with_name(f"{run.name}.png"), _grid(run))
    labels = run.labels.numpy()
    # Written in the folder of parts, so that what an interruption leaves of it goes with the folder.
    assembled = run.parts.folder / run.target.name
    write_with(assembled, lambda path: write_archive(path, run.parts.chunks(), labels, run.protocol))
    assembled.replace(run.target)
    run.parts.remove()


def _grid(run: Run) -> NDArray[np.uint8]:
    """One row for each class where they are few, else the first images."""
    labels = run.labels.numpy()
    classes, counts = np.unique(labels, return_counts=True)
    if 1 < len(classes) <= _GRID_MAX_CLASSES:
        columns = min(_GRID_COLUMNS, counts.min())
        indices = np.concatenate([np.flatnonzero(labels == label)[:columns] for label in classes])
    else:
        columns = min(_GRID_COLUMNS, len(labels))
        indices = np.arange(min(_GRID_COLUMNS**2, len(labels)))
    images = run.parts.pick(indices.tolist())
    return tile(images, columns, scale=max(1, _GRID_IMAGE_PIXELS // images.shape[1]))


def _card(config: GenerateConfig) -> ModelCard:
    """The checkpoint's card, with the attention kernel that was asked for: any computes the same function."""
    card = load_card(config.ckpt)
    if config.fused_attn is None:
        return card
    return replace(card, model=replace(card.model, fused_attn=config.fused_attn))


def _progress(run: Run) -> tqdm:
    return tqdm(
        total=run.parts.num_images,
        initial=run.parts.num_present(),
        unit="image",
        disable=not run.process.is_first,
    )


def _print_warnings(config: GenerateConfig, device: torch.device) -> None:
    warnings = config.warnings()
    if config.tf32 and device.type == "cpu":
        warnings.append("--tf32 has no effect on a CPU")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _report(run: Run, evaluations: int | None, seconds: float) -> None:
    weights = {"ema": "EMA weights", "model": "last weights (not EMA)"}[run.config.weights]
    cost = "" if evaluations is None else f", {evaluations} network evaluations per image"
    print(f"{run.target}: {run.parts.num_images} images, {weights} of step {run.card.step}{cost}, {seconds:.1f} s")
