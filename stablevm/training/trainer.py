"""The training run: from options to checkpoints, metrics and grids, and on from where an earlier command stopped."""

import dataclasses
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from stablevm import rng
from stablevm.autoencoder import load_autoencoder
from stablevm.data.dataset import PreparedDataset
from stablevm.data.loader import TrainingBatch, training_loader
from stablevm.errors import UserError
from stablevm.files import is_temporary, read_json, write_json
from stablevm.interpolant import get_interpolant
from stablevm.models.sit import SiT
from stablevm.objective import StableVM
from stablevm.precision import tf32
from stablevm.schedules import AlignmentSchedule
from stablevm.snapshot import ModelCard
from stablevm.training import checkpoint
from stablevm.training.anchors import AnchorPlan
from stablevm.training.checkpoint import TrainingState
from stablevm.training.clock import PhaseClock
from stablevm.training.config import CONFIG_FILE, TrainConfig
from stablevm.training.ema import MovingAverage
from stablevm.training.initial import initial_weights
from stablevm.training.interruption import Interruption
from stablevm.training.journal import Journal
from stablevm.training.previews import Previews
from stablevm.training.rate import rate_at
from stablevm.training.setup import (
    check_compiler,
    class_names,
    load_encoders,
    make_objective,
    model_config,
    open_data,
    prefill,
)
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
    start = _find_start(config)
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
        self.previews = self._previews()
        optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
            fused=True,
        )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.drawer = BatchDrawer(self.objective, dataset, accelerator, config)
        self.runner = StepRunner(self.model, self.optimizer, accelerator, config, self.alignment)

    def run(self, interruption: Interruption) -> int:
        """Train to the end, or to an interruption; returns the number of finished steps."""
        if self.step >= self.total_steps:
            self._say(f"{self.config.folder}: already at step {self.step} of {self.total_steps}")
            return self.step
        if isinstance(self.objective, StableVM) and (not self.step or self.config.bank_is_fixed):
            prefill(self.objective.bank, self.dataset, self.config, show=self.accelerator.is_main_process)
        trackers = self._open_folder()
        journal = Journal(self.config, self.accelerator, trackers, step=self.step, total_steps=self.total_steps)
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
        model = self.accelerator.unwrap_model(self.model)
        weights, lines = initial_weights(folder, self.config.init_weights, self.card, self.ema.model.state_dict())
        model.load_state_dict(weights)
        self.ema.model.load_state_dict(weights)
        for line in lines:
            self._say(line)

    def _train_step(self, batch: TrainingBatch, clock: PhaseClock) -> StepMetrics:
        self._set_rate(rate_at(self.config, self.step, self.total_steps))
        draw = self.drawer.draw(batch, self.step)
        images = self.drawer.images(batch, draw) if self.alignment else None
        clock.end("draw")
        metrics = self.runner.run(draw, images, clock)
        self.ema.update(self.accelerator.unwrap_model(self.model), self.step)
        clock.end("update")
        self.step += 1
        return metrics

    def restore(self, state: TrainingState) -> None:
        """Take over the state of an earlier run; UserError where it does not fit this one."""
        if dataclasses.replace(state.card, step=0) != self.card:
            raise UserError(f"{self.config.folder}: its checkpoint is of another network or data set than the options'")
        model = self.accelerator.unwrap_model(self.model)
        model.load_state_dict(state.model)
        self.ema.model.load_state_dict(state.ema)
        self._load_optimizer(state.optimizer)
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
            if self.accelerator.is_main_process:
                checkpoint.save(config.folder, self._state(), config.checkpoints_kept)
        if config.sampling_steps and (last or self.step % config.sampling_steps == 0):
            self._draw_previews(journal)
        return stop

    def _may_stop(self) -> bool:
        """Processes must stop at the same step, and asking each other costs a synchronisation."""
        return self.accelerator.num_processes == 1 or self.step % self.config.log_steps == 0

    def _draw_previews(self, journal: Journal) -> None:
        if self.previews is not None:
            card = dataclasses.replace(self.card, step=self.step)
            grid = self.previews.draw(self.ema.model, card, self.accelerator.device)
            if journal.trackers is not None:
                journal.trackers.image(self.step, "samples", grid)

    def _state(self) -> TrainingState:
        return TrainingState(
            card=dataclasses.replace(self.card, step=self.step),
            model=self.accelerator.unwrap_model(self.model).state_dict(),
            ema=self.ema.model.state_dict(),
            optimizer=self._optimizer_tensors(),
            bank=self._bank_state(),
            scaler=self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {},
        )

    def _bank_state(self) -> dict[str, Tensor]:
        """Empty without a bank, and for one that follows from the data and the seed alone."""
        changes = isinstance(self.objective, StableVM) and not self.config.bank_is_fixed
        return self.objective.bank.state_dict() if changes else {}  # type: ignore[union-attr]

    def _trained_names(self) -> list[str]:
        model = self.accelerator.unwrap_model(self.model)
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        state = self.optimizer.state_dict()["state"]
        names = self._trained_names()
        return {f"{names[i]}.{key}": value for i, values in state.items() for key, value in values.items()}

    def _load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        for index, name in enumerate(self._trained_names()):
            keys = ("step", "exp_avg", "exp_avg_sq")
            state[index] = {key: tensors[f"{name}.{key}"] for key in keys}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

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

    def _previews(self) -> Previews | None:
        """Only the main process draws, and only it loads the autoencoder."""
        if not self.config.sampling_steps or not self.accelerator.is_main_process:
            return None
        autoencoder = load_autoencoder(self.dataset.latent, device=self.accelerator.device)
        return Previews(self.config.folder / "samples", autoencoder, self.config.seed)

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

    def _open_folder(self) -> Trackers | None:
        """Create the run's folder; the trackers, on the main process."""
        if not self.accelerator.is_main_process:
            return None
        self.config.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.config.folder / CONFIG_FILE, self.config.to_dict())
        return Trackers(self.config.folder, self.config.trackers, self.config.to_dict(), self.step)

    def _say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(line)


def _accelerator(config: TrainConfig) -> Accelerator:
    precision = config.mixed_precision or ("fp16" if torch.cuda.is_available() else "no")
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed-precision fp16: there is no GPU here; give bf16 or no")
    # Told that there is only a CPU, accelerate joins several processes through gloo; untold, it would leave each alone.
    accelerator = Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available())
    parts = accelerator.num_processes * config.gradient_accumulation_steps
    if config.batch_size % parts:
        raise UserError(
            f"--batch-size {config.batch_size}: not a multiple of {accelerator.num_processes} processes x "
            f"{config.gradient_accumulation_steps} accumulation steps; give one"
        )
    return accelerator


def _find_start(config: TrainConfig) -> int:
    """The step to go on from, 0 to begin; UserError when the folder holds another run."""
    steps = checkpoint.saved_steps(config.folder)
    saved = config.folder / CONFIG_FILE
    if saved.exists():
        config.check_continues(TrainConfig.from_dict(read_json(saved, "run")))
    elif config.folder.exists() and not all(map(is_temporary, config.folder.iterdir())):
        raise UserError(f"{config.folder} holds files but no run (no {CONFIG_FILE}); give another --exp-name")
    if (config.resume or config.resume_step) and not steps:
        raise UserError(f"--resume: {config.folder} has no checkpoint; leave the option out to begin a run")
    return config.resume_step or (steps[-1] if steps else 0)
