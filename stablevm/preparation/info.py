"""What a prepared data set holds: a table, and a picture of examples with their classes' names."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from stablevm.data.dataset import PreparedDataset
from stablevm.data.opening import open_dataset
from stablevm.figures.style import PAGE_WIDTH, new_figure, plain, save_figure, style
from stablevm.networks.autoencoder import PerChannel
from stablevm.preparation.config import InfoConfig
from stablevm.preparation.verify import split_folders
from stablevm.support import rng
from stablevm.support.images import tile
from stablevm.support.options import some_of

_MEASURED = 1024  # rows whose latents give the mean and the standard deviation of the table
_NAME_SHARE = 0.2  # of the picture's width, for the classes' names
_NAME_LENGTH = 24


def info(config: InfoConfig) -> int:
    """Print the table and draw the picture, of each split where there are several; returns the exit status."""
    config.validate()
    folders = split_folders(config.data_dir)
    for folder in folders:
        dataset = open_dataset(folder)
        rows = table(dataset)
        width = max(len(name) for name, _ in rows)
        print("\n".join(f"{name.ljust(width)}  {value}" for name, value in rows))
        name = folder.name if len(folders) == 1 else f"{config.data_dir.name}-{folder.name}"
        picture = config.picture or Path(f"{name or 'data'}-examples.png")
        if config.picture is not None and len(folders) > 1:
            picture = picture.with_stem(f"{picture.stem}-{folder.name}")
        draw_examples(dataset, picture, config.classes, config.per_class)
        print(f"{'picture'.ljust(width)}  {picture}\n")
    return 0


def table(dataset: PreparedDataset) -> list[tuple[str, str]]:
    """Names and values, for people."""
    latent = dataset.latent
    counts = np.bincount(dataset.labels().numpy(), minlength=dataset.num_classes)
    chosen = torch.randperm(len(dataset), generator=rng.generator(0, "info"))[:_MEASURED].sort().values
    moments = dataset.moments(chosen)
    streams = rng.RowGenerators.for_keys(0, "info", positions=chosen.tolist())
    latents = latent.from_moments(moments, rng.randn((len(chosen), *latent.shape), streams))
    return [
        ("data set", f"{dataset.folder}, {dataset.layout}"),
        ("images", f"{len(dataset):,} of {dataset.resolution} x {dataset.resolution} pixels"),
        ("classes", f"{dataset.num_classes:,} with {counts.min():,} to {counts.max():,} images"),
        ("class names", some_of(dataset.class_names, 6)),
        ("latents", f"{' x '.join(map(str, latent.shape))}, by {latent.autoencoder}"),
        ("normalised", f"(latent - {_numbers(latent.shift)}) x {_numbers(latent.scale)}"),
        ("", f"mean {latents.mean():.3f}, standard deviation {latents.std():.3f} ({len(chosen):,} rows)"),
        ("mirrored too", "yes" if dataset.has_flips else "no"),
        *dataset.facts(),
    ]


def draw_examples(dataset: PreparedDataset, path: Path, classes: int, per_class: int) -> None:
    """A PNG file: a row for each of `classes` classes, spread over all, with `per_class` images chosen by chance.

    Without images in the set the first three channels of the latents stand for them.
    """
    labels = dataset.labels().numpy()
    present = np.unique(labels)
    shown = present[np.linspace(0, len(present) - 1, min(classes, len(present))).round().astype(int)]
    stream = np.random.default_rng(0)
    strips = []
    for label in shown:
        rows = stream.permutation(np.flatnonzero(labels == label))[:per_class]
        strips.append(_pictures(dataset, np.sort(rows)))
    figure_height = PAGE_WIDTH * (1 - _NAME_SHARE) / per_class * len(strips) + 0.6
    with style():
        figure = new_figure(height=figure_height)
        figure.suptitle(plain(_title(dataset)), x=0.02, ha="left", fontweight="bold")
        top = 1 - 0.5 / figure_height
        for number, (label, strip) in enumerate(zip(shown, strips, strict=True)):
            height = top / len(strips)
            axes = figure.add_axes((_NAME_SHARE, top - (number + 1) * height, 1 - _NAME_SHARE, height))
            axes.imshow(tile(strip, per_class, pad=max(1, dataset.resolution // 64)))
            axes.set_anchor("W")
            axes.axis("off")
            name = dataset.class_names[label]
            figure.text(0.02, top - (number + 0.5) * height, plain(_cut(name)), va="center")
        save_figure(figure, path)


def _pictures(dataset: PreparedDataset, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """uint8 (n, H, W, 3)."""
    if dataset.has_images:
        return dataset.images(rows).permute(0, 2, 3, 1).numpy()
    mean = dataset.moments(rows).float().chunk(2, dim=1)[0]
    colours = mean[:, torch.arange(3) % mean.shape[1]]
    low, high = colours.amin((0, 2, 3), keepdim=True), colours.amax((0, 2, 3), keepdim=True)
    return ((colours - low) / (high - low).clamp(min=1e-6) * 255).byte().permute(0, 2, 3, 1).numpy()


def _title(dataset: PreparedDataset) -> str:
    shown = "images" if dataset.has_images else "latents, three channels as colours (no images in the set)"
    return f"{dataset.folder.name}: {shown}, {len(dataset):,} in {dataset.num_classes:,} classes"


def _numbers(values: PerChannel) -> str:
    return f"[{', '.join(f'{value:g}' for value in values)}]" if isinstance(values, tuple) else f"{values:g}"


def _cut(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 3] + "..."
