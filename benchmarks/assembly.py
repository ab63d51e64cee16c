"""Memory and time to assemble one .npz from the parts that the processes of a generation have written.

python benchmarks/assembly.py FOLDER [--images 50000] [--side 256]

Needs room for the images twice (20 GB by default), and leaves nothing behind.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from stablevm.sampling.archive import write_archive
from stablevm.sampling.parts import PartFolder
from stablevm.support.machine import describe_machine


@dataclass(frozen=True)
class Assembly:
    """Write parts of noise, assemble them, and say what it took."""

    folder: tyro.conf.Positional[Path]
    images: int = 50_000
    side: int = 256


def status(field: str) -> int:
    """A field of this process's status in the kernel; VmHWM is the peak of its memory."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def main(options: Assembly) -> None:
    scratch = options.folder / "assembly-benchmark"
    parts = PartFolder(scratch / "parts", options.images, {"benchmark": "assembly"})
    stream = np.random.default_rng(0)
    try:
        for part in parts.missing():
            parts.write(part, stream.integers(0, 256, (len(part), options.side, options.side, 3), dtype=np.uint8))
        before, started = status("VmHWM"), time.perf_counter()
        labels = np.arange(options.images) % 1000
        write_archive(scratch / "all.npz", parts.chunks(), labels, {"benchmark": "assembly"})
        seconds, peak = time.perf_counter() - started, status("VmHWM")
        size = (scratch / "all.npz").stat().st_size
        with np.load(scratch / "all.npz") as archive, archive.zip.open("arr_0.npy") as member:
            np.lib.format.read_magic(member)
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        assert shape == (options.images, options.side, options.side, 3) and dtype == np.uint8
    finally:
        shutil.rmtree(scratch)
    print(f"{options.images} x {options.side} x {options.side} x 3: {size / 1e9:.2f} GB in {seconds:.0f} s")
    print(f"peak memory {peak / 2**20:.0f} MiB, {before / 2**20:.0f} MiB of it before; {describe_machine()}")


if __name__ == "__main__":
    main(tyro.cli(Assembly))
