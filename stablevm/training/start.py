"""Where a run starts: on which data, and from scratch or from a checkpoint of an earlier command."""

from dataclasses import asdict, replace
from pathlib import Path

import torch

from stablevm.bank import ClassBank
from stablevm.data.dataset import Fingerprint, PreparedDataset
from stablevm.data.mirrored import MirroredDataset
from stablevm.data.opening import open_dataset
from stablevm.support.cards import read_card, read_object
from stablevm.support.errors import UserError
from stablevm.support.files import write_json
from stablevm.support.locks import is_foreign
from stablevm.support.options import as_typed, some_of
from stablevm.training.checkpoint import checkpoint_folder, damage, existing_folder, saved_steps
from stablevm.training.config import BEFORE, CONFIG_FILE, TrainConfig
from stablevm.training.console import say, warn

DATA_FILE = "data.json"


def as_started(config: TrainConfig) -> TrainConfig:
    """The options, with those of a run that version 0.1 started where it had no choice: the run keeps them."""
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
            return _after_return(config, steps, show)
    elif config.folder.exists() and any(map(is_foreign, config.folder.iterdir())):
        raise UserError(f"{config.folder} holds files but no run (no {CONFIG_FILE}); give another --exp-name")
    if config.resume_step:
        return _asked_for(config, steps)
    if not steps and config.resume:
        raise UserError(f"--resume: {config.folder} has no checkpoint; leave the option out to start a run")
    if before is not None:
        steps = [step for step in steps if step < before]
    return _newest_whole(config.folder, steps, show) if steps else 0


def _after_return(config: TrainConfig, steps: list[int], show: bool) -> int:
    """Where the same command, run once more, resumes: it has gone back already, and what came of that stays."""
    step = _newest_whole(config.folder, steps, show)
    if show and step != config.resume_step:
        say(
            f"went back to step {config.resume_step} before; resumes from step {step} (to go back once more, first "
            "run the command without --resume-step)"
        )
    return step


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
            warn(f"checkpoint {folder}: {fault}; trying the one before")
    raise UserError(
        f"{run}: no checkpoint is whole ({'; '.join(faults)}); restore one from a copy, or give another --exp-name"
    )


def open_data(config: TrainConfig) -> PreparedDataset:
    """The data set, checked against the options."""
    dataset = open_dataset(config.data_dir)
    if config.resolution not in (None, dataset.resolution):
        raise UserError(f"--resolution {config.resolution}: {config.data_dir} holds images of {dataset.resolution}")
    if config.num_classes is not None and config.num_classes < dataset.num_classes:
        raise UserError(
            f"--num-classes {config.num_classes}: {config.data_dir} has {dataset.num_classes} classes; "
            "give at least as many"
        )
    if config.use_proj_loss:
        dataset.check_images()
    return MirroredDataset(dataset) if config.horizontal_flips else dataset


def class_names(config: TrainConfig, dataset: PreparedDataset) -> tuple[str, ...]:
    """Names of all classes that the network knows; those beyond the data set's are called by their number."""
    extra = range(dataset.num_classes, config.num_classes or dataset.num_classes)
    return (*dataset.class_names, *map(str, extra))


def class_counts(config: TrainConfig, dataset: PreparedDataset) -> tuple[int, ...]:
    """Samples of each class that the network knows, in the whole data set."""
    counts = torch.bincount(dataset.labels(), minlength=config.num_classes or dataset.num_classes)
    return tuple(counts.tolist())


def empty_classes_warning(config: TrainConfig, dataset: PreparedDataset) -> list[str]:
    """One line where the network knows classes that the data has no sample of (StableVM refuses those: `prefill`)."""
    counts, names = class_counts(config, dataset), class_names(config, dataset)
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if not empty:
        return []
    return [
        f"--data-dir {config.data_dir} has no sample of {len(empty):,} of {len(counts):,} classes ({some_of(empty)}): "
        "the network learns nothing of them"
    ]


def check_data(config: TrainConfig, dataset: PreparedDataset, start: int) -> list[str]:
    """Lines to tell of, where the run that resumes at step `start` does not know its data by their content.

    UserError, saying what differs, where they are not the data that the run started with: the bank and the order of
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
                "those that it started with, wherever they are now, or another --exp-name"
            )
        return []
    earlier = TrainConfig.read(config.folder).data_dir
    if earlier.resolve() != config.data_dir.resolve():
        raise UserError(
            f"{config.folder} holds a run with {as_typed('data_dir', str(earlier))}, this command says "
            f"{as_typed('data_dir', str(config.data_dir))}: give that, or another --exp-name"
        )
    return [f"{config.folder} was started by an earlier version: that {config.data_dir} is unchanged can't be checked"]


def check_bank(config: TrainConfig, dataset: PreparedDataset, bank: ClassBank) -> None:
    """UserError for a bank of a checkpoint that names rows which the data do not have."""
    if int(bank.ids.max()) >= len(dataset):
        raise UserError(
            f"--data-dir {config.data_dir}: has {len(dataset):,} rows, the bank of the run in {config.folder} names "
            f"row {int(bank.ids.max()):,}; give the data that the run started with, or another --exp-name"
        )


def record_data(config: TrainConfig, dataset: PreparedDataset) -> None:
    """Write down what the run's data hold, if that is not there yet."""
    if not (config.folder / DATA_FILE).exists() or not saved_steps(config.folder):
        write_json(config.folder / DATA_FILE, asdict(dataset.fingerprint(with_images=config.use_proj_loss)))
