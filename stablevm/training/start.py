"""Where a run begins: at step 0, or at a checkpoint of an earlier command that is whole."""

import sys
from dataclasses import asdict, replace
from pathlib import Path

from stablevm.bank import ClassBank
from stablevm.data.dataset import Fingerprint, PreparedDataset
from stablevm.support.cards import read_card, read_object
from stablevm.support.errors import UserError
from stablevm.support.files import write_json
from stablevm.support.locks import is_foreign
from stablevm.support.options import as_typed
from stablevm.training.checkpoint import checkpoint_folder, damage, existing_folder, saved_steps
from stablevm.training.config import BEFORE, CONFIG_FILE, TrainConfig

DATA_FILE = "data.json"


def as_begun(config: TrainConfig) -> TrainConfig:
    """The options with those that the run was begun with before there was a choice, by version 0.1: it keeps them."""
    path = config.folder / CONFIG_FILE
    if not path.exists():
        return config
    run, known = TrainConfig.read(config.folder), read_object(path, "run")
    return replace(config, **{name: getattr(run, name) for name in BEFORE if name not in known})


def find_start(config: TrainConfig, *, show: bool, before: int | None = None) -> int:
    """The step to resume from, 0 to begin; if `before` is given, one before that step, which has proved damaged.

    A damaged newest checkpoint is named in a warning, if `show`, and the one before it taken. UserError when the folder
    holds another run, when the checkpoint that was asked for is damaged, or when none is whole.
    """
    steps = saved_steps(config.folder)
    saved = config.folder / CONFIG_FILE
    if saved.exists():
        earlier = TrainConfig.read(config.folder)
        config.check_continues(earlier)
        if steps and config.resume_step and config.resume_step == earlier.resume_step:
            return _gone_on(config, steps, show)
    elif config.folder.exists() and any(map(is_foreign, config.folder.iterdir())):
        raise UserError(f"{config.folder} holds files but no run (no {CONFIG_FILE}); give another --exp-name")
    if config.resume_step:
        return _asked_for(config, steps)
    if not steps and config.resume:
        raise UserError(f"--resume: {config.folder} has no checkpoint; leave the option out to begin a run")
    if before is not None:
        steps = [step for step in steps if step < before]
    return _newest_whole(config.folder, steps, show) if steps else 0


def _gone_on(config: TrainConfig, steps: list[int], show: bool) -> int:
    """Where the same command, run once more, goes on: it has gone back already, and what came of that stays."""
    step = _newest_whole(config.folder, steps, show)
    if show and step != config.resume_step:
        print(
            f"went back to step {config.resume_step} before; going on from step {step} (to go back once more, first "
            "run the command without --resume-step)"
        )
    return step


def check_data(config: TrainConfig, dataset: PreparedDataset, start: int) -> list[str]:
    """Lines to tell of, where the run that resumes at step `start` does not know its data by their content.

    UserError, saying what differs, where they are not the data that the run began with: the bank and the order of
    samples name rows, which would be other images.
    """
    if not start:
        return []
    record = config.folder / DATA_FILE
    if record.exists():
        known = read_card(record, Fingerprint, "run", remedy="restore it from a copy")
        if difference := dataset.fingerprint(with_images=config.use_proj_loss).difference(known):
            raise UserError(
                f"--data-dir {config.data_dir}: not the data of the run in {config.folder}: {difference}; give "
                "those that it began with, wherever they are now, or another --exp-name"
            )
        return []
    earlier = TrainConfig.read(config.folder).data_dir
    if earlier.resolve() != config.data_dir.resolve():
        raise UserError(
            f"{config.folder} holds a run with {as_typed('data_dir', str(earlier))}, this command says "
            f"{as_typed('data_dir', str(config.data_dir))}: give that, or another --exp-name"
        )
    return [f"{config.folder} was begun by an earlier version: that {config.data_dir} is unchanged can't be checked"]


def check_bank(config: TrainConfig, dataset: PreparedDataset, bank: ClassBank) -> None:
    """UserError for a bank of a checkpoint that names rows which the data do not have."""
    if int(bank.ids.max()) >= len(dataset):
        raise UserError(
            f"--data-dir {config.data_dir}: has {len(dataset):,} rows, the bank of the run in {config.folder} names "
            f"row {int(bank.ids.max()):,}; give the data that the run began with, or another --exp-name"
        )


def record_data(config: TrainConfig, dataset: PreparedDataset) -> None:
    """Write down what the run's data hold, if that is not there yet."""
    if not (config.folder / DATA_FILE).exists() or not saved_steps(config.folder):
        write_json(config.folder / DATA_FILE, asdict(dataset.fingerprint(with_images=config.use_proj_loss)))


def _asked_for(config: TrainConfig, steps: list[int]) -> int:
    step = config.resume_step
    folder = existing_folder(config.folder, step)
    if fault := damage(folder):
        raise UserError(f"--resume-step {step}: {folder}: {fault}; there are: {', '.join(map(str, steps))}")
    return step


def _newest_whole(run: Path, steps: list[int], show: bool) -> int:
    faults = []
    for step in reversed(steps):
        folder = checkpoint_folder(run, step)
        fault = damage(folder)
        if fault is None:
            return step
        faults.append(f"{folder.name}: {fault}")
        if show:
            print(f"warning: checkpoint {folder}: {fault}; trying the one before", file=sys.stderr)
    raise UserError(
        f"{run}: no checkpoint is whole ({'; '.join(faults)}); restore one from a copy, or give another --exp-name"
    )
