"""The training run: from options to checkpoints, metrics and grids, and on from where an earlier command stopped."""

import dataclasses
import sys
import time

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from stablevm import rng
from stablevm.autoencoder import load_autoencoder
from stablevm.data.dataset import PreparedDataset
from stablevm.data.loader import training_loader
from stablevm.errors import UserError
from stablevm.files import is_temporary, read_json, write_json
from stablevm.interpolant import get_interpolant
from stablevm.models.sit import SiT
from stablevm.objective import StableVM
from stablevm.precision import tf32
from stablevm.schedules import AlignmentSchedule
from stablevm.snapshot import ModelCard
from stablevm.training import checkpoint
from stablevm.training.checkpoint import TrainingState
from stablevm.training.config import CONFIG_FILE, TrainConfig
from stablevm.training.ema import MovingAverage
from stablevm.training.evaluation import Evaluation, distance_of
from stablevm.training.interruption import Interruption
from stablevm.training.previews import Previews
from stablevm.training.rate import rate_at
from stablevm.training.setup import class_names, load_encoders, make_objective, model_config, open_data, prefill
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
    start = _find_start(config)
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
        self.previews = self._previews()
        self.evaluation = self._evaluation()
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
        if isinstance(self.objective, StableVM) and not self.step:
            prefill(self.objective.bank, self.dataset, self.config, show=self.accelerator.is_main_process)
        trackers = self._open_folder()
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
                metrics = self.runner.run(draw, images)
                self.ema.update(self.accelerator.unwrap_model(self.model), self.step)
                self.step += 1
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
        model = self.accelerator.unwrap_model(self.model)
        model.load_state_dict(state.model)
        self.ema.model.load_state_dict(state.ema)
        self._load_optimizer(state.optimizer)
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
            if self.accelerator.is_main_process:
                checkpoint.save(config.folder, self._state(), config.checkpoints_kept)
        if config.sampling_steps and (last or self.step % config.sampling_steps == 0):
            self._draw_previews(journal)
        if config.eval_every and (last or self.step % config.eval_every == 0):
            self._evaluate(journal)
        return stop

    def _may_stop(self) -> bool:
        """Processes must stop at the same step, and asking each other costs a synchronisation."""
        return self.accelerator.num_processes == 1 or self.step % self.config.log_steps == 0

    def _draw_previews(self, journal: "Journal") -> None:
        if self.previews is not None:
            card = dataclasses.replace(self.card, step=self.step)
            grid = self.previews.draw(self.ema.model, card, self.accelerator.device)
            if journal.trackers is not None:
                journal.trackers.image(self.step, "samples", grid)

    def _evaluate(self, journal: "Journal") -> None:
        """Judge the moving average, and keep the checkpoint of this step if none before was better."""
        if self.evaluation is None:
            return
        numbers = self.evaluation.run(self.ema.model, dataclasses.replace(self.card, step=self.step))
        if journal.trackers is not None:
            journal.trackers.log(self.step, {f"eval_{name}": value for name, value in numbers.items()})
        record = checkpoint.Record(*distance_of(numbers), self.step)
        folder = self.config.folder
        if checkpoint.is_best(folder, record):
            if self.step not in checkpoint.saved_steps(folder):
                checkpoint.save(folder, self._state(), self.config.checkpoints_kept)
            checkpoint.keep_if_best(folder, record)

    def _state(self) -> TrainingState:
        return TrainingState(
            card=dataclasses.replace(self.card, step=self.step),
            model=self.accelerator.unwrap_model(self.model).state_dict(),
            ema=self.ema.model.state_dict(),
            optimizer=self._optimizer_tensors(),
            bank=self.objective.bank.state_dict() if isinstance(self.objective, StableVM) else {},
            scaler=self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {},
        )

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

    def _evaluation(self) -> Evaluation | None:
        """On the main process, as the previews."""
        if not self.config.eval_every or not self.accelerator.is_main_process:
            return None
        device = self.accelerator.device
        return Evaluation(self.config, load_autoencoder(self.dataset.latent, device=device), device)

    def _loader_reads_images(self) -> bool:
        """The fresh samples' images are wanted where they are the anchors; a bank's anchors are other samples."""
        from_bank = isinstance(self.objective, StableVM) and self.config.bank_anchors == "bank"
        return self.alignment is not None and not from_bank

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


class Journal:
    """Metrics of the steps since the last row, kept on the device until a row is due, and the progress bar."""

    def __init__(self, trainer: Trainer, trackers: Trackers | None) -> None:
        self.trackers = trackers
        self._trainer = trainer
        self._pending: list[dict[str, Tensor]] = []
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
        """Write the mean over the pending steps and over all processes as one row."""
        if not self._pending:
            return
        names = list(self._pending[0])
        means = torch.stack([torch.stack([row[name].float() for name in names]) for row in self._pending]).mean(0)
        means = self._trainer.accelerator.reduce(means, reduction="mean")
        assert isinstance(means, Tensor)
        values = dict(zip(names, means.tolist(), strict=True))
        seconds = time.perf_counter() - self._since
        config = self._trainer.config
        values["lr"] = self._trainer.optimizer.param_groups[0]["lr"]
        values["images_per_second"] = len(self._pending) * config.batch_size / seconds
        if self.trackers is not None:
            self.trackers.log(self._trainer.step, values)
        self._bar.set_postfix({"loss": f"{values['loss']:.4f}"}, refresh=False)
        self._pending.clear()
        self._since = time.perf_counter()

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
