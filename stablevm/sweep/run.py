"""The command `stablevm sweep`: each combination is evaluated once and kept, then all are compared."""

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from stablevm.evaluation.config import EvaluateCheckpointConfig, MetricOptions
from stablevm.evaluation.evaluate import evaluate_checkpoint
from stablevm.evaluation.sources import content_sha256
from stablevm.networks.snapshot import checkpoint_in, load_card
from stablevm.sampling.config import GenerateConfig
from stablevm.sampling.provenance import decoding_notes, provenance_of, resolved
from stablevm.support.cards import read_object
from stablevm.support.errors import UserError
from stablevm.support.files import CHECKPOINTS, remove_temporary
from stablevm.support.locks import owned
from stablevm.support.options import as_typed
from stablevm.support.processes import Process
from stablevm.support.text import shown
from stablevm.sweep.config import OF_LABELS, WEIGHTS, SweepConfig, Value, described
from stablevm.sweep.results import DATA, Cell, Sweep, measures_of
from stablevm.training.average import average, averaged_folder
from stablevm.training.average_config import AverageConfig
from stablevm.training.console import duration

CELLS = "cells"  # the folder of the results of each combination
_HASH_DIGITS = 12
_POLL_SECONDS = 1.0
_REMEDY = "remove it, and run the command again"


@dataclass(frozen=True)
class Job:
    """A combination to evaluate: its values, those without effect left out; its images; the file for its results."""

    point: dict[str, Value]
    request: GenerateConfig
    file: Path


def sweep(config: SweepConfig) -> Sweep:
    """Evaluate all combinations that have no results yet, write table, JSON and figure, and return all results.

    With several processes, all share each evaluation, and the first one writes. UserError, before anything is computed,
    for options or checkpoints that don't fit.
    """
    config.validate()
    process = Process.from_environment()
    if config.guide_ckpt is not None:  # once, as a name of the hub is a question to it
        config = replace(config, guide_ckpt=checkpoint_in(config.guide_ckpt, config.guide_weights))
    jobs = list(_jobs(config, process))
    with owned(config.output_dir):
        _check_same(config)
        if process.is_first:
            remove_temporary(config.output_dir)
            _begin(config, jobs)
        known, started, made = {}, time.monotonic(), 0
        missing = sum(not job.file.exists() for job in jobs)
        for number, job in enumerate(jobs, start=1):
            if job.file.exists():
                with owned(job.file.parent, job.file.name):  # which removes the lock of a killed command
                    known[job.file] = read_object(job.file, "result", remedy=_REMEDY)
                continue
            evaluation = EvaluateCheckpointConfig(evaluation=config.evaluation(job.file), sampling=job.request)
            known[job.file] = evaluate_checkpoint(evaluation, is_part=True)
            made += 1
            if process.is_first:
                seconds = time.monotonic() - started
                _tell(config, job, known[job.file], f"{number} of {len(jobs)}", seconds / made * (missing - made))
        cells = [Cell(job.point, known[job.file]) for job in jobs]
        found = Sweep(str(config.ckpt), config.num_fid_samples, cells)
        if process.is_first:
            found.write(config.output_dir)
        return found


def _check_same(config: SweepConfig) -> None:
    """UserError where the folder holds the sweep of another checkpoint, whose table would be replaced."""
    path = config.output_dir / DATA
    if not path.exists():
        return
    swept = read_object(path, "sweep", remedy="give another --output-dir").get("checkpoint")
    if swept != str(config.ckpt):
        raise UserError(
            f"{config.output_dir}: holds the sweep of {shown(swept, quoted=False)}, not of {config.ckpt}; give another "
            "--output-dir"
        )


def _begin(config: SweepConfig, jobs: Sequence[Job]) -> None:
    card = load_card(jobs[0].request.ckpt)
    for line in config.warnings() + decoding_notes(config.vae, card.latent):
        print(f"warning: {line}", file=sys.stderr)
    done, count = sum(job.file.exists() for job in jobs), len(jobs)
    several = f"{count} combinations" if count > 1 else "1 combination"
    print(f"{config.output_dir}: {several} of {config.num_fid_samples:,} samples, {done} finished")


def _tell(config: SweepConfig, job: Job, results: dict[str, Any], place: str, left: float) -> None:
    """A line about a combination that is finished."""
    name, value = next(iter(measures_of(results).items()))
    print(f"{place}: {described(job.point, config.axes)}: {name} {value:.4g}; about {duration(left)} left", flush=True)


def _jobs(config: SweepConfig, process: Process) -> Iterator[Job]:
    """The combinations in order; of those that give the same images only the first."""
    folders = {value: _weights_folder(config, value, process) for value in config.values("average")}
    evaluated = _digest({field.name: _identity(getattr(config, field.name)) for field in fields(MetricOptions)})
    seen = set()
    for point in config.points():
        request, card = resolved(config.request(point, folders[point["average"]]))
        request = request.effective()
        name = _digest({**provenance_of(request, card), "evaluation": evaluated})
        if name not in seen:
            seen.add(name)
            kept = {axis: value for axis, value in point.items() if not _is_idle(axis, point)}
            yield Job(kept, request, config.output_dir / CELLS / f"{name}.json")


def _is_idle(axis: str, point: dict[str, Value]) -> bool:
    return axis in OF_LABELS and point["cfg_scale"] == 1


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:_HASH_DIGITS]


def _identity(value: Any) -> Any:
    """A value of an option for the digest: a file or folder by its content."""
    return content_sha256(value) if isinstance(value, Path) else value


def _weights_folder(config: SweepConfig, value: Value, process: Process) -> Path:
    """The checkpoint folder with the weights that a value of `average` means; an average is made if it is missing."""
    if value in WEIGHTS:
        return checkpoint_in(config.ckpt, "model" if value == "model" else "ema")
    ckpt = checkpoint_in(config.ckpt)
    card, run = load_card(ckpt), ckpt.parent.parent
    if ckpt.parent.name != CHECKPOINTS:
        raise UserError(
            f"{as_typed('average', config.average)}: {ckpt} is not in the folder of a run, which has the snapshots "
            "that averages are made from; leave the option out"
        )
    assert isinstance(value, float)
    request = AverageConfig(run=run, width=value, step=card.step)
    if process.is_first:
        return average(request)
    folder = averaged_folder(request, card.step)
    while not (folder / "model.json").exists():
        time.sleep(_POLL_SECONDS)
    return folder
