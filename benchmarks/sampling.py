"""Network evaluations of a generation, compared with the minimum for its settings, and its time outside the network.

python benchmarks/sampling.py [--model SiT-XS/2] [--side 32] [--images 16] [--num-steps 250] [--profile]

It runs all of `generate`, from a checkpoint with random weights to the .npz. The defaults are the published settings
(250 steps of the SDE, guidance up to t = 0.7) for images of 32 x 32, with a network so small that other work is
visible.
"""

import cProfile
import pstats
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tyro
from torch import Tensor

from stablevm.networks import snapshot
from stablevm.networks.autoencoder import IDENTITY, LatentSpec
from stablevm.networks.registry import build_network
from stablevm.networks.sit import SiT
from stablevm.networks.sit_config import sit_config
from stablevm.networks.snapshot import ModelCard
from stablevm.sampling.config import GenerateConfig
from stablevm.sampling.generation import generate
from stablevm.solvers.fixed_steps import sde_times
from stablevm.support.machine import describe_machine, synchronize
from stablevm.support.processes import Process


@dataclass(frozen=True)
class Workload:
    """Measure a generation on this machine."""

    model: str = "SiT-XS/2"
    side: int = 32
    """The side of the latent."""
    channels: int = 3
    """The channels of the latent, which is the image itself: 1 or 3."""
    images: int = 16
    num_steps: int = 250
    guidance_high: float = 0.7
    profile: bool = False
    """Print where time outside the network is spent."""


class Meter:
    """Counts the rows that the network processes, and its time."""

    rows = 0
    seconds = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        forward = SiT.forward

        def timed(model: SiT, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            synchronize(x.device)  # work still in the queue is not the network's
            started = time.perf_counter()
            prediction = forward(model, x, t, y)
            synchronize(x.device)
            self.seconds += time.perf_counter() - started
            self.rows += len(x)
            return prediction

        SiT.forward = timed
        try:
            yield
        finally:
            SiT.forward = forward


def save_random(folder: Path, workload: Workload) -> Path:
    model = sit_config(workload.model, input_size=workload.side, in_channels=workload.channels, num_classes=10)
    latent = LatentSpec((workload.channels, workload.side, workload.side), 1.0, 0.0, IDENTITY)
    card = ModelCard(model, latent, "linear", "v", tuple(map(str, range(10))), step=0)
    snapshot.save(folder, card, {"ema": build_network(model).state_dict()})
    return folder


def main(workload: Workload) -> None:
    meter, profiler = Meter(), cProfile.Profile()
    with tempfile.TemporaryDirectory() as scratch:
        config = GenerateConfig(
            ckpt=save_random(Path(scratch) / "checkpoint", workload),
            num_fid_samples=workload.images,
            num_steps=workload.num_steps,
            cfg_scale=1.8,
            guidance_high=workload.guidance_high,
            sample_dir=Path(scratch) / "samples",
        )
        with meter.watching():
            started = time.perf_counter()
            if workload.profile:
                profiler.runcall(generate, config)
            else:
                generate(config)
            total = time.perf_counter() - started
    guided = int((sde_times(config.num_steps, config.last_time)[:-1] <= config.guidance_high).sum())
    print(f"{workload.model}, latent {workload.channels} x {workload.side} x {workload.side}")
    print(describe_machine(Process.from_environment().device))
    print(
        f"network evaluations per image: {meter.rows / workload.images:g}; the least is {config.num_steps + guided}, "
        f"one for each of {config.num_steps} steps and one more for the {guided} with guidance"
    )
    print(f"{total:.1f} s, of which {1 - meter.seconds / total:.2%} outside the network")
    if workload.profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main(tyro.cli(Workload))
