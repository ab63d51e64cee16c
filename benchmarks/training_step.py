"""A training step of stablevm, compared with a plain loop: eager, float32, and averaging the weights one by one.

Both take the same steps from the same weights, in turn; the difference of their losses is reported too.

python benchmarks/training_step.py [--model SiT-S/2] [--batch-size 8] [--steps 200] [--data-dir FOLDER]

`stablevm benchmark` shows where the time of a step is spent.
"""

import copy
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import nn
from tqdm import tqdm

from stablevm.data.loader import TrainingBatch
from stablevm.data.opening import open_dataset
from stablevm.networks.registry import build_network
from stablevm.profiling.random_data import RandomDataset
from stablevm.support import rng
from stablevm.support.machine import describe_machine, synchronize
from stablevm.training.config import TrainConfig
from stablevm.training.engine import Engine
from stablevm.training.launch import make_accelerator
from stablevm.training.step import PhaseClock

WARMUP = 3  # steps that are not timed: compilation, first allocations
WINDOW = 20  # steps over which losses are averaged before they are compared


@dataclass(frozen=True)
class Comparison:
    """Train the same network three times: plainly, with the trainer's engine, and with that compiled."""

    model: str = "SiT-S/2"
    batch_size: int = 8
    steps: int = 200
    mixed_precision: Literal["no", "fp16", "bf16"] = "bf16"
    compiled: bool = True
    """Train with compiled blocks too."""
    data_dir: Path | None = None
    """Prepared data set. Default: random values of 4 x 32 x 32, 1,000 classes."""


class Plain:
    """A plain training loop, which uses the engine's draws."""

    def __init__(self, engine: Engine, config: TrainConfig) -> None:
        self.drawer, self.decay = engine.drawer, config.ema_decay
        self.model = build_network(engine.card.model, rng.generator(config.seed, "weights")).to(
            engine.accelerator.device
        )
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.learning_rate, weight_decay=0.0)

    def step(self, batch: TrainingBatch, number: int) -> float:
        draw = self.drawer.draw(batch, number)
        loss = (self.model(draw.x_t, draw.t, draw.labels) - draw.target).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        decay = min(self.decay, (1 + number) / (10 + number))
        with torch.no_grad():
            for average, parameter in zip(self.average.parameters(), self.model.parameters(), strict=True):
                average.mul_(decay).add_(parameter, alpha=1 - decay)
        return loss.item()


class Ours:
    """The engine of `stablevm train`."""

    def __init__(self, engine: Engine, config: TrainConfig) -> None:
        self.engine, self.rate = engine, config.learning_rate
        self.clock = PhaseClock(engine.accelerator.device)

    def step(self, batch: TrainingBatch, number: int) -> float:
        return self.engine.train_step(batch, self.rate, self.clock).means["loss"].item()


def main(options: Comparison) -> None:
    data = RandomDataset(1000, 256) if options.data_dir is None else open_dataset(options.data_dir)
    with tempfile.TemporaryDirectory() as scratch:
        configs = [
            TrainConfig(
                exp_name="step",
                data_dir=options.data_dir or Path("random data"),
                output_dir=Path(scratch),
                model=options.model,
                batch_size=options.batch_size,
                mixed_precision=options.mixed_precision,
                compile=compiled,
                num_workers=0,
            )
            for compiled in ((False, True) if options.compiled else (False,))
        ]
    accelerator = make_accelerator(configs[0])
    engines = [Engine(config, data, accelerator, []) for config in configs]
    sides: dict[str, Plain | Ours] = {"plain, float32": Plain(engines[0], configs[0])}
    for engine, config in zip(engines, configs, strict=True):
        sides[f"stablevm, {options.mixed_precision}{', compiled' if config.compile else ''}"] = Ours(engine, config)
    times: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    for number, batch in enumerate(tqdm(engines[0].loader(options.steps), total=options.steps, unit="step")):
        for name, side in sides.items():
            synchronize(accelerator.device)
            started = time.perf_counter()
            losses[name].append(side.step(batch, number))
            synchronize(accelerator.device)
            times[name].append(time.perf_counter() - started)
    print(f"{options.model}, batch {options.batch_size}, {options.steps} steps; {describe_machine(accelerator.device)}")
    print(f"{'':28}{'ms/step':>10}{'faster':>9}{'loss, last':>12}{'largest difference of losses':>30}")
    (plain, *_), (reference, *_) = times.values(), losses.values()
    for name in sides:
        median = statistics.median(times[name][WARMUP:])
        faster = statistics.median(plain[WARMUP:]) / median
        apart = max(map(_relative, _windows(losses[name]), _windows(reference)))
        print(f"{name:28}{1e3 * median:10.1f}{faster:8.2f}x{_windows(losses[name])[-1]:12.4f}{apart:30.3%}")


def _windows(losses: list[float]) -> list[float]:
    """The means over `WINDOW` steps."""
    return [statistics.mean(losses[start : start + WINDOW]) for start in range(0, len(losses), WINDOW)]


def _relative(given: float, reference: float) -> float:
    return abs(given / reference - 1)


if __name__ == "__main__":
    main(tyro.cli(Comparison))
