"""Steps of a real engine, timed by the trainer's own journal."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from stablevm.bank import ClassBank
from stablevm.data.dataset import PreparedDataset
from stablevm.encoders import Encoder
from stablevm.objective import StableVM
from stablevm.training.config import TrainConfig
from stablevm.training.engine import Engine
from stablevm.training.journal import Journal
from stablevm.training.main_process import on_main
from stablevm.training.tracker import METRICS_FILE, Trackers, read_metrics

FILL_ROWS = 4096  # of the bank, at a time
PHASE = "seconds/"  # begins the names of the journal's phases
STEP_PER_FORWARD = 3  # a backward pass has twice the products of a forward pass
WEIGHT_GRID = 1000  # times at which the share of samples that are encoded is looked at


@dataclass(frozen=True)
class Measurement:
    """What one training's steps cost."""

    name: str
    batch_size: int  # over all processes
    seconds: dict[str, float]  # of each phase of a step
    step_seconds: list[float]  # of a step, in each round
    gpu_gib: float | None  # that were held at most
    host_gib: float  # by the main process, trainings before this one included
    operations: float  # per image, of the network's and the encoder's products

    @property
    def step(self) -> float:
        """Seconds of a step, in the median round."""
        return sum(self.seconds.values())

    @property
    def images_per_second(self) -> float:
        return self.batch_size / self.step

    @property
    def rate(self) -> float:
        """Operations per second."""
        return self.operations * self.images_per_second


def measure(
    name: str,
    config: TrainConfig,
    dataset: PreparedDataset,
    accelerator: Accelerator,
    encoders: Sequence[Encoder],
    *,
    warmup: int,
) -> Measurement | None:
    """The steps of `config` after `warmup` others, in rounds of `config.log_steps`; None on all processes but the main.

    encoders: those that `config` names. The bank is full of random values.
    """
    device, steps = accelerator.device, config.max_train_steps
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    engine = Engine(config, dataset, accelerator, [encoder.to(device) for encoder in encoders])
    if isinstance(engine.objective, StableVM):
        fill(engine.objective.bank, dataset.labels())
    trackers = on_main(accelerator, lambda: Trackers(config.folder, config.trackers, config.to_dict()))
    journal = Journal(config, accelerator, trackers, engine.guard, step=0, total_steps=steps)
    for step, batch in enumerate(engine.loader(steps), start=1 - warmup):
        journal.clock.end("data_wait")
        journal.add(engine.train_step(batch, config.learning_rate, journal.clock))
        if step == 0:
            journal.flush(0, config.learning_rate)
            journal.clock.read()
        elif step > 0 and step % config.log_steps == 0:
            journal.flush(step, config.learning_rate)
        journal.clock.end("logging")
    journal.close()
    operations = operations_per_image(engine)
    del engine
    accelerator.free_memory()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if not accelerator.is_main_process:
        return None
    return _summary(name, config, operations)


def _summary(name: str, config: TrainConfig, operations: float) -> Measurement:
    """From the rows that the journal wrote, without that of the warm-up."""
    rows = [row for row in read_metrics(config.folder / METRICS_FILE) if row["step"] > 0]
    phases = [{key.removeprefix(PHASE): row[key] for key in row if key.startswith(PHASE)} for row in rows]
    phases.sort(key=lambda row: sum(row.values()))
    return Measurement(
        name=name,
        batch_size=config.batch_size,
        seconds=phases[len(phases) // 2],
        step_seconds=[sum(row.values()) for row in phases],
        gpu_gib=rows[-1].get("memory/gpu_peak_gib"),
        host_gib=rows[-1]["memory/host_peak_gib"],
        operations=operations,
    )


def fill(bank: ClassBank, labels: Tensor) -> None:
    """Fill each class with random values in place of the first rows of that class; labels (N,) of the data set."""
    order = labels.argsort(stable=True)
    counts = torch.bincount(labels, minlength=bank.num_classes)
    rank = torch.arange(len(order)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    stream = torch.Generator(bank.device).manual_seed(0)
    for rows in order[rank < bank.capacity].split(FILL_ROWS):
        bank.insert(
            torch.randn(len(rows), *bank.shape, generator=stream, device=bank.device),
            labels[rows].to(bank.device),
            rows.to(bank.device),
        )


def _attention_on_cpu(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Operations of a kernel that torch's counter does not know."""
    count: int = sdpa_flop_count(query, key, value)
    return count


UNCOUNTED: dict[Any, Any] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu}


@torch.no_grad()
def operations_per_image(engine: Engine) -> float:
    """Of the products of a training step: the network's, forward and backward, and the encoders' on the share of images
    that they see.
    """
    network, model = engine.whole_average(), engine.card.model
    device = engine.accelerator.device
    latent = torch.zeros(1, model.in_channels, model.input_size, model.input_size, device=device)
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        network(latent, torch.zeros(1, device=device), torch.zeros(1, dtype=torch.int64, device=device), features=True)
    operations = STEP_PER_FORWARD * float(counter.get_total_flops())
    if engine.alignment is None:
        return operations
    image = torch.zeros(1, 3, engine.dataset.resolution, engine.dataset.resolution, dtype=torch.uint8, device=device)
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        for encoder in engine.alignment.encoders:
            encoder(image)
    seen = (engine.alignment.schedule(torch.linspace(0, 1, WEIGHT_GRID)) != 0).float().mean()
    return operations + float(seen) * counter.get_total_flops()
