"""Where a run begins: at step 0, or at a checkpoint of an earlier command that is whole."""

import sys
from pathlib import Path

from stablevm.errors import UserError
from stablevm.locks import is_foreign
from stablevm.training.checkpoint import checkpoint_folder, damage, existing_folder, saved_steps
from stablevm.training.config import CONFIG_FILE, TrainConfig


def find_start(config: TrainConfig, *, show: bool, before: int | None = None) -> int:
    """The step to go on from, 0 to begin; if `before` is given, one before that step, which has proved damaged.

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
