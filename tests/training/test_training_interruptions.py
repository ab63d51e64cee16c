"""Runs that are killed or interrupted, and then run again, end like uninterrupted ones."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stablevm import cli
from stablevm.support.files import replacing
from tests.helpers import runs

ROOT = Path(__file__).parents[2]


def start(settings, launch=(sys.executable,)):
    return subprocess.Popen(
        [*launch, ROOT / "train.py", *runs.as_arguments(settings)],
        env=runs.ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_for_rows(settings, rows, process, seconds=180):
    metrics, deadline = settings.folder / "metrics.jsonl", time.monotonic() + seconds
    while not metrics.exists() or len(metrics.read_text().splitlines()) < rows:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


LONG = {"max_train_steps": 400, "checkpointing_steps": 20, "loss_type": "stablevm"}


@pytest.fixture(scope="module")
def uninterrupted(root):
    return runs.run(runs.config(root, "calm", **LONG))


def assert_nothing_shows(folder, uninterrupted):
    """Each step is in the metrics once, with the uninterrupted run's loss; and so is its last checkpoint."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, LONG["max_train_steps"] + 1))
    assert [row["loss"] for row in rows] == pytest.approx(runs.losses(uninterrupted), abs=1e-6)


def newest_step(folder):
    return max(int(path.name) for path in (folder / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=["kill", "term", "ctrl-c"])
def test_killed_and_run_again(number, root, uninterrupted):
    settings = runs.config(root, f"killed-{number}", **LONG)
    process = start(settings)
    wait_for_rows(settings, 45, process)
    process.send_signal(number)
    status = process.wait(60)
    if number == signal.SIGKILL:
        assert status == -signal.SIGKILL
    else:
        assert status == 128 + number
        assert len(runs.losses(settings.folder)) == newest_step(settings.folder) < 400, "the last step is saved"
    assert start(settings).wait(120) == 0
    assert_nothing_shows(settings.folder, uninterrupted)
    runs.assert_same_checkpoint(settings.folder, uninterrupted, step=400)


@pytest.mark.slow
def test_two_processes_stop_together_and_one_resumes(root, uninterrupted):
    settings = runs.config(root, "two-stopped", **LONG)
    process = start(settings, runs.TWO_PROCESSES)
    wait_for_rows(settings, 25, process)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on to both
    assert process.wait(60) != 0
    assert len(runs.losses(settings.folder)) == newest_step(settings.folder) < 400, "the last step is saved"
    runs.run(settings)
    rows = runs.losses(settings.folder)
    assert len(rows) == 400 and rows[:60] == pytest.approx(runs.losses(uninterrupted)[:60], abs=1e-5)


def test_killed_before_its_first_file_was_whole(root):
    undisturbed = runs.losses(runs.run(runs.config(root, "undisturbed")))
    settings = runs.config(root, "newborn")
    settings.folder.mkdir(parents=True)
    with replacing(settings.folder / "config.json") as temporary:
        temporary.write_text("{")
    (settings.folder / "config.json").rename(temporary)  # as if killed before the name was final
    assert runs.losses(runs.run(settings)) == undisturbed


def test_resume_needs_no_other_option(root, capsys):
    folder = runs.run(runs.config(root, "brief"))
    place = [f"--output-dir={root / 'exps'}", "--exp-name=brief"]
    assert cli.train([*place, "--resume", "--max_train_steps=8"]) == 0
    assert len(runs.losses(folder)) == 8
    assert cli.train([*place, "--resume", "--batch-size=4"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--batch-size 8" in error and "--batch-size 4" in error
    assert cli.train([*place, "--resume", "--resume-step=5"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --resume-step 5: ") and error.endswith("there are: 6, 8")
