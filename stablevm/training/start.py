"""The start of a run: its data, and whether it begins at step 0 or at a checkpoint of an earlier command."""

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
    """The options, with those that a run started by version 0.1 must keep, because it had no choice."""
    path = config.folder / CONFIG_FILE
    if not path.exists():
        return config
    run, known = TrainConfig.read(config.folder), read_object(path, "run")
    return replace(config, **{name: getattr(run, name) for name in BEFORE if name not in known})


def find_start(config: TrainConfig, *, show: bool, before: int | None = None) -> int:
    """The step to resume from, or 0 to start; if `before` is given, an earlier one, because that one is damaged.

    If the newest checkpoint is damaged, a warning names it (if `show`), and the one before is used. UserError if the
    folder holds another run, if the requested checkpoint is damaged, or if no checkpoint is intact.
    """
    steps = saved_steps(config.folder)
    saved = config.folder / CONFIG_FILE
    if saved.exists():
        earlier = TrainConfig.read(config.folder)
        config.check_continues(earlier)
        if steps and config.resume_step and config.resume_step == earlier.resume_step:
            return _after_return(config, steps, show)
    elif config.folder.exists() and any(map(is_foreign, config.folder.iterdir())):
        raise UserError(f"{config.folder} holds files but not a run (no {CONFIG_FILE}); give another --exp-name")
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
        f"{run}: no checkpoint is intact ({'; '.join(faults)}); restore one from a copy, or give another --exp-name"
    )


def open_data(config: TrainConfig) -> PreparedDataset:
    """Open the data set and check it against the options."""
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
    dataset = MirroredDataset(dataset) if config.horizontal_flips else dataset
    check_warmup(config, config.total_steps(len(dataset)))
    return dataset


def check_warmup(config: TrainConfig, total_steps: int) -> None:
    """UserError for a rate that is still rising when the run ends, or that a cosine has no step to lower again."""
    falls = config.lr_schedule == "cosine"
    most = total_steps - falls
    if config.lr_warmup_steps > most:
        cosine = ", as --lr-schedule cosine needs a step after them" if falls else ""
        raise UserError(
            f"--lr-warmup-steps {config.lr_warmup_steps}: the run has {total_steps:,} steps (--max-train-steps, "
            f"--epochs); give at most {most}{cosine}"
        )


def short_run_warnings(config: TrainConfig, total_steps: int) -> list[str]:
    """A warning for an option that would have an effect only in a longer run."""
    if config.use_proj_loss and config.proj_stop_step >= total_steps:
        stop = as_typed("proj_stop_step", config.proj_stop_step)
        return [f"{stop} has no effect in a run of {total_steps:,} steps (--max-train-steps, --epochs)"]
    return []


def class_names(config: TrainConfig, dataset: PreparedDataset) -> tuple[str, ...]:
    """The names of all classes of the network; classes beyond those of the data set have their number as name."""
    extra = range(dataset.num_classes, config.num_classes or dataset.num_classes)
    return (*dataset.class_names, *map(str, extra))


def class_counts(config: TrainConfig, dataset: PreparedDataset) -> tuple[int, ...]:
    """The number of samples of each class of the network, in the whole data set."""
    counts = torch.bincount(dataset.labels(), minlength=config.num_classes or dataset.num_classes)
    return tuple(counts.tolist())


def empty_classes_warning(config: TrainConfig, dataset: PreparedDataset) -> list[str]:
    """A warning if the network has classes without samples in the data; for StableVM `prefill` raises an error."""
    counts, names = class_counts(config, dataset), class_names(config, dataset)
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if not empty:
        return []
    return [
        f"--data-dir {config.data_dir} has no sample of {len(empty):,} of {len(counts):,} classes ({some_of(empty)}): "
        "the network learns nothing about them"
    ]


def check_data(config: TrainConfig, dataset: PreparedDataset, start: int) -> list[str]:
    """Check that a run which resumes at step `start` has the data it started with, and return warnings.

    UserError, which says what differs, if the data is different, because the bank and the order of samples refer to
    rows, which would be other images. A warning is returned if the content of the data was not recorded.
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
            f"{as_typed('data_dir', str(config.data_dir))}: give the run's, or another --exp-name"
        )
    return [f"{config.folder} was started by an earlier version: that {config.data_dir} is unchanged can't be checked"]


def changes(config: TrainConfig, start: int) -> list[str]:
    """Lines to tell of: what the run that resumes at step `start` will do in another way than it has so far."""
    if not start:
        return []
    earlier = TrainConfig.read(config.folder)
    before, now = (as_typed("proj_stop_step", each.proj_stop_step) for each in (earlier, config))
    return [f"{now} from step {start} on, instead of {before}"] if before != now else []


def thinned_after(config: TrainConfig, start: int, recorded: int | None) -> int:
    """The step up to which a run that resumes at step `start` removes no checkpoints: those of earlier commands that
    had other plans, and so may be their results. recorded: the same of the command that wrote the checkpoint.
    """
    names = ("max_train_steps", "epochs", "checkpointing_steps", "checkpoints_kept", "log_steps")
    earlier, now = ([getattr(each, name) for name in names] for each in (TrainConfig.read(config.folder), config))
    return start if recorded is None or earlier != now else recorded


def check_bank(config: TrainConfig, dataset: PreparedDataset, bank: ClassBank) -> None:
    """Raise UserError if the bank of a checkpoint refers to rows that the data does not have."""
    if int(bank.ids.max()) >= len(dataset):
        raise UserError(
            f"--data-dir {config.data_dir}: has {len(dataset):,} rows, but the bank of the run in {config.folder} has "
            f"row {int(bank.ids.max()):,}; give the data that the run started with, or another --exp-name"
        )


def record_data(config: TrainConfig, dataset: PreparedDataset) -> None:
    """Record the fingerprint of the run's data, if that has not been done."""
    if not (config.folder / DATA_FILE).exists() or not saved_steps(config.folder):
        write_json(config.folder / DATA_FILE, asdict(dataset.fingerprint(with_images=config.use_proj_loss)))
