"""The training run, from options to checkpoints, metrics and grids of samples, resumed where it stopped.

`train` reads from top to bottom: `_prepared` builds the run, `Trainer.run` writes its folder, and the loop is in
`Trainer._train`. A step is `Engine.train_step`; in step.py a batch becomes a target (`BatchDrawer.draw`) and the loss
is summed (`StepRunner._losses`). `Trainer._save` writes checkpoints.
"""

import time
from dataclasses import replace

from accelerate import Accelerator

from stablevm.data.dataset import PreparedDataset
from stablevm.networks.autoencoder import Autoencoder, load_autoencoder
from stablevm.networks.encoders import Encoder
from stablevm.sampling.provenance import decoding_notes
from stablevm.support.errors import UserError
from stablevm.support.files import remove_temporary, write_json
from stablevm.support.locks import owned
from stablevm.support.precision import DTYPES, tf32
from stablevm.training import checkpoint
from stablevm.training.average import AVERAGES, save_snapshot, set_snapshots_aside, snapshot_steps
from stablevm.training.checkpoint import DamagedError, Record, TrainingState
from stablevm.training.cls_tokens import class_tokens
from stablevm.training.config import CHECKPOINT_INTERVAL, CONFIG_FILE, KEPT_BETWEEN, TrainConfig
from stablevm.training.console import duration, say, say_rows, warn
from stablevm.training.engine import Engine, load_encoders, model_config
from stablevm.training.evaluation import PREVIEWS, Evaluation, Previews, distance_of, set_previews_aside
from stablevm.training.journal import Journal
from stablevm.training.launch import (
    Interruption,
    as_launched,
    check_same_options,
    make_accelerator,
    on_main,
    told_by_main,
)
from stablevm.training.objectives import check_classes, prefill
from stablevm.training.start import (
    as_started,
    changes,
    check_bank,
    check_data,
    empty_classes_warning,
    find_start,
    open_data,
    record_data,
    short_run_warnings,
    thinned_after,
)
from stablevm.training.step import rate_at
from stablevm.training.summary import closing, next_command, opening
from stablevm.training.tracker import EVALUATED, Trackers, check_trackers, evaluated, keep_metrics


def train(config: TrainConfig, *, is_part: bool = False) -> int:
    """Train a network, or resume training, with the options of `config`; return the number of finished steps.

    is_part: whether this is part of a longer command, which then prints the next steps itself. Raises UserError, before
    anything is written, for options, data or an existing folder that do not fit. On Ctrl-C or SIGTERM it finishes the
    step, writes a checkpoint and exits with 128 plus the number of the signal.
    """
    config.validate()
    with owned(config.folder):
        config = as_launched(config)
        accelerator = make_accelerator(config)
        check_same_options(config, accelerator)
        trainer = _prepared(config, accelerator)
        with Interruption() as interruption, tf32(config.allow_tf32):
            step = trainer.run(interruption)
        if accelerator.is_main_process and not is_part:
            say_rows([("next", next_command(config, step))])
        return step


def _prepared(config: TrainConfig, accelerator: Accelerator) -> "Trainer":
    """Build the trainer, with the weights and state of the step from which the run starts, without writing files."""
    on_main(accelerator, lambda: check_trackers(config.trackers))
    given, config = config, as_started(config)
    start = find_start(config, show=accelerator.is_main_process)
    dataset = open_data(config)
    unchecked = check_data(config, dataset, start)
    if accelerator.is_main_process:
        notes = empty_classes_warning(config, dataset) + decoding_notes(config.vae, dataset.latent)
        notes += short_run_warnings(config, config.total_steps(len(dataset)))
        if config != given:
            notes.append(f"--encoder-resize {config.encoder_resize} stays: version 0.1 started this run so")
        for line in config.warnings() + notes + unchecked:
            warn(line)
    trainer = Trainer(config, dataset, accelerator)
    for line in changes(config, start):
        trainer.say(line)
    if start:
        _restore(trainer.engine, config, start, show=accelerator.is_main_process)
        trainer.thinned_after = thinned_after(config, trainer.engine.step, trainer.engine.progress.thinned_after)
        if (bank := trainer.engine.objective.bank) is not None:
            check_bank(config, dataset, bank)
    elif config.init_from is not None:
        for line in trainer.engine.start_from(config.init_from):
            trainer.say(line)
    return trainer


def _restore(engine: Engine, config: TrainConfig, start: int, *, show: bool) -> None:
    """Restore the checkpoint of step `start`, or the newest one before it whose tensors fit this run."""
    while True:
        folder = checkpoint.checkpoint_folder(config.folder, start)
        try:
            return engine.restore(checkpoint.load(config.folder, start))
        except DamagedError as error:
            earlier = 0 if config.resume_step else find_start(config, show=show, before=start)
            if not earlier:
                raise UserError(
                    f"{folder}: {error}; restore it from a copy, give another --resume-step, or another --exp-name"
                ) from None
            if show:
                warn(f"checkpoint {folder}: {error}; trying the one before")
            start = earlier


class Trainer:
    """Runs an engine and writes checkpoints, metrics and samples; the constructor makes all checks, but no files."""

    def __init__(self, config: TrainConfig, dataset: PreparedDataset, accelerator: Accelerator) -> None:
        self.config, self.dataset, self.accelerator = config, dataset, accelerator
        self.total_steps = config.total_steps(len(dataset))
        self.checkpoint_interval = config.checkpoint_interval(self.total_steps)
        self.preview_interval = config.preview_interval(self.total_steps)
        self.thinned_after = 0
        encoders = self._encoders()
        self.engine = Engine(config, dataset, accelerator, encoders)
        self.cls_encoder = encoders[0] if config.cls_token else None
        if config.cls_token and self.engine.objective.bank is not None:  # before any file is written
            check_classes(dataset, config, self.engine.objective.bank.num_classes)
        self.previews = on_main(accelerator, self._previews) if self.preview_interval else None
        self.evaluation = on_main(accelerator, self._evaluation) if config.eval_every else None

    def run(self, interruption: Interruption) -> int:
        """Train until the end or an interruption, and return the number of finished steps."""
        engine, started = self.engine, time.monotonic()
        done = engine.step >= self.total_steps
        if not done and self.accelerator.is_main_process:
            say_rows(opening(self.config, engine, self.total_steps))
        if not done and not self.config.cls_token:
            self._fill_bank()
        owed = told_by_main(self.accelerator, self._tidy)
        if not done and self.cls_encoder is not None:  # its tokens, which the bank holds too, are in a file of the run
            engine.drawer.cls_tokens = class_tokens(self.config, self.dataset, self.cls_encoder, self.accelerator)
            self.cls_encoder = None  # so that its memory is free when alignment stops
            self._fill_bank()
        if done and not owed:
            self.say(f"{self.config.folder}: already at step {engine.step} of {self.total_steps}")
            self._close()
            return engine.step
        journal = self._open_journal()
        try:
            self._settle(journal, owed)
            if not done:
                self._train(journal, interruption)
        finally:
            journal.close()
        self.accelerator.wait_for_everyone()
        if interruption.signal is not None and engine.step < self.total_steps:
            self.say(f"interrupted; saved step {engine.step}. Run the same command again to resume.")
            raise SystemExit(128 + interruption.signal)
        self.say(f"done: step {engine.step:,} of {self.total_steps:,}, after {duration(time.monotonic() - started)}")
        self._close()
        return engine.step

    def _fill_bank(self) -> None:
        """Fill the bank, if there is one, at the start; one that depends only on the data also where a run resumes."""
        bank, tokens = self.engine.objective.bank, self.engine.drawer.cls_tokens
        if bank is not None and (not self.engine.step or self.config.bank_is_fixed):
            prefill(bank, self.dataset, self.config, cls_tokens=tokens, show=self.accelerator.is_main_process)

    def _train(self, journal: Journal, interruption: Interruption) -> None:
        """The training loop: every step and the files it writes; `_settle` does what a kill left undone."""
        config, engine = self.config, self.engine
        for batch in engine.loader(self.total_steps - engine.step):
            journal.clock.end("data_wait")
            rate = rate_at(config, engine.step, self.total_steps)
            journal.add(engine.train_step(batch, rate, journal.clock))
            scheduled = self._due(self.checkpoint_interval)
            if scheduled or self._due(config.log_steps):
                journal.flush(engine.step, engine.rate)
            stop = self._may_stop() and interruption.agreed(self.accelerator)
            if scheduled:
                self._save(journal, journal.take_means())
            elif stop:
                self._save(journal, {})
            if self._due(self.preview_interval):
                self._plot_previews(journal)
            if self._due(config.eval_every):
                self._evaluate(journal)
            if self._due(config.average_every):
                self._save_averages()
            if stop:
                break
            journal.clock.end("other")

    def _due(self, every: int) -> bool:
        """Whether something that happens every `every` steps, and at the end, is due; never if 0."""
        return every > 0 and (self.engine.step == self.total_steps or self.engine.step % every == 0)

    def _save(self, journal: Journal, means: dict[str, float]) -> None:
        """Write a checkpoint; right after bad steps earlier ones are kept, as it may be better to resume from them.

        means: the means by which it may be the best; empty for a checkpoint off the interval, which a run without
        interruption would not have.
        """
        progress = replace(journal.progress(means), thinned_after=self.thinned_after)
        state = replace(self.engine.state(), progress=progress)

        def write() -> None:
            self._write_checkpoint(state)
            self._keep_if_best(means)

        on_main(self.accelerator, write)

    def _write_checkpoint(self, state: TrainingState) -> None:
        """To be called on the main process."""
        config = self.config
        folder = checkpoint.save(config.folder, state, self._kept(), self.checkpoint_interval)
        if config.is_thinned(self.total_steps) and not self.engine.guard.in_a_row:
            checkpoint.thin(config.folder, CHECKPOINT_INTERVAL, KEPT_BETWEEN, after=self.thinned_after)
        say(f"step {self.engine.step:,}: saved {folder}")

    def _kept(self) -> int:
        return 0 if self.engine.guard.in_a_row else self.config.checkpoints_kept

    def _keep_if_best(self, means: dict[str, float]) -> None:
        if self.config.keep_best in means:
            record = Record(self.config.keep_best, means[self.config.keep_best], self.engine.step)
            checkpoint.keep_if_best(self.config.folder, record)

    def _tidy(self) -> list[str]:
        """Create the run's folder, or clean it up, and return the tasks that the newest checkpoint's step left undone.

        An earlier command may have been killed at any moment. It must be called in the main process.
        """
        config, folder, step = self.config, self.config.folder, self.engine.step
        folder.mkdir(parents=True, exist_ok=True)
        remove_temporary(folder)
        checkpoint.sweep(folder)
        if aside := checkpoint.set_aside(folder, step):
            set_previews_aside(folder / PREVIEWS, step, aside / PREVIEWS)
            set_snapshots_aside(folder, step, aside / AVERAGES)
            keep_metrics(folder, aside)
            self.say(f"resumes from step {step}; newer checkpoints were moved to {aside}")
        if not (folder / CONFIG_FILE).exists() or TrainConfig.read(folder) != config:
            write_json(folder / CONFIG_FILE, config.to_dict())
        record_data(config, self.dataset)
        checkpoint.end_return(folder)
        if not step:
            return []
        checkpoint.prune(folder, self._kept(), self.checkpoint_interval)
        self._keep_if_best(self.engine.progress.means)
        owed = []
        if self._due(self.preview_interval) and self.previews and not self.previews.path(step).exists():
            owed.append("previews")
        if self._due(config.average_every) and step not in snapshot_steps(folder):
            owed.append("averages")
        if self._due(config.eval_every):
            numbers = evaluated(folder, step)
            if numbers is None:
                owed.append("evaluation")
            else:
                checkpoint.keep_if_best(folder, Record(*distance_of(numbers), step))
        return owed

    def _open_journal(self) -> Journal:
        config, engine = self.config, self.engine

        def open_trackers() -> Trackers:
            return Trackers(config.folder, config.trackers, config.to_dict(), engine.step)

        return Journal(
            config,
            self.accelerator,
            on_main(self.accelerator, open_trackers),
            engine.guard,
            step=engine.step,
            total_steps=self.total_steps,
            progress=engine.progress,
        )

    def _settle(self, journal: Journal, owed: list[str]) -> None:
        """Do the tasks that the step of the checkpoint, from which the run resumes, left undone."""
        if "previews" in owed:
            self._plot_previews(journal)
        if "evaluation" in owed:
            self._evaluate(journal)
        if "averages" in owed:
            self._save_averages()

    def _may_stop(self) -> bool:
        """Whether the run may stop at this step: processes must agree, and each agreement costs a synchronisation."""
        return self.accelerator.num_processes == 1 or self.engine.step % self.config.log_steps == 0

    def _plot_previews(self, journal: Journal) -> None:
        average = self.engine.whole_average()

        def draw() -> None:
            assert self.previews is not None and journal.trackers is not None
            card = self.engine.stamped_card()
            grid = self.previews.plot(average, card, self.accelerator.device)
            say(f"step {card.step:,}: plotted {self.previews.path(card.step)}")
            journal.trackers.image(self.engine.step, "samples", grid)

        on_main(self.accelerator, draw)

    def _evaluate(self, journal: Journal) -> None:
        """Evaluate the moving average, and keep the checkpoint of this step if none before was better."""
        folder, average = self.config.folder, self.engine.whole_average()
        state = None
        if not told_by_main(self.accelerator, lambda: self.engine.step in checkpoint.saved_steps(folder)):
            state = replace(self.engine.state(), progress=journal.progress({}))

        def write() -> None:
            assert self.evaluation is not None and journal.trackers is not None
            numbers = self.evaluation.run(average, self.engine.stamped_card())
            journal.trackers.log(self.engine.step, {f"{EVALUATED}{name}": value for name, value in numbers.items()})
            record = Record(*distance_of(numbers), self.engine.step)
            is_best = checkpoint.is_best(folder, record)
            found = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            say(f"step {self.engine.step:,}: evaluated, {found}{'; the best so far' if is_best else ''}")
            if is_best and state is not None:
                self._write_checkpoint(state)
            if is_best:
                checkpoint.keep_if_best(folder, record)

        on_main(self.accelerator, write)

    def _save_averages(self) -> None:
        """Save a snapshot of the averages of power-function profile, for `stablevm average`."""
        averages = self.engine.averages_state()

        def write() -> None:
            folder = save_snapshot(self.config.folder, self.engine.stamped_card(), averages)
            say(f"step {self.engine.step:,}: saved {folder}")

        on_main(self.accelerator, write)

    def _encoders(self) -> list[Encoder]:
        if not self.config.use_proj_loss:
            return []
        grid_size = model_config(self.config, self.dataset).grid_size
        dtype = DTYPES[self.accelerator.mixed_precision]
        return load_encoders(self.config, self.dataset, grid_size, self.accelerator.device, dtype)

    def _previews(self) -> Previews:
        """The previews; only the main process makes them, so only it loads the autoencoder."""
        return Previews(self.config.folder / PREVIEWS, self._autoencoder(), self.config.seed)

    def _evaluation(self) -> Evaluation:
        """The evaluation; like the previews, only in the main process."""
        return Evaluation(self.config, self._autoencoder(), self.accelerator.device)

    def _autoencoder(self) -> Autoencoder:
        return load_autoencoder(self.dataset.latent, name=self.config.vae, device=self.accelerator.device)

    def _close(self) -> None:
        """Tell where the files of the run lie."""
        if self.accelerator.is_main_process:
            grid = self.previews.path(self.engine.step) if self.previews else None
            say_rows(closing(self.config, self.engine.step, grid))

    def say(self, line: str) -> None:
        """Tell the user, from the main process."""
        if self.accelerator.is_main_process:
            say(line)
