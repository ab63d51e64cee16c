"""Measuring steps of the training engine with the trainer's journal."""

import copy
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from stablevm.bank import ClassBank
from stablevm.data.dataset import PreparedDataset
from stablevm.networks.encoders import Encoder
from stablevm.networks.registry import build_network
from stablevm.training.config import TrainConfig
from stablevm.training.engine import Engine
from stablevm.training.journal import Journal
from stablevm.training.launch import on_main
from stablevm.training.objectives import choose_rows
from stablevm.training.tracker import METRICS_FILE, Trackers, read_metrics

FILL_ROWS = 4096  # rows of the bank filled at a time
PHASE = "seconds/"  # begins the names of the journal's phases
STEP_PER_FORWARD = 3  # because a backward pass has twice the products of a forward pass


@dataclass(frozen=True)
class Measurement:
    """The measured cost of the steps of one training."""

    name: str
    batch_size: int  # over all processes
    parts: int  # into which each process split its share of a step
    seconds: dict[str, float]  # of each phase of a step: the median over rounds
    step_seconds: list[float]  # of a step, in each round
    gpu_gib: float | None  # peak memory
    host_gib: float  # peak memory of the main process, including earlier trainings
    operations: float  # per image, in the products of the network and the encoder

    @property
    def step(self) -> float:
        """The seconds of a step, as the median over rounds."""
        return median(self.step_seconds)

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
    """Measure steps of `config` after `warmup` others, in rounds of `config.log_steps`.

    encoders: those that `config` names. The bank is full of random values. Returns None in all processes except the
    main one.
    """
    device, steps = accelerator.device, config.max_train_steps
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    engine = Engine(config, dataset, accelerator, [encoder.to(device) for encoder in encoders])
    if engine.objective.bank is not None:
        fill(engine.objective.bank, dataset.labels())
    trackers = on_main(accelerator, lambda: Trackers(config.folder, config.trackers, config.to_dict()))
    journal = Journal(config, accelerator, trackers, engine.guard, step=0, total_steps=steps, lines=False)
    try:
        for step, batch in enumerate(engine.loader(steps), start=1 - warmup):
            journal.clock.end("data_wait")
            journal.add(engine.train_step(batch, config.learning_rate, journal.clock))
            if step >= 0 and step % config.log_steps == 0:
                journal.flush(step, config.learning_rate)
            journal.clock.end("logging")
            if step == 0:
                journal.clock.read()  # so that no round includes the flush of the warm-up
    finally:
        journal.close()
    return _summary(name, config, operations_per_image(engine)) if accelerator.is_main_process else None


def free_memory(accelerator: Accelerator, encoders: Sequence[Encoder]) -> None:
    """Free the memory of a training that is over, or that did not fit."""
    accelerator.free_memory()
    for encoder in encoders:
        encoder.cpu()
    gc.collect()
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()


def _summary(name: str, config: TrainConfig, operations: float) -> Measurement:
    """Summarise the rows that the journal wrote, without that of the warm-up."""
    rows = [row for row in read_metrics(config.folder / METRICS_FILE) if row["step"] > 0]
    phases = [{key.removeprefix(PHASE): row[key] for key in row if key.startswith(PHASE)} for row in rows]
    names = dict.fromkeys(phase for row in phases for phase in row)
    return Measurement(
        name=name,
        batch_size=config.batch_size,
        parts=config.accumulation_steps,
        seconds={phase: median(row.get(phase, 0.0) for row in phases) for phase in names},
        step_seconds=[sum(row.values()) for row in phases],
        gpu_gib=rows[-1].get("memory/gpu_peak_gib"),
        host_gib=rows[-1]["memory/host_peak_gib"],
        operations=operations,
    )


def fill(bank: ClassBank, labels: Tensor) -> None:
    """Fill each class of the bank with random values instead of samples; labels: (N,), of the data set."""
    generator = torch.Generator(bank.device).manual_seed(0)
    counts = torch.bincount(labels, minlength=bank.num_classes)
    for rows in choose_rows(labels, counts, bank.capacity, seed=0).split(FILL_ROWS):
        values = torch.randn(len(rows), *bank.shape, generator=generator, device=bank.device)
        bank.insert(values, labels[rows].to(bank.device), rows.to(bank.device))


@torch.no_grad()
def operations_per_image(engine: Engine) -> float:
    """The operations per image in the products of a training step.

    They are those of the network, forward and backward, and of the encoders for their share of the images. They are
    counted on torch's "meta" device, which computes nothing.
    """
    model, data = engine.card.model, engine.dataset
    with torch.device("meta"):
        network = build_network(model)
        latent = torch.empty(1, model.in_channels, model.input_size, model.input_size)
        time, label = torch.empty(1), torch.empty(1, dtype=torch.int64)
        image = torch.empty(1, 3, data.resolution, data.resolution, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        network.to("meta")(latent, time, label, features=True)
    operations = STEP_PER_FORWARD * float(counter.get_total_flops())
    for term in engine.terms:
        for encoder, seen in term.frozen():
            with FlopCounterMode(display=False) as counter:
                copy.deepcopy(encoder).to("meta")(image)
            operations += seen * counter.get_total_flops()
    return operations
