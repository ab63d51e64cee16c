"""The training run: from options to checkpoints, metrics and grids, and on from where an earlier command stopped."""

import dataclasses
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from tqdm import tqdm

from stablevm import rng
from stablevm.autoencoder import load_autoencoder
from stablevm.compiler import check_compiler
from stablevm.data.dataset import PreparedDataset
from stablevm.data.loader import TrainingBatch, training_loader
from stablevm.errors import UserError
from stablevm.files import remove_temporary, write_json
from stablevm.interpolant import get_interpolant
from stablevm.models.sit import SiT
from stablevm.objective import StableVM
from stablevm.precision import tf32
from stablevm.schedules import AlignmentSchedule
from stablevm.snapshot import ModelCard
from stablevm.training import checkpoint
from stablevm.training.anchors import AnchorPlan
from stablevm.training.checkpoint import Record, TrainingState
from stablevm.training.clock import PhaseClock
from stablevm.training.config import CONFIG_FILE, TrainConfig
from stablevm.training.ema import MovingAverage
from stablevm.training.evaluation import Evaluation, distance_of
from stablevm.training.guard import Guard, GuardedAdamW
from stablevm.training.initial import initial_weights
from stablevm.training.interruption import Interruption
from stablevm.training.journal import Journal
from stablevm.training.previews import Previews
from stablevm.training.processes import on_main
from stablevm.training.rate import rate_at
from stablevm.training.setup import (
    class_names,
    load_encoders,
    make_objective,
    model_config,
    open_data,
    prefill,
)
from stablevm.training.start import find_start
from stablevm.training.state import load_model_tensors, load_optimizer_tensors, model_tensors, optimizer_tensors
from stablevm.training.step import Alignment, BatchDrawer, StepMetrics, StepRunner
from stablevm.training.tracker import Trackers

ENCODER_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def train(config: TrainConfig) -> int:
    """Train, or go on training, as `config` says; returns the number of finished steps.

    Raises UserError, before anything is written, for options, data or an existing folder that do not fit. Ctrl-C and
    SIGTERM end the step, write a checkpoint and leave with 128 plus the signal's number.
    """
    config.validate()
    accelerator = _accelerator(config)
    start = find_start(config, show=accelerator.is_main_process)
    dataset = open_data(config)
    if accelerator.is_main_process:
        for line in config.warnings():
            print(f"warning: {line}", file=sys.stderr)
    trainer = Trainer(config, dataset, accelerator)
    if start:
        trainer.restore(checkpoint.load(config.folder, start))
    elif config.init_from is not None:
        trainer.start_from(config.init_from)
    with Interruption() as interruption, tf32(config.allow_tf32):
        return trainer.run(interruption)


class Trainer:
    """Everything that one run consists of. Construction checks all that can be checked and writes nothing."""

    def __init__(self, config: TrainConfig, dataset: PreparedDataset, accelerator: Accelerator) -> None:
        self.config, self.dataset, self.accelerator = config, dataset, accelerator
        self.total_steps = config.total_steps(len(dataset))
        self.step = 0
        device = accelerator.device
        plain = model_config(config, dataset)
        self.alignment = self._alignment(plain.grid_size)
        dims = tuple(encoder.dim for encoder in self.alignment.encoders) if self.alignment else ()
        self.card = ModelCard(
            model=dataclasses.replace(plain, projector_dims=dims),
            latent=dataset.latent,
            path_type=config.path_type,
            prediction=config.prediction,
            class_names=class_names(config, dataset),
            step=0,
        )
        if dims and not 1 <= config.encoder_depth <= plain.depth:
            raise UserError(
                f"--encoder-depth {config.encoder_depth}: {config.model} has {plain.depth} blocks; "
                f"give 1 to {plain.depth}"
            )
        model = SiT(self.card.model, rng.generator(config.seed, "weights")).to(device)
        self.ema = MovingAverage(model, config.ema_decay)
        if config.compile:
            check_compiler(device)
            model.compile_blocks()
        self.objective = make_objective(config, self.card.model, dataset, device)
        self.previews = on_main(accelerator, self._previews) if config.sampling_steps else None
        self.evaluation = on_main(accelerator, self._evaluation) if config.eval_every else None
        optimizer = GuardedAdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
        )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        if accelerator.is_fsdp2:
            self.ema.model = fsdp2_prepare_model(accelerator, self.ema.model)  # in shards like the model
        self.drawer = BatchDrawer(self.objective, dataset, accelerator, config)
        self.runner = StepRunner(self.model, self.optimizer, accelerator, config, self.alignment)
        self.guard = Guard(accelerator, config.max_bad_steps)

    def run(self, interruption: Interruption) -> int:
        """Train to the end, or to an interruption; returns the number of finished steps."""
        if self.step >= self.total_steps:
            self._say(f"{self.config.folder}: already at step {self.step} of {self.total_steps}")
            return self.step
        if isinstance(self.objective, StableVM) and (not self.step or self.config.bank_is_fixed):
            prefill(self.objective.bank, self.dataset, self.config, show=self.accelerator.is_main_process)
        trackers = on_main(self.accelerator, self._open_folder)
        journal = Journal(
            self.config, self.accelerator, trackers, self.guard, step=self.step, total_steps=self.total_steps
        )
        loader = training_loader(
            self.dataset,
            global_batch=self.config.batch_size,
            seed=self.config.seed,
            num_steps=self.total_steps - self.step,
            start_step=self.step,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            workers=self.config.num_workers,
            with_images=self.alignment is not None,
            image_rows=self._anchor_plan(),
            pin_memory=self.accelerator.device.type == "cuda",
        )
        try:
            for batch in loader:
                journal.clock.end("data_wait")
                journal.add(self._train_step(batch, journal.clock))
                if self._finish_step(journal, interruption):
                    break
                journal.clock.end("other")
        finally:
            journal.close()
        self.accelerator.wait_for_everyone()
        if interruption.signal is not None and self.step < self.total_steps:
            self._say(f"interrupted; saved step {self.step}. Run the same command again to go on.")
            raise SystemExit(128 + interruption.signal)
        return self.step

    def start_from(self, folder: Path) -> None:
        """Begin with the weights of the checkpoint in `folder`; UserError where they do not fit."""
        own = SiT(self.card.model, rng.generator(self.config.seed, "weights")).state_dict()
        weights, lines = initial_weights(folder, self.config.init_weights, self.card, own)
        load_model_tensors(self.model, weights)
        load_model_tensors(self.ema.model, weights)
        for line in lines:
            self._say(line)

    def _train_step(self, batch: TrainingBatch, clock: PhaseClock) -> StepMetrics:
        self._set_rate(rate_at(self.config, self.step, self.total_steps))
        draw = self.drawer.draw(batch, self.step)
        images = self.drawer.images(batch, draw) if self.alignment else None
        clock.end("draw")
        metrics = self.runner.run(draw, images, clock)
        norm = metrics.means["grad_norm"]
        self.ema.update(self.accelerator.unwrap_model(self.model), self.step, norm.isfinite())
        clock.end("update")
        self.step += 1
        self.guard.add(self.step, metrics.means["loss"], norm, draw.ids, metrics.velocity_loss)
        return metrics

    def restore(self, state: TrainingState) -> None:
        """Take over the state of an earlier run; UserError where it does not fit this one."""
        if dataclasses.replace(state.card, step=0) != self.card:
            raise UserError(f"{self.config.folder}: its checkpoint is of another network or data set than the options'")
        load_optimizer_tensors(self.model, self.runner.adamw, state.optimizer)
        load_model_tensors(self.model, state.model)
        load_model_tensors(self.ema.model, state.ema)
        if isinstance(self.objective, StableVM) and not self.config.bank_is_fixed:
            self.objective.bank.load_state_dict(state.bank)
        if self.accelerator.scaler is not None and state.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.step = state.card.step

    def _finish_step(self, journal: Journal, interruption: Interruption) -> bool:
        """Metrics, checkpoint and grid where this step asks for them; True when the run is to end."""
        config, last = self.config, self.step == self.total_steps
        rate = self.optimizer.param_groups[0]["lr"]
        if last or self.step % config.log_steps == 0:
            journal.flush(self.step, rate)
        stop = interruption.agreed(self.accelerator) if self._may_stop() else False
        if last or stop or self.step % config.checkpointing_steps == 0:
            journal.flush(self.step, rate)
            self._save(journal)
        if config.sampling_steps and (last or self.step % config.sampling_steps == 0):
            self._draw_previews(journal)
        if config.eval_every and (last or self.step % config.eval_every == 0):
            self._evaluate(journal)
        return stop

    def _save(self, journal: Journal) -> None:
        """Write a checkpoint. Right after bad steps no earlier one is removed, as they may be better to go on from."""
        config, state, means = self.config, self._state(), journal.take_means()

        def write() -> None:
            checkpoint.save(config.folder, state, 0 if self.guard.in_a_row else config.checkpoints_kept)
            if config.keep_best in means:
                checkpoint.keep_if_best(config.folder, Record(config.keep_best, means[config.keep_best], self.step))

        on_main(self.accelerator, write)

    def _may_stop(self) -> bool:
        """Processes must stop at the same step, and asking each other costs a synchronisation."""
        return self.accelerator.num_processes == 1 or self.step % self.config.log_steps == 0

    def _draw_previews(self, journal: Journal) -> None:
        average = self._whole_average()

        def draw() -> None:
            assert self.previews is not None and journal.trackers is not None
            card = dataclasses.replace(self.card, step=self.step)
            grid = self.previews.draw(average, card, self.accelerator.device)
            journal.trackers.image(self.step, "samples", grid)

        on_main(self.accelerator, draw)

    def _evaluate(self, journal: Journal) -> None:
        """Judge the moving average, and keep the checkpoint of this step if none before was better."""
        folder, average = self.config.folder, self._whole_average()
        state = None if self.step in checkpoint.saved_steps(folder) else self._state()

        def judge() -> None:
            assert self.evaluation is not None and journal.trackers is not None
            numbers = self.evaluation.run(average, dataclasses.replace(self.card, step=self.step))
            journal.trackers.log(self.step, {f"eval_{name}": value for name, value in numbers.items()})
            record = Record(*distance_of(numbers), self.step)
            if checkpoint.is_best(folder, record):
                if state is not None:
                    checkpoint.save(folder, state, self.config.checkpoints_kept)
                checkpoint.keep_if_best(folder, record)

        on_main(self.accelerator, judge)

    def _state(self) -> TrainingState:
        """The state, on the main process; all take part, as each may hold shards."""
        main = self.accelerator.is_main_process
        return TrainingState(
            card=dataclasses.replace(self.card, step=self.step),
            model=model_tensors(self.model),
            ema=model_tensors(self.ema.model),
            optimizer=optimizer_tensors(self.model, self.runner.adamw),
            bank=self._bank_state() if main else {},
            scaler=self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {},
        )

    def _bank_state(self) -> dict[str, Tensor]:
        """Empty without a bank, and for one that follows from the data and the seed alone."""
        changes = isinstance(self.objective, StableVM) and not self.config.bank_is_fixed
        return self.objective.bank.state_dict() if changes else {}  # type: ignore[union-attr]

    def _whole_average(self) -> nn.Module:
        """The moving average as a network that the main process can use alone."""
        if not self.accelerator.is_fsdp2:
            return self.ema.model
        with torch.device("meta"):
            model = SiT(self.card.model)
        tensors = model_tensors(self.ema.model)
        if self.accelerator.is_main_process:
            model.load_state_dict(tensors, assign=True)
            model.to(self.accelerator.device)
        return model.eval().requires_grad_(False)

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _alignment(self, grid_size: int) -> Alignment | None:
        config = self.config
        if not config.use_proj_loss:
            return None
        dtype = ENCODER_DTYPES[self.accelerator.mixed_precision]
        return Alignment(
            encoders=load_encoders(config, grid_size, self.accelerator.device, dtype),
            schedule=AlignmentSchedule(
                config.proj_weight_schedule, get_interpolant(config.path_type), config.proj_tau, config.proj_k
            ),
            coefficient=config.proj_coeff,
            irepa_gamma=config.irepa_gamma if config.use_irepa else None,
        )

    def _previews(self) -> Previews:
        """Only the main process draws, and only it loads the autoencoder."""
        autoencoder = load_autoencoder(self.dataset.latent, device=self.accelerator.device)
        return Previews(self.config.folder / "samples", autoencoder, self.config.seed)

    def _evaluation(self) -> Evaluation:
        """To be called on the main process, as the previews."""
        device = self.accelerator.device
        return Evaluation(self.config, load_autoencoder(self.dataset.latent, device=device), device)

    def _anchor_plan(self) -> AnchorPlan | None:
        """Whose images the loader reads, where the anchors that they belong to are not the fresh samples."""
        if self.alignment is None or not isinstance(self.objective, StableVM) or self.objective.anchors == "batch":
            return None
        return AnchorPlan(
            self.objective.bank,
            self.dataset,
            self.config,
            self.drawer.positions,
            start_step=self.step,
            num_steps=self.total_steps - self.step,
        )

    def _open_folder(self) -> Trackers:
        """Create the run's folder, or tidy it up; returns the trackers. To be called on the main process."""
        folder = self.config.folder
        folder.mkdir(parents=True, exist_ok=True)
        remove_temporary(folder)
        checkpoint.sweep(folder)
        if aside := checkpoint.set_aside(folder, self.step):
            self._say(f"going on from step {self.step}; newer checkpoints were moved to {aside}")
        write_json(folder / CONFIG_FILE, self.config.to_dict())
        return Trackers(folder, self.config.trackers, self.config.to_dict(), self.step)

    def _say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(line)


def _accelerator(config: TrainConfig) -> Accelerator:
    precision = config.mixed_precision or ("fp16" if torch.cuda.is_available() else "no")
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed-precision fp16: there is no GPU here; give bf16 or no")
    # Told that there is only a CPU, accelerate joins several processes through gloo; untold, it would leave each alone.
    accelerator = Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available())
    _check_sharding(accelerator)
    parts = accelerator.num_processes * config.gradient_accumulation_steps
    if config.batch_size % parts:
        raise UserError(
            f"--batch-size {config.batch_size}: not a multiple of {accelerator.num_processes} processes x "
            f"{config.gradient_accumulation_steps} accumulation steps; give one"
        )
    return accelerator


def _check_sharding(accelerator: Accelerator) -> None:
    """UserError where accelerate's configuration asks for FSDP that would silently be left out, or be wrong."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    if accelerator.distributed_type != DistributedType.FSDP:
        raise UserError("FSDP: accelerate shards over several GPUs only; launch without --use_fsdp")
    if not accelerator.is_fsdp2:
        raise UserError("FSDP of version 1 hides the weights' names; set fsdp_version: 2 (--fsdp_version 2)")
    if accelerator.mixed_precision == "fp16":
        raise UserError("--mixed-precision fp16: its scaler does not know of FSDP's shards; give bf16 or no")
