"""A small prepared data set of three shards, and ways to interrupt its writer: shared by the tests of data."""

from pathlib import Path

import torch

from stablevm.data.manifest import Manifest
from stablevm.data.writer import ShardWriter
from stablevm.networks.autoencoder import LatentSpec

COUNT = 20_000  # three shards: 8,192, 8,192 and 3,616 rows
DESCRIPTION = Manifest(
    class_names=("cat", "dog", "owl"),
    resolution=4,
    crop="none",
    latent=LatentSpec((1, 2, 2), 0.5, 0.25, "somewhere"),
    has_flips=True,
    has_images=True,
)


def source(count=COUNT):
    stream = torch.Generator().manual_seed(5)
    return {
        "moments": torch.randn(count, 2, 2, 2, generator=stream).half(),
        "moments_flip": torch.randn(count, 2, 2, 2, generator=stream).half(),
        "labels": torch.randint(3, (count,), generator=stream),
        "index": torch.arange(count) * 7 + 3,
        "images": torch.randint(256, (count, 3, 4, 4), generator=stream).to(torch.uint8),
    }


def write(folder, rows, description=DESCRIPTION, batch=3_000):
    writer = ShardWriter(folder, description)
    for begin in range(0, len(rows["index"]), batch):
        writer.add(**{name: tensor[begin : begin + batch] for name, tensor in rows.items()})
    return writer.finish()


def damaged(folder):
    """Names of the shards' files that are absent or differ from their checksum."""
    return [file.name for file in Manifest.read(folder).files() if not file.is_intact(folder)]


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def kill_at_rename(patch, allowed):
    """Interrupt the program when it would give its final name to file number `allowed`, counted from 0."""
    rename, done = Path.replace, []

    def replace(self, target):
        if len(done) == allowed:
            raise KeyboardInterrupt
        done.append(target)
        return rename(self, target)

    patch.setattr(Path, "replace", replace)
