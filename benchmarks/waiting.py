"""How OpenMP's threads should wait for each other: the time of small training steps, on an idle machine and a busy one.

python benchmarks/waiting.py [--busy 0 1 2] [--rounds 3]

    spin     threads keep a core while they wait (OMP_WAIT_POLICY unset)
    sleep    they sleep at once (OMP_WAIT_POLICY=PASSIVE)
    brief    they keep the core for 1,000 rounds of a loop, then sleep: what the commands set
    one      there is only one thread

The variables are read when torch is imported, so each measurement is a process of its own; the ways take turns. `busy`
is the number of other processes that compute meanwhile. Medians over the rounds of each process's median, in
milliseconds: a step of SiT-XS/2 on 64 images of 8 x 8, and an update of the toy's network with its draw of references.
"""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import tyro

from stablevm.cli import PATIENT_THREADS

WAYS: dict[str, dict[str, str]] = {
    "spin": {},
    "sleep": {"OMP_WAIT_POLICY": "PASSIVE"},
    "brief": PATIENT_THREADS,
    "one": {"OMP_NUM_THREADS": "1"},
}
SUBJECTS = ("SiT-XS/2, 64 digits", "toy update")


@dataclass(frozen=True)
class Waiting:
    """Compare the ways in which threads wait."""

    busy: tuple[int, ...] = (0, 1, 2)
    """Numbers of other processes that compute meanwhile."""
    ways: tuple[Literal["spin", "sleep", "brief", "one"], ...] = ("spin", "sleep", "brief", "one")
    rounds: int = 3
    steps: int = 15
    """Steps of each process, after three to warm up."""
    measure: bool = False
    """Measure in this process and print JSON, as the processes that it starts do."""


def measure(steps: int) -> dict[str, float]:
    """The median milliseconds of each subject's step in this process."""
    import torch
    from common import timed

    from stablevm.networks.registry import build_network, network_config
    from stablevm.toy.config import ToyConfig
    from stablevm.toy.network import make_network as make_toy
    from stablevm.toy.training import Draws, mixture_of

    generator = torch.Generator().manual_seed(0)
    network = build_network(network_config("SiT-XS/2", input_size=8, in_channels=1, num_classes=10))
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    x, labels = torch.randn(64, 1, 8, 8, generator=generator), torch.arange(64) % 10

    def step() -> None:
        network(x, torch.full((64,), 0.5), labels).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    config = ToyConfig()
    toy = make_toy(config, generator)
    draws = iter(Draws("stable_vm", config, mixture_of(config, 0), 0))

    def update() -> None:
        draw = next(draws)
        (toy(draw.x_t, draw.t, generator) - draw.target).square().mean().backward()

    found = {}
    for subject, run in zip(SUBJECTS, (step, update), strict=True):
        times = [timed(run) for _ in range(3 + steps)][3:]
        found[subject] = 1000 * statistics.median(times)
    return found


def compute() -> None:
    while True:
        sum(number * number for number in range(10**6))


@contextmanager
def others(count: int) -> Iterator[None]:
    """Other processes that keep a core each, or share one, meanwhile."""
    processes = [multiprocessing.Process(target=compute, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()


def measured(way: str, steps: int) -> dict[str, float]:
    """What a process with this way of waiting measures."""
    names = {name for variables in WAYS.values() for name in variables}
    environment = {name: value for name, value in os.environ.items() if name not in names} | WAYS[way]
    command = [sys.executable, __file__, "--measure", "--steps", str(steps)]
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(ended.stdout)


def main(waiting: Waiting) -> None:
    if waiting.measure:
        print(json.dumps(measure(waiting.steps)))
        return
    from stablevm.support.machine import CPU, describe_machine

    print(describe_machine(CPU))
    print("\n| busy | step | " + " | ".join(waiting.ways) + " |\n" + "| --- " * (2 + len(waiting.ways)) + "|")
    for busy in waiting.busy:
        times: dict[str, dict[str, list[float]]] = {subject: {way: [] for way in waiting.ways} for subject in SUBJECTS}
        with others(busy):
            for _ in range(waiting.rounds):
                for way in waiting.ways:
                    for subject, value in measured(way, waiting.steps).items():
                        times[subject][way].append(value)
        for subject, ways in times.items():
            cells = " | ".join(f"{statistics.median(values):.1f}" for values in ways.values())
            print(f"| {busy} | {subject} | {cells} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Waiting, description=__doc__))
