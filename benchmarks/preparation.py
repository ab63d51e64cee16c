"""Conversion of images in one process, compared with the limits of the machine: Pillow's decoding and resizing.

python benchmarks/preparation.py [--images 1000]
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from common import Run, timed
from PIL import Image

from stablevm.preparation import folders, shards
from stablevm.preparation.config import ConvertConfig, ConvertShardsConfig
from stablevm.preparation.pictures import dhariwal
from stablevm.support.machine import describe_machine

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.helpers.sources import write_source

SIDE = 256


@dataclass(frozen=True)
class Workload:
    """Measure in this process, on one core, with the files in the page cache."""

    images: int = 1000
    """Synthetic JPEGs of about 430 x 430 pixels; the mean of ImageNet's is about 470 x 390."""
    classes: int = 20


def compare(scratch: Path, workload: Workload) -> None:
    """Measure the limits, then both layouts."""
    images = workload.images
    source = write_source(scratch / "source", images, workload.classes, shortest=300, longest=560)
    files = sorted(source.rglob("*.JPEG"))

    def decode() -> None:
        for file in files:
            Image.open(file).load()

    def decode_and_resize() -> None:
        for file in files:
            dhariwal(Image.open(file).convert("RGB"), (SIDE, SIDE))

    def to(kind: Callable[..., object], run: Callable[..., object], name: str) -> Run:
        def convert_anew() -> None:
            shutil.rmtree(scratch / name, ignore_errors=True)
            crop = {"resolution": f"{SIDE}x{SIDE}", "transform": "center-crop-dhariwal"}
            run(kind(source=source, dest=scratch / name, num_workers=0, **crop))

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


def processor_seconds(run: Run) -> float:
    """The processor time of `run`, which other work on the machine, or its disk, hardly affects."""
    start = time.process_time()
    run()
    return time.process_time() - start


def main(workload: Workload) -> None:
    torch.set_num_threads(1)
    print(describe_machine())
    with tempfile.TemporaryDirectory() as scratch:
        compare(Path(scratch), workload)


if __name__ == "__main__":
    main(tyro.cli(Workload))
