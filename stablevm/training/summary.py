"""The summary that training prints at its start, about the run, and at its end, about its files."""

import math
import shlex
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator

from stablevm.bank import ClassBank
from stablevm.data.dataset import PreparedDataset
from stablevm.networks.autoencoder import GREY, IDENTITY
from stablevm.support.machine import gigabytes
from stablevm.training import checkpoint
from stablevm.training.config import CHECKPOINT_INTERVAL, KEPT_BETWEEN, TrainConfig
from stablevm.training.console import Row
from stablevm.training.engine import Engine
from stablevm.training.objectives import GPU_SHARE
from stablevm.training.tracker import METRICS_FILE

PRECISIONS = {"no": "float32", "fp16": "float16 (mixed)", "bf16": "bfloat16 (mixed)"}


def opening(config: TrainConfig, engine: Engine, total_steps: int) -> list[Row]:
    """The lines about a run that starts, or resumes, at `engine.step`."""
    return [
        ("run", f"{config.folder}, {_from(config, engine.step)}"),
        ("device", _device(config, engine.accelerator)),
        ("data", _data(config, engine.dataset)),
        ("network", _network(config, engine)),
        ("objective", _objective(config, engine)),
        *([("meanflow", _meanflow(config))] if config.meanflow else []),
        *([] if engine.objective.bank is None else [("bank", _bank(config, engine.objective.bank))]),
        ("loss", " + ".join(["velocity_loss", *(f"{term.coefficient:g} {term.name}" for term in engine.terms)])),
        *((term.name.removesuffix("_loss"), text) for term in engine.terms if (text := term.describe())),
        ("steps", _steps(config, total_steps, len(engine.dataset))),
        ("saves", "; ".join(_saves(config, total_steps))),
    ]


def closing(config: TrainConfig, step: int, previews: Path | None) -> list[Row]:
    """The lines about the files of a run after `step` steps; previews: its last grid of samples, if there is one."""
    weights = checkpoint.checkpoint_folder(config.folder, step)
    rows = [("checkpoint", str(weights))]
    if (best := checkpoint.best_record(config.folder)) is not None:
        place = weights.parent / checkpoint.BEST
        rows.append(("best", f"{place}: step {best.step:,}, {best.metric} {best.value:.4f}"))
    if previews is not None:
        rows.append(("samples", str(previews)))
    board = f"; tensorboard --logdir {shlex.quote(str(config.folder))}" if "tensorboard" in config.trackers else ""
    return [*rows, ("metrics", f"{config.folder / METRICS_FILE}{board}")]


def next_command(config: TrainConfig, step: int) -> str:
    """The command line that makes a picture with the network of `step`."""
    weights = str(checkpoint.checkpoint_folder(config.folder, step))
    mode, steps = ("meanflow", "1") if config.meanflow else ("ode", "40")
    words = ["stablevm", "generate", "--ckpt", weights, "--mode", mode, "--num-steps", steps, "--grid"]
    return shlex.join([*words, "--name", config.exp_name, *([] if config.vae is None else ["--vae", config.vae])])


def _from(config: TrainConfig, step: int) -> str:
    if step:
        return f"resumes from step {step:,}"
    return "from scratch" if config.init_from is None else f"from the weights of {config.init_from}"


def _device(config: TrainConfig, accelerator: Accelerator) -> str:
    device, count = accelerator.device, accelerator.num_processes
    threads = f"cpu ({_count(torch.get_num_threads(), 'thread')})"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    parts = [name, PRECISIONS[accelerator.mixed_precision], _count(count, "process", "processes")]
    parts += ["weights in shards (FSDP)"] if accelerator.is_fsdp2 else []
    parts += ["TF32"] if config.allow_tf32 and device.type == "cuda" else []
    return ", ".join(parts + (["compiled"] if config.compile else []))


def _data(config: TrainConfig, dataset: PreparedDataset) -> str:
    channels, height, width = dataset.latent.shape
    pixels = {IDENTITY: "pixels", GREY: "grey pixels"}
    of = pixels.get(dataset.latent.autoencoder, f"latents of {dataset.latent.autoencoder}")
    rows = f"{len(dataset):,} samples{' (half of them mirror images)' if config.horizontal_flips else ''}"
    classes = _count(dataset.num_classes, "class", "classes")
    return f"{config.data_dir}: {rows} in {classes}, {channels} x {height} x {width} {of}"


def _network(config: TrainConfig, engine: Engine) -> str:
    trained = sum(parameter.numel() for parameter in engine.plain_model.parameters() if parameter.requires_grad)
    return f"{config.model}, {trained / 1e6:,.1f} million parameters, learning rate {config.learning_rate:g}"


def _objective(config: TrainConfig, engine: Engine) -> str:
    """The value of the option, and the first sentence of the objective's docstring."""
    summary = (type(engine.objective).__doc__ or "").partition("\n")[0]
    is_default = config.loss_type == TrainConfig.loss_type
    return f"{config.loss_type}{' (the published default)' if is_default else ''}. {summary}"


def _meanflow(config: TrainConfig) -> str:
    guidance = f"; guidance {config.meanflow_omega / (1 - config.meanflow_kappa):g}" if config.meanflow_guided else ""
    return (
        f"mean velocities over intervals, {config.meanflow_instants:.0%} of them single times{guidance}; their "
        "derivative in float32, by attention that is not fused"
    )


def _bank(config: TrainConfig, bank: ClassBank) -> str:
    classes = _count(bank.num_classes, "class", "classes")
    size = gigabytes(torch.float32.itemsize * bank.num_classes * bank.capacity * math.prod(bank.shape))
    place = "the GPU's memory" if bank.device.type == "cuda" else "the host's memory"
    if config.bank_on_gpu and bank.device.type == "cpu" and torch.cuda.is_available():
        place += f", as it would take more than {GPU_SHARE:.0%} of what is free on the GPU"
    anchors = f"anchors from the {config.bank_anchors}"
    if config.bank_is_fixed:
        return f"all the data, {classes} x {bank.capacity:,} slots, {size} in each process, in {place}; {anchors}"
    first = "as many as there are" if config.prefill_bank_fully else "one"
    return f"{classes} x {bank.capacity:,} samples, {first} of each at first, {size} in {place}; {anchors}"


def _steps(config: TrainConfig, total_steps: int, samples: int) -> str:
    """The number of steps, and which of the two limits ends the run."""
    by_epochs, by_steps = config.epoch_steps(samples), config.max_train_steps
    if by_epochs < by_steps:
        limits = f"--epochs {config.epochs} ends the run, before --max-train-steps {by_steps}"
    else:
        limits = f"--max-train-steps ends the run, before the {by_epochs:,} steps of --epochs {config.epochs}"
    passes = total_steps * config.batch_size / samples
    return f"{total_steps:,} of {_count(config.batch_size, 'sample')}, {passes:,.1f} passes over the data: {limits}"


def _saves(config: TrainConfig, total_steps: int) -> Iterator[str]:
    yield f"checkpoint every {config.checkpoint_interval(total_steps):,} steps{_keeping(config, total_steps)}"
    if interval := config.preview_interval(total_steps):
        yield f"samples every {interval:,}"
    if config.eval_every:
        yield f"evaluation every {config.eval_every:,}"
    if config.average_every:
        yield f"averages every {config.average_every:,}"
    yield f"metrics every {config.log_steps:,}"


def _keeping(config: TrainConfig, total_steps: int) -> str:
    """Which checkpoints stay; nothing if all do."""
    if config.checkpoints_kept:
        return f", keeping the newest {config.checkpoints_kept:,}"
    if not config.is_thinned(total_steps):
        return ""
    published = f" and each at a multiple of {CHECKPOINT_INTERVAL:,}" if total_steps >= CHECKPOINT_INTERVAL else ""
    return f", keeping the newest {KEPT_BETWEEN}{published}"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"
