"""The training run: from options to checkpoints, metrics and grids, and on from where an earlier command stopped."""

import dataclasses
import os
import sys
import time
from collections import defaultdict

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from tqdm import tqdm

from stablevm import rng
from stablevm.autoencoder import load_autoencoder
from stablevm.data.loader import training_loader
from stablevm.data.shards import PreparedDataset
from stablevm.errors import UserError
from stablevm.files import remove_temporary, write_json
from stablevm.interpolant import get_interpolant
from stablevm.models.sit import SiT
from stablevm.objective import StableVM
from stablevm.precision import tf32
from stablevm.schedules import AlignmentSchedule
from stablevm.snapshot import ModelCard
from stablevm.training import checkpoint
from stablevm.training.checkpoint import Record, TrainingState
from stablevm.training.config import CONFIG_FILE, TrainConfig
from stablevm.training.ema import MovingAverage
from stablevm.training.guard import Fault, Guard, GuardedAdamW
from stablevm.training.interruption import Interruption
from stablevm.training.previews import Previews
from stablevm.training.processes import on_main
from stablevm.training.rate import rate_at
from stablevm.training.setup import class_names, load_encoders, make_objective, model_config, open_data, prefill
from stablevm.training.start import find_start
from stablevm.training.state import load_model_tensors, load_optimizer_tensors, model_tensors, optimizer_tensors
from stablevm.training.step import Alignment, BatchDrawer, StepRunner
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
        self.objective = make_objective(config, self.card.model, dataset, device)
        self.previews = on_main(accelerator, self._previews) if config.sampling_steps else None
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
        if isinstance(self.objective, StableVM) and not self.step:
            prefill(self.objective.bank, self.dataset, self.config, show=self.accelerator.is_main_process)
        trackers = on_main(self.accelerator, self._open_folder)
        journal = Journal(self, trackers)
        loader = training_loader(
            self.dataset,
            global_batch=self.config.batch_size,
            seed=self.config.seed,
            num_steps=self.total_steps - self.step,
            start_step=self.step,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            workers=self.config.num_workers,
            with_images=self._loader_reads_images(),
            pin_memory=self.accelerator.device.type == "cuda",
        )
        try:
            for batch in loader:
                self._set_rate(rate_at(self.config, self.step, self.total_steps))
                draw = self.drawer.draw(batch, self.step)
                images = self.drawer.images(batch, draw) if self.alignment else None
                metrics, sample_losses = self.runner.run(draw, images)
                taken = metrics["grad_norm"].isfinite()
                self.ema.update(self.accelerator.unwrap_model(self.model), self.step, taken)
                self.step += 1
                self.guard.add(self.step, metrics["loss"], metrics["grad_norm"], draw.ids, sample_losses)
                journal.add(metrics)
                if self._finish_step(journal, interruption):
                    break
        finally:
            journal.close()
        self.accelerator.wait_for_everyone()
        if interruption.signal is not None and self.step < self.total_steps:
            self._say(f"interrupted; saved step {self.step}. Run the same command again to go on.")
            raise SystemExit(128 + interruption.signal)
        return self.step

    def restore(self, state: TrainingState) -> None:
        """Take over the state of an earlier run; UserError where it does not fit this one."""
        if dataclasses.replace(state.card, step=0) != self.card:
            raise UserError(f"{self.config.folder}: its checkpoint is of another network or data set than the options'")
        load_optimizer_tensors(self.model, self.runner.adamw, state.optimizer)
        load_model_tensors(self.model, state.model)
        load_model_tensors(self.ema.model, state.ema)
        if isinstance(self.objective, StableVM):
            self.objective.bank.load_state_dict(state.bank)
        if self.accelerator.scaler is not None and state.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.step = state.card.step

    def _finish_step(self, journal: "Journal", interruption: Interruption) -> bool:
        """Metrics, checkpoint and grid where this step asks for them; True when the run is to end."""
        config, last = self.config, self.step == self.total_steps
        if last or self.step % config.log_steps == 0:
            journal.flush()
        stop = interruption.agreed(self.accelerator) if self._may_stop() else False
        if last or stop or self.step % config.checkpointing_steps == 0:
            journal.flush()
            self._save(journal)
        if config.sampling_steps and (last or self.step % config.sampling_steps == 0):
            self._draw_previews(journal)
        return stop

    def _save(self, journal: "Journal") -> None:
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

    def _draw_previews(self, journal: "Journal") -> None:
        average = self._whole_average()

        def draw() -> None:
            assert self.previews is not None and journal.trackers is not None
            card = dataclasses.replace(self.card, step=self.step)
            grid = self.previews.draw(average, card, self.accelerator.device)
            journal.trackers.image(self.step, "samples", grid)

        on_main(self.accelerator, draw)

    def _state(self) -> TrainingState:
        """The state, on the main process; all take part, as each may hold shards."""
        main = self.accelerator.is_main_process
        return TrainingState(
            card=dataclasses.replace(self.card, step=self.step),
            model=model_tensors(self.model),
            ema=model_tensors(self.ema.model),
            optimizer=optimizer_tensors(self.model, self.runner.adamw),
            bank=self.objective.bank.state_dict() if main and isinstance(self.objective, StableVM) else {},
            scaler=self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {},
        )

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

    def _loader_reads_images(self) -> bool:
        """The fresh samples' images are wanted where they are the anchors; a bank's anchors are other samples."""
        from_bank = isinstance(self.objective, StableVM) and self.config.bank_anchors == "bank"
        return self.alignment is not None and not from_bank

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


class Journal:
    """Metrics of the steps since the last row, kept on the device until a row is due, and the progress bar."""

    def __init__(self, trainer: Trainer, trackers: Trackers | None) -> None:
        self.trackers = trackers
        self._trainer = trainer
        self._pending: list[dict[str, Tensor]] = []
        self._sums: dict[str, float] = defaultdict(float)  # over the `_taken` steps since the last checkpoint
        self._taken = 0
        self._since = time.perf_counter()
        self._bar = tqdm(
            total=trainer.total_steps,
            initial=trainer.step,
            desc=trainer.config.exp_name,
            unit="step",
            disable=not trainer.accelerator.is_main_process,
            dynamic_ncols=True,
        )

    def add(self, metrics: dict[str, Tensor]) -> None:
        self._pending.append(metrics)
        self._bar.update()

    def flush(self) -> None:
        """Write the mean over the pending steps and over all processes as one row, and report the bad steps.

        Skipped steps count in no mean. UserError after too many bad ones in a row.
        """
        if not self._pending:
            return
        names = list(self._pending[0])
        taken, faults = self._trainer.guard.review()
        table = torch.stack([torch.stack([row[name].float() for name in names]) for row in self._pending])
        means = table[torch.tensor(taken, device=table.device)].mean(0)
        means = self._trainer.accelerator.reduce(means, reduction="mean")
        assert isinstance(means, Tensor)
        values = dict(zip(names, means.tolist(), strict=True))
        if any(taken):
            self._taken += sum(taken)
            for name, value in values.items():
                self._sums[name] += sum(taken) * value
        seconds = time.perf_counter() - self._since
        config = self._trainer.config
        values["lr"] = self._trainer.optimizer.param_groups[0]["lr"]
        values["images_per_second"] = len(self._pending) * config.batch_size / seconds
        on_main(self._trainer.accelerator, lambda: self._write(values, faults))
        self._bar.set_postfix({"loss": f"{values['loss']:.4f}"}, refresh=False)
        self._pending.clear()
        self._since = time.perf_counter()
        self._trainer.guard.check(config.folder)

    def take_means(self) -> dict[str, float]:
        """Means of the metrics over the steps flushed since the last call; empty when all of them were skipped."""
        means = {name: value / self._taken for name, value in self._sums.items()}
        self._sums.clear()
        self._taken = 0
        return means

    def _write(self, values: dict[str, float], faults: list[Fault]) -> None:
        assert self.trackers is not None
        for fault in faults:
            tqdm.write(f"warning: {fault}", file=sys.stderr)
            self.trackers.event(fault.to_row())
        self.trackers.log(self._trainer.step, values)

    def close(self) -> None:
        self._bar.close()
        if self.trackers is not None:
            self.trackers.close()


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
