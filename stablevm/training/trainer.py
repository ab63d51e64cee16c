"""The training run: from options to checkpoints, metrics and grids, and on from where an earlier command stopped."""

import sys

from accelerate import Accelerator
from tqdm import tqdm

from stablevm.autoencoder import Autoencoder, load_autoencoder
from stablevm.data.dataset import PreparedDataset
from stablevm.encoders import Encoder
from stablevm.files import remove_temporary, write_json
from stablevm.locks import owned
from stablevm.objective import StableVM
from stablevm.precision import DTYPES, tf32
from stablevm.sampling.protocol import decoding_notes
from stablevm.training import checkpoint
from stablevm.training.checkpoint import Record
from stablevm.training.config import CONFIG_FILE, TrainConfig
from stablevm.training.engine import Engine
from stablevm.training.evaluation import Evaluation, distance_of
from stablevm.training.interruption import Interruption
from stablevm.training.journal import Journal
from stablevm.training.launch import make_accelerator
from stablevm.training.main_process import on_main
from stablevm.training.previews import Previews
from stablevm.training.rate import rate_at
from stablevm.training.setup import (
    empty_classes_warning,
    load_encoders,
    model_config,
    open_data,
    prefill,
)
from stablevm.training.start import find_start
from stablevm.training.tracker import Trackers


def train(config: TrainConfig) -> int:
    """Train, or go on training, as `config` says; returns the number of finished steps.

    Raises UserError, before anything is written, for options, data or an existing folder that do not fit. Ctrl-C and
    SIGTERM end the step, write a checkpoint and leave with 128 plus the signal's number.
    """
    config.validate()
    with owned(config.folder):
        return _train(config)


def _train(config: TrainConfig) -> int:
    accelerator = make_accelerator(config)
    start = find_start(config, show=accelerator.is_main_process)
    dataset = open_data(config)
    if accelerator.is_main_process:
        notes = empty_classes_warning(config, dataset) + decoding_notes(config.vae, dataset.latent)
        for line in config.warnings() + notes:
            print(f"warning: {line}", file=sys.stderr)
    trainer = Trainer(config, dataset, accelerator)
    if start:
        trainer.engine.restore(checkpoint.load(config.folder, start))
    elif config.init_from is not None:
        for line in trainer.engine.start_from(config.init_from):
            trainer.say(line)
    with Interruption() as interruption, tf32(config.allow_tf32):
        return trainer.run(interruption)


class Trainer:
    """An engine's run: its steps, and all that they leave on the disk. Construction checks all that can be checked and
    writes nothing.
    """

    def __init__(self, config: TrainConfig, dataset: PreparedDataset, accelerator: Accelerator) -> None:
        self.config, self.dataset, self.accelerator = config, dataset, accelerator
        self.total_steps = config.total_steps(len(dataset))
        self.engine = Engine(config, dataset, accelerator, self._encoders())
        self.previews = on_main(accelerator, self._previews) if config.sampling_steps else None
        self.evaluation = on_main(accelerator, self._evaluation) if config.eval_every else None

    def run(self, interruption: Interruption) -> int:
        """Train to the end, or to an interruption; returns the number of finished steps."""
        engine = self.engine
        if engine.step >= self.total_steps:
            self.say(f"{self.config.folder}: already at step {engine.step} of {self.total_steps}")
            return engine.step
        if isinstance(engine.objective, StableVM) and (not engine.step or self.config.bank_is_fixed):
            prefill(engine.objective.bank, self.dataset, self.config, show=self.accelerator.is_main_process)
        trackers = on_main(self.accelerator, self._open_folder)
        journal = Journal(
            self.config, self.accelerator, trackers, engine.guard, step=engine.step, total_steps=self.total_steps
        )
        loader = engine.loader(self.total_steps - engine.step)
        try:
            for batch in loader:
                journal.clock.end("data_wait")
                rate = rate_at(self.config, engine.step, self.total_steps)
                journal.add(engine.train_step(batch, rate, journal.clock))
                if self._finish_step(journal, interruption):
                    break
                journal.clock.end("other")
        finally:
            journal.close()
        self.accelerator.wait_for_everyone()
        if interruption.signal is not None and engine.step < self.total_steps:
            self.say(f"interrupted; saved step {engine.step}. Run the same command again to go on.")
            raise SystemExit(128 + interruption.signal)
        return engine.step

    def _finish_step(self, journal: Journal, interruption: Interruption) -> bool:
        """Metrics, checkpoint and grid where this step asks for them; True when the run is to end."""
        config, step, rate = self.config, self.engine.step, self.engine.rate
        last = step == self.total_steps
        if last or step % config.log_steps == 0:
            journal.flush(step, rate)
        stop = interruption.agreed(self.accelerator) if self._may_stop() else False
        if last or stop or step % config.checkpointing_steps == 0:
            journal.flush(step, rate)
            self._save(journal)
        if config.sampling_steps and (last or step % config.sampling_steps == 0):
            self._draw_previews(journal)
        if config.eval_every and (last or step % config.eval_every == 0):
            self._evaluate(journal)
        return stop

    def _save(self, journal: Journal) -> None:
        """Write a checkpoint. Right after bad steps no earlier one is removed, as they may be better to go on from."""
        config, state, means = self.config, self.engine.state(), journal.take_means()

        def write() -> None:
            checkpoint.save(config.folder, state, 0 if self.engine.guard.in_a_row else config.checkpoints_kept)
            if config.keep_best in means:
                record = Record(config.keep_best, means[config.keep_best], self.engine.step)
                checkpoint.keep_if_best(config.folder, record)

        on_main(self.accelerator, write)

    def _may_stop(self) -> bool:
        """Processes must stop at the same step, and asking each other costs a synchronisation."""
        return self.accelerator.num_processes == 1 or self.engine.step % self.config.log_steps == 0

    def _draw_previews(self, journal: Journal) -> None:
        average = self.engine.whole_average()

        def draw() -> None:
            assert self.previews is not None and journal.trackers is not None
            card = self.engine.stamped_card()
            grid = self.previews.draw(average, card, self.accelerator.device)
            journal.trackers.image(self.engine.step, "samples", grid)

        on_main(self.accelerator, draw)

    def _evaluate(self, journal: Journal) -> None:
        """Judge the moving average, and keep the checkpoint of this step if none before was better."""
        folder, average = self.config.folder, self.engine.whole_average()
        state = None if self.engine.step in checkpoint.saved_steps(folder) else self.engine.state()

        def judge() -> None:
            assert self.evaluation is not None and journal.trackers is not None
            numbers = self.evaluation.run(average, self.engine.stamped_card())
            journal.trackers.log(self.engine.step, {f"eval_{name}": value for name, value in numbers.items()})
            record = Record(*distance_of(numbers), self.engine.step)
            if checkpoint.is_best(folder, record):
                if state is not None:
                    checkpoint.save(folder, state, self.config.checkpoints_kept)
                checkpoint.keep_if_best(folder, record)

        on_main(self.accelerator, judge)

    def _encoders(self) -> list[Encoder]:
        if not self.config.use_proj_loss:
            return []
        grid_size = model_config(self.config, self.dataset).grid_size
        dtype = DTYPES[self.accelerator.mixed_precision]
        return load_encoders(self.config, grid_size, self.accelerator.device, dtype)

    def _previews(self) -> Previews:
        """Only the main process draws, and only it loads the autoencoder."""
        return Previews(self.config.folder / "samples", self._autoencoder(), self.config.seed)

    def _evaluation(self) -> Evaluation:
        """To be called on the main process, as the previews."""
        return Evaluation(self.config, self._autoencoder(), self.accelerator.device)

    def _autoencoder(self) -> Autoencoder:
        return load_autoencoder(self.dataset.latent, name=self.config.vae, device=self.accelerator.device)

    def _open_folder(self) -> Trackers:
        """Create the run's folder, or tidy it up; returns the trackers. To be called on the main process."""
        folder = self.config.folder
        folder.mkdir(parents=True, exist_ok=True)
        remove_temporary(folder)
        checkpoint.sweep(folder)
        if aside := checkpoint.set_aside(folder, self.engine.step):
            self.say(f"going on from step {self.engine.step}; newer checkpoints were moved to {aside}")
        write_json(folder / CONFIG_FILE, self.config.to_dict())
        return Trackers(folder, self.config.trackers, self.config.to_dict(), self.engine.step)

    def say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(line)
