"""Preparing and reading data against the limits of the machine.

python benchmarks/preparation.py convert   images/s of one process: conversion against Pillow's decoding and resizing
python benchmarks/preparation.py loader    latents/s of the training loader: shards, one file each, ZIP; cold and warm
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import describe_machine
from PIL import Image

from stablevm.autoencoder import LatentSpec
from stablevm.data.loader import training_loader
from stablevm.data.manifest import Manifest
from stablevm.data.opening import open_dataset
from stablevm.data.writer import ShardWriter
from stablevm.preparation import folders, shards
from stablevm.preparation.config import ConvertConfig, ConvertShardsConfig
from stablevm.preparation.pictures import dhariwal

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from sources import write_source

SIDE, LATENT = 256, (8, 32, 32)
BATCH = 256
CLASSES = 1000


def convert(scratch, images):
    """The limits first, then both layouts; all in this process, on one core, the files in the page cache."""
    # The mean size of ImageNet's images is about 470 x 390 pixels.
    source = write_source(scratch / "source", images=images, classes=20, shortest=300, longest=560)
    files = sorted(source.rglob("*.JPEG"))

    def decode():
        for file in files:
            Image.open(file).load()

    def decode_and_resize():
        for file in files:
            dhariwal(Image.open(file).convert("RGB"), (SIDE, SIDE))

    def to(kind, run, name):
        def convert_anew():
            shutil.rmtree(scratch / name, ignore_errors=True)
            run(kind(source=source, dest=scratch / name, resolution=f"{SIDE}x{SIDE}", num_workers=0))

        return convert_anew

    sides = {
        "decode (Pillow)": decode,
        "decode and resize (Pillow)": decode_and_resize,
        "convert to shards": to(ConvertShardsConfig, shards.convert, "shards"),
        "convert to PNG files": to(ConvertConfig, folders.convert, "images"),
    }
    decode()
    seconds = {name: (timed(run), processor_seconds(run)) for name, run in sides.items()}
    limits = seconds["decode and resize (Pillow)"]
    print(f"\n{'':28}  images/s  share of the limit  per second of the processor  share of the limit")
    for name, (elapsed, busy) in seconds.items():
        print(
            f"{name:28}  {images / elapsed:8,.0f}  {limits[0] / elapsed:18.0%}  "
            f"{images / busy:27,.0f}  {limits[1] / busy:18.0%}"
        )


def loader(scratch, rows, small_rows):
    """Random order, batches of 256, latents only."""
    write_shards(scratch / "large", rows)
    write_shards(scratch / "shards", small_rows)
    write_folder(scratch / "folder", small_rows)
    write_zip(scratch / "folder", scratch / "zip")
    names = {"shards": "shards", "one file each": "folder", "ZIP": "zip", f"shards, {rows:,} rows": "large"}
    print(f"\n{small_rows:,} rows unless said otherwise; latents/s of one process")
    print(f"{'':24}  workers       cold       warm  anonymous memory")
    for title, name in names.items():
        dataset = open_dataset(scratch / name)
        for workers in (0, 2):
            drop_cache(scratch / name)
            steps = min(len(dataset), 20_000 if name in ("folder", "zip") else 100_000) // BATCH
            run = partial(read, dataset, workers, steps)
            cold, warm = (steps * BATCH / timed(run) for _ in range(2))
            print(f"{title:24}  {workers:7}  {cold:9,.0f}  {warm:9,.0f}  {anonymous_megabytes():13,.0f} MB")


def read(dataset, workers, steps):
    for batch in training_loader(dataset, global_batch=BATCH, seed=0, num_steps=steps, workers=workers):
        assert len(batch.moments) == BATCH


def timed(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def processor_seconds(run):
    """Time in which this process computed: what other work on the machine, or its disk, does not disturb."""
    start = time.process_time()
    run()
    return time.process_time() - start


def write_shards(folder, rows):
    latent = LatentSpec((4, 32, 32), 0.18215, 0.0, "synthetic")
    names = tuple(map(str, range(CLASSES)))
    writer = ShardWriter(folder, Manifest(names, SIDE, "none", latent, has_flips=False, has_images=False), 10_000)
    for start in range(0, rows, 10_000):
        count = min(10_000, rows - start)
        numbers = torch.arange(start, start + count)
        moments = torch.rand((count, *LATENT)).half()
        writer.add(moments=moments, labels=numbers % CLASSES, index=numbers)
    writer.finish()


def write_folder(folder, rows):
    labels = []
    for row in range(rows):
        name = f"{row // 1000:05d}/img-mean-std-{row:08d}.npy"
        (folder / "vae-sd" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / "vae-sd" / name, np.random.default_rng(row).random(LATENT, np.float32))
        labels.append([name, row % CLASSES])
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))


def write_zip(source, target):
    target.mkdir()
    with zipfile.ZipFile(target / "vae-sd.zip", "w") as archive:
        for path in sorted((source / "vae-sd").rglob("*.*")):
            archive.write(path, path.relative_to(source / "vae-sd"))


def drop_cache(folder):
    """Take the files out of the page cache, so that the next read comes from the disk."""
    for path in folder.rglob("*.*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def anonymous_megabytes():
    """Memory of this process that is not a mapped file, which the system takes back when it needs it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1000


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["convert", "loader"])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--small-rows", type=int, default=20_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(describe_machine())
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "convert":
            convert(Path(folder), options.images)
        else:
            loader(Path(folder), options.rows, options.small_rows)
