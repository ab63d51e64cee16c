"""`stablevm benchmark`: what steps of each training cost on this machine."""

import tempfile
from pathlib import Path

import torch

from stablevm.benchmark.config import OBJECTIVES, ROUNDS, BenchmarkConfig
from stablevm.benchmark.machine import describe_machine, product_rate
from stablevm.benchmark.measure import measure
from stablevm.benchmark.random_data import RandomDataset
from stablevm.benchmark.report import Report
from stablevm.data.dataset import PreparedDataset
from stablevm.data.opening import open_dataset
from stablevm.encoders import Encoder, untrained_encoder
from stablevm.precision import DTYPES
from stablevm.training.config import TrainConfig
from stablevm.training.launch import make_accelerator
from stablevm.training.main_process import on_main
from stablevm.training.setup import model_config

MODELS = {"cuda": "SiT-XL/2", "cpu": "SiT-S/2"}
BATCH_SIZES = {"cuda": 256, "cpu": 16}


def benchmark(config: BenchmarkConfig) -> Path:
    """Measure, print a table, write OUTPUT_DIR/steps.json and steps.png; returns the folder.

    Raises UserError for options that do not fit the machine, the data or each other.
    """
    config.validate()
    with tempfile.TemporaryDirectory() as scratch:
        trainings = {name: _training(config, name, Path(scratch)) for name in config.objective_names}
        first = next(iter(trainings.values()))
        for training in trainings.values():
            training.validate()
        accelerator = make_accelerator(first)
        random = RandomDataset(config.num_classes, config.resolution)
        dataset = random if config.data_dir is None else open_dataset(config.data_dir)
        encoders = {name: _encoders(training, dataset) for name, training in trainings.items()}
        found = [
            measure(name, training, dataset, accelerator, encoders[name], warmup=config.warmup)
            for name, training in trainings.items()
        ]
    report = Report(
        machine=describe_machine(accelerator.device, accelerator.num_processes),
        settings=_settings(first),
        product_rate=accelerator.num_processes * product_rate(accelerator.device, first.mixed_precision or "no"),
        measurements=[measured for measured in found if measured is not None],
    )

    def tell() -> None:
        report.write(config.output_dir)
        print(report.table())

    on_main(accelerator, tell)
    return config.output_dir


def _training(config: BenchmarkConfig, name: str, scratch: Path) -> TrainConfig:
    """The options of a training of that name; its folder, below `scratch`, is for the journal."""
    loss, aligned = OBJECTIVES[name]
    place = "cuda" if torch.cuda.is_available() else "cpu"
    return TrainConfig(
        exp_name=name,
        output_dir=scratch,
        data_dir=config.data_dir or Path("random data"),
        report_to="none",
        model=config.model or MODELS[place],
        batch_size=config.batch_size or BATCH_SIZES[place],
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        compile=config.compile,
        fused_attn=config.fused_attn,
        loss_type=loss,
        bank_capacity_per_class=config.bank_capacity_per_class,
        use_proj_loss=aligned,
        encoder_depth=config.encoder_depth,
        enc_type=config.enc_type,
        proj_weight_schedule=config.proj_weight_schedule,
        num_workers=config.num_workers,
        max_train_steps=config.warmup + config.steps,
        log_steps=config.steps // ROUNDS,
    )


def _encoders(training: TrainConfig, dataset: PreparedDataset) -> list[Encoder]:
    """On the host, with random weights; UserError, before anything is measured, where they do not fit the network."""
    grid_size, dtype = model_config(training, dataset).grid_size, DTYPES[training.mixed_precision or "no"]
    return [untrained_encoder(name, grid_size=grid_size, device="cpu", dtype=dtype) for name in training.encoder_names]


def _settings(training: TrainConfig) -> str:
    compiled = ", compiled" if training.compile else ""
    precision = "float32" if training.mixed_precision == "no" else training.mixed_precision
    return f"{training.model}, batch {training.batch_size}, {precision}{compiled}"
