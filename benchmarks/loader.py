"""The training loader: samples/s from shards, single files and ZIP, cold and warm, with and without images.

python benchmarks/loader.py [--rows 20000] [--large-rows 200000] [--image-rows 8192] [--workers 0 2] [--device auto]

The data is made in a temporary folder. On a GPU the batches are pinned and copied to it, as in training.
"""

import json
import os
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
import tyro
from common import DeviceName, choose_device, copy_bandwidth, timed
from PIL import Image

from stablevm.data.dataset import PreparedDataset
from stablevm.data.loader import training_loader
from stablevm.data.manifest import Manifest
from stablevm.data.opening import open_dataset
from stablevm.data.writer import MIN_ROWS, ShardWriter
from stablevm.networks.autoencoder import LatentSpec
from stablevm.support.machine import CPU, describe_machine

SIDE, MOMENTS, CLASSES = 256, (8, 32, 32), 1000


@dataclass(frozen=True)
class Workload:
    """Read batches in random order, each sample once if the limit allows it."""

    rows: int = 20_000
    """Rows of each small data set without images."""
    large_rows: int = 200_000
    """Rows of the large data set in shards, 16 KB each. 0 leaves it out."""
    image_rows: int = 8192
    """Rows of the data sets with images of 256 x 256, 0.2 MB each in shards. 0 leaves them out."""
    batch: int = 256
    workers: tuple[int, ...] = tuple(sorted({0, 2, os.cpu_count() or 1}))
    most_samples: int = 100_000
    """Samples read in one measurement; a fifth of it from files and ZIP, a twentieth with images."""
    repeats: int = 3
    device: DeviceName = "auto"


@dataclass(frozen=True)
class Side:
    """A data set on disk, and the number of samples that one measurement reads."""

    title: str
    folder: Path
    most_samples: int
    with_images: bool


def write_shards(folder: Path, rows: int, with_images: bool) -> None:
    latent = LatentSpec((4, 32, 32), 0.18215, 0.0, "synthetic")
    names, stream = tuple(map(str, range(CLASSES))), torch.Generator().manual_seed(0)
    writer = ShardWriter(folder, Manifest(names, SIDE, "none", latent, has_flips=False, has_images=with_images))
    block = MIN_ROWS // 8
    for start in range(0, rows, block):
        count = min(block, rows - start)
        numbers = torch.arange(start, start + count)
        writer.add(
            moments=torch.rand((count, *MOMENTS), generator=stream).half(),
            labels=numbers % CLASSES,
            index=numbers,
            images=random_images(count, stream) if with_images else None,
        )
    writer.finish()


def random_images(count: int, stream: torch.Generator) -> torch.Tensor:
    """Random images, smooth enough that PNG compresses them to about two thirds, as it does photographs."""
    rough = torch.rand((count, 3, SIDE // 8, SIDE // 8), generator=stream)
    smooth = torch.nn.functional.interpolate(rough, size=(SIDE, SIDE), mode="bilinear")
    return (smooth * 240).byte() + torch.randint(16, (1, 3, SIDE, SIDE), generator=stream).byte()


def write_folder(folder: Path, rows: int, with_images: bool) -> None:
    """Write the layout of REPA: one .npy file for each sample, and one .png file if there are images."""
    stream = torch.Generator().manual_seed(0)
    latents, images = [], []
    for row in range(rows):
        latents.append([f"{row // 1000:05d}/img-mean-std-{row:08d}.npy", row % CLASSES])
        path = folder / "vae-sd" / latents[-1][0]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, torch.rand(MOMENTS, generator=stream).numpy())
        if with_images:
            images.append([f"{row // 1000:05d}/img{row:08d}.png", row % CLASSES])
            path = folder / "images" / images[-1][0]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random_images(1, stream)[0].permute(1, 2, 0).numpy()).save(path, compress_level=1)
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": latents}))
    if with_images:
        (folder / "images" / "dataset.json").write_text(json.dumps({"labels": images}))


def write_zip(source: Path, target: Path) -> None:
    target.mkdir()
    for part in sorted(source.iterdir()):
        with zipfile.ZipFile(target / f"{part.name}.zip", "w") as archive:
            for path in sorted(part.rglob("*.*")):
                archive.write(path, path.relative_to(part))


def make_sides(scratch: Path, workload: Workload) -> list[Side]:
    sides = []
    for with_images, rows in ((False, workload.rows), (True, workload.image_rows)):
        if not rows:
            continue
        name, few = ("images", 20) if with_images else ("latents", 5)
        title = "with images, " if with_images else ""
        shards, folder, archive = (scratch / f"{name}-{layout}" for layout in ("shards", "folder", "zip"))
        write_shards(shards, rows, with_images)
        write_folder(folder, rows, with_images)
        write_zip(folder, archive)
        most = workload.most_samples
        sides.append(Side(f"{title}shards", shards, most // few if with_images else most, with_images))
        sides.append(Side(f"{title}one file each", folder, most // few, with_images))
        sides.append(Side(f"{title}ZIP", archive, most // few, with_images))
    if workload.large_rows:
        write_shards(scratch / "large", workload.large_rows, with_images=False)
        sides.append(Side(f"shards, {workload.large_rows:,} rows", scratch / "large", workload.most_samples, False))
    return sides


def read(dataset: PreparedDataset, side: Side, workload: Workload, workers: int, device: torch.device) -> int:
    """Run the loader once, and return the number of samples."""
    steps = max(1, min(len(dataset), side.most_samples) // workload.batch)
    on_gpu = device.type == "cuda"
    for batch in training_loader(
        dataset,
        global_batch=workload.batch,
        seed=0,
        num_steps=steps,
        workers=workers,
        with_images=side.with_images,
        pin_memory=on_gpu,
    ):
        assert len(batch.moments) == workload.batch
        if on_gpu:
            batch.moments.to(device, non_blocking=True)
            if batch.images is not None:
                batch.images.to(device, non_blocking=True)
    return steps * workload.batch


def rates(side: Side, workload: Workload, workers: int, device: torch.device) -> tuple[float, float]:
    """Samples/s, cold and warm, as medians of pairs of passes."""
    cold, warm = zip(*(cold_and_warm(side, workload, workers, device) for _ in range(workload.repeats)), strict=True)
    return median(cold), median(warm)


def cold_and_warm(side: Side, workload: Workload, workers: int, device: torch.device) -> list[float]:
    """Samples/s of a pass after the files have left the page cache, and of the next pass.

    The data set is opened again for it, because mapped pages can't leave memory.
    """
    drop_cache(side.folder)
    dataset, found = open_dataset(side.folder), []
    for _ in ("cold", "warm"):
        samples: list[int] = []
        elapsed = timed(lambda samples=samples: samples.append(read(dataset, side, workload, workers, device)), device)
        found.append(samples[0] / elapsed)
    return found


def drop_cache(folder: Path) -> None:
    """Remove the files from the page cache, so that they are read from disk next time."""
    os.sync()  # data that is not on disk yet can't be dropped; one call, as one for each file would take minutes
    for path in folder.rglob("*.*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def anonymous_megabytes() -> float:
    """The memory of this process without mapped files, which the system can reclaim."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1000


def main(workload: Workload) -> None:
    device = choose_device(workload.device)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        sides = make_sides(Path(scratch), workload)
        print(describe_machine(device))
        print(f"{workload.rows:,} rows, {workload.image_rows:,} with images; batches of {workload.batch}, one process")
        print(f"{'':28}{'workers':>8}{'cold/s':>11}{'warm/s':>11}{'ratio':>8}{'warm GB/s':>11}{'anonymous':>14}")
        for workers in workload.workers:
            best: dict[bool, float] = {}
            for side in sides:
                cold, warm = rates(side, workload, workers, device)
                best.setdefault(side.with_images, warm)
                size = 2 * np.prod(MOMENTS) + side.with_images * 3 * SIDE**2
                print(
                    f"{side.title:28}{workers:8}{cold:11,.0f}{warm:11,.0f}{warm / best[side.with_images]:8.2f}"
                    f"{warm * size / 1e9:11.2f}{anonymous_megabytes():11,.0f} MB",
                    flush=True,
                )
    copied = copy_bandwidth(CPU) / 2
    print(f"ratio: to warm shards read with as many workers; one thread copies memory at {copied / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main(tyro.cli(Workload))
