"""The command `stablevm benchmark`, which measures the steps of several trainings on this machine."""

import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from stablevm.data.dataset import PreparedDataset
from stablevm.data.opening import open_dataset
from stablevm.networks.encoders import Encoder, untrained_encoder
from stablevm.profiling.config import OBJECTIVES, ROUNDS, BenchmarkConfig
from stablevm.profiling.measure import Measurement, free_memory, measure
from stablevm.profiling.random_data import RandomDataset
from stablevm.profiling.results import FILES, Results
from stablevm.support.errors import UserError
from stablevm.support.files import remove_temporary_of
from stablevm.support.locks import owned
from stablevm.support.machine import describe_machine, product_rate
from stablevm.support.precision import DTYPES, tf32
from stablevm.training.config import TrainConfig
from stablevm.training.engine import model_config
from stablevm.training.launch import make_accelerator

# Defaults on a GPU and on a CPU.
MODELS = {"cuda": "SiT-XL/2", "cpu": "SiT-S/2"}
BATCH_SIZES = {"cuda": 256, "cpu": 16}
WORKERS = {"cuda": TrainConfig.num_workers, "cpu": 0}
STEPS = {"cuda": ROUNDS * TrainConfig.log_steps, "cpu": 20}  # many on a GPU, whose queue empties when metrics are read
NUM_CLASSES, RESOLUTION = 1000, 256


def benchmark(config: BenchmarkConfig) -> Path:
    """Measure training steps, print a table, write OUTPUT_DIR/steps.json and steps.png, and return the folder.

    Raises UserError for options that do not fit the machine, the data or each other, and for a batch that does not fit
    into memory; trainings that were measured before are still reported.
    """
    config.validate()
    with owned(config.output_dir, FILES[0]):
        remove_temporary_of(*(config.output_dir / name for name in FILES))
        return _benchmark(config)


def _benchmark(config: BenchmarkConfig) -> Path:
    with tempfile.TemporaryDirectory() as scratch:
        trainings = {name: _training(config, name, Path(scratch)) for name in config.objective_names}
        first, *_ = trainings.values()
        for training in trainings.values():
            training.validate()
        accelerator = make_accelerator(first)
        if accelerator.is_main_process:
            for line in config.warnings():
                print(f"warning: {line}", file=sys.stderr)
        dataset = (
            RandomDataset(config.num_classes or NUM_CLASSES, config.resolution or RESOLUTION)
            if config.data_dir is None
            else open_dataset(config.data_dir)
        )
        encoders = _encoders(trainings.values(), dataset)
        found: list[Measurement] = []
        try:
            for name, training in trainings.items():
                own = encoders if training.use_proj_loss else []
                with tf32(training.allow_tf32):
                    measured = _measure_what_fits(config, name, training, dataset, accelerator, own)
                found += [] if measured is None else [measured]
        finally:
            if found:
                _tell(config, first, dataset, accelerator, found)
    return config.output_dir


def _measure_what_fits(
    config: BenchmarkConfig,
    name: str,
    training: TrainConfig,
    dataset: PreparedDataset,
    accelerator: Accelerator,
    encoders: Sequence[Encoder],
) -> Measurement | None:
    """Like `measure`, with more accumulation steps if memory is short and the user gave no number of them."""
    while True:
        try:
            return measure(name, training, dataset, accelerator, encoders, warmup=config.warmup)
        except torch.OutOfMemoryError:
            parts = 2 * training.accumulation_steps
            # It may have happened in only some of the processes, while the others wait for them.
            alone = accelerator.num_processes == 1 and config.gradient_accumulation_steps is None
            if not alone or training.batch_size % parts:
                raise UserError(
                    f"--batch-size {training.batch_size}: {name} does not fit into the GPU's memory; lower it, or "
                    f"give --gradient-accumulation-steps {parts}"
                ) from None
        finally:
            free_memory(accelerator, encoders)
        print(f"{name}: out of memory; trying {parts} accumulation steps", file=sys.stderr)
        training = replace(training, gradient_accumulation_steps=parts)


def _tell(
    config: BenchmarkConfig,
    first: TrainConfig,
    dataset: PreparedDataset,
    accelerator: Accelerator,
    found: Sequence[Measurement],
) -> None:
    """Print the table, then write it, in the main process, the only one with measurements."""
    options = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    results = Results(
        machine=describe_machine(accelerator.device, accelerator.num_processes),
        settings=_settings(first),
        options=options,
        images=len(dataset),
        product_rate=accelerator.num_processes * product_rate(accelerator.device, config.mixed_precision),
        measurements=found,
    )
    print(results.table(), flush=True)
    results.write(config.output_dir)


def _training(config: BenchmarkConfig, name: str, scratch: Path) -> TrainConfig:
    """The options of the training called `name`; its folder, below `scratch`, is for the journal."""
    loss, aligned = OBJECTIVES[name]
    place = "cuda" if torch.cuda.is_available() else "cpu"
    steps = config.steps or STEPS[place]
    return TrainConfig(
        exp_name=name,
        output_dir=scratch,
        data_dir=config.data_dir or Path("random data"),
        report_to="none",
        model=config.model or MODELS[place],
        batch_size=config.batch_size or BATCH_SIZES[place],
        gradient_accumulation_steps=config.gradient_accumulation_steps or 1,
        mixed_precision=config.mixed_precision,
        compile=config.compile,
        checkpoint_activations=config.checkpoint_activations,
        fused_attn=config.fused_attn,
        loss_type=loss,
        bank_capacity_per_class=config.bank_capacity_per_class,
        references_from=config.references_from,
        use_proj_loss=aligned,
        encoder_depth=config.encoder_depth,
        enc_type=config.enc_type,
        proj_weight_schedule=config.proj_weight_schedule,
        num_workers=WORKERS[place] if config.num_workers is None else config.num_workers,
        max_train_steps=config.warmup + steps,
        log_steps=steps // ROUNDS,
    )


def _encoders(trainings: Iterable[TrainConfig], dataset: PreparedDataset) -> list[Encoder]:
    """The encoders that all trainings with alignment share, on the host, with random weights.

    UserError, before anything is measured, if encoders, network and data do not fit together.
    """
    grids = {training: model_config(training, dataset).grid_size for training in trainings}
    for training, grid_size in grids.items():
        if training.use_proj_loss:
            dataset.check_images()
            dtype = DTYPES[training.mixed_precision or "no"]
            found = [
                untrained_encoder(each, grid_size=grid_size, device="cpu", dtype=dtype)
                for each in training.encoder_names
            ]
            for encoder in found:
                encoder(dataset.images([0]))  # because some accept only images of one size
            return found
    return []


def _settings(training: TrainConfig) -> str:
    compiled = ", compiled" if training.compile else ""
    compiled += ", checkpointed activations" if training.checkpoint_activations else ""
    precision = "float32" if training.mixed_precision == "no" else training.mixed_precision
    return f"{training.model}, batch {training.batch_size}, {precision}{compiled}"
