"""The command `stablevm data info`: a table about a prepared data set, and a picture of examples with class names."""

from pathlib import Path

import numpy as np
import torch

from stablevm.data.dataset import PreparedDataset
from stablevm.data.opening import open_dataset
from stablevm.figures.sheets import plot_examples
from stablevm.networks.autoencoder import PerChannel
from stablevm.preparation.config import InfoConfig
from stablevm.preparation.verify import split_folders
from stablevm.support import rng
from stablevm.support.options import some_of

_MEASURED = 1024  # rows from which the mean and standard deviation of latents are measured


def info(config: InfoConfig) -> int:
    """Print the table and plot examples, for each split if there are several, and return the exit status."""
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
        plot_examples(dataset, picture, config.classes, config.per_class)
        print(f"{'picture'.ljust(width)}  {picture}\n")
    return 0


def table(dataset: PreparedDataset) -> list[tuple[str, str]]:
    """The rows of the table: names and values."""
    latent = dataset.latent
    counts = np.bincount(dataset.labels().numpy(), minlength=dataset.num_classes)
    chosen = torch.randperm(len(dataset), generator=rng.generator(0, "info"))[:_MEASURED].sort().values
    moments = dataset.moments(chosen)
    streams = rng.RowGenerators.for_keys(0, "info", positions=chosen.tolist())
    latents = latent.from_moments(moments, rng.randn((len(chosen), *latent.shape), streams))
    return [
        ("data set", f"{dataset.folder}, {dataset.layout}"),
        ("images", f"{len(dataset):,} of {dataset.resolution} x {dataset.resolution} pixels"),
        ("classes", f"{dataset.num_classes:,} with {_span(counts.min(), counts.max())} images"),
        ("class names", some_of(dataset.class_names, 6)),
        ("latents", f"{' x '.join(map(str, latent.shape))}, by {latent.autoencoder}"),
        ("normalised", f"(latent - {_numbers(latent.shift)}) x {_numbers(latent.scale)}"),
        ("", f"mean {latents.mean():.3f}, standard deviation {latents.std():.3f} ({len(chosen):,} rows)"),
        ("mirrored too", "yes" if dataset.has_flips else "no"),
        *dataset.facts(),
    ]


def _span(least: int, most: int) -> str:
    """Such as 100 to 110; one number where they are equal."""
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _numbers(values: PerChannel) -> str:
    return f"[{', '.join(f'{value:g}' for value in values)}]" if isinstance(values, tuple) else f"{values:g}"
