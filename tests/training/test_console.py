"""What a run says, and when it saves: a new user reads it from the first line to the last, and pastes the last."""

import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stablevm import cli
from stablevm.training import console
from stablevm.training.checkpoint import saved_steps
from stablevm.training.config import TrainConfig
from stablevm.training.console import Meter
from stablevm.training.summary import _saves
from tests.helpers import runs

PLAIN = TrainConfig(exp_name="run", data_dir=Path("data"))


@pytest.mark.parametrize(
    "total, checkpoints, grids",
    [
        (400_000, 50_000, 10_000), (250_000, 50_000, 10_000), (249_999, 25_000, 10_000),
        (150_000, 12_500, 10_000), (110_000, 10_000, 10_000), (60_000, 5_000, 10_000), (49_999, 5_000, 5_000),
        (15_000, 1_500, 1_250), (1_641, 160, 160), (99, 10, 10), (60, 6, 6), (6, 1, 1),
    ],
)  # fmt: skip
def test_short_runs_save_about_every_tenth_and_long_ones_as_published(total, checkpoints, grids):
    assert (PLAIN.checkpoint_interval(total), PLAIN.preview_interval(total)) == (checkpoints, grids)
    given = replace(PLAIN, checkpointing_steps=7, sampling_steps=0)
    assert (given.checkpoint_interval(total), given.preview_interval(total)) == (7, 0)


@pytest.mark.parametrize("log_steps", [1, 7, 10, 1_000, 20_000])
@pytest.mark.parametrize("total", [50_000, 99_999, 130_000, 249_999])
def test_each_published_step_has_a_checkpoint(total, log_steps):
    interval = replace(PLAIN, log_steps=log_steps).checkpoint_interval(total)
    assert 50_000 % interval == 0 and interval <= -(-total // 10)
    assert interval % log_steps == 0 or log_steps in (7, 20_000)


@pytest.mark.parametrize(
    "options, total, kept",
    [
        ({}, 400_000, "50,000 steps"),
        ({}, 150_000, "12,500 steps, keeping the newest 2 and each at a multiple of 50,000"),
        ({}, 1_000, "100 steps, keeping the newest 2"),
        ({"checkpoints_kept": 3}, 1_000, "100 steps, keeping the newest 3"),
        ({"checkpointing_steps": 50}, 1_000, "50 steps"),
    ],
)
def test_a_run_says_which_checkpoints_stay(options, total, kept):
    assert next(_saves(replace(PLAIN, **options), total)) == f"checkpoint every {kept}"


def test_of_checkpoints_that_were_not_requested_the_newest_two_stay(root):
    """And those that an earlier command left, which may have been its result."""
    settings = runs.config(root, "short", max_train_steps=12, checkpointing_steps=None)
    folder = runs.run(settings)
    assert saved_steps(folder) == [10, 12]
    runs.run(replace(settings, max_train_steps=24))
    assert saved_steps(folder) == [10, 12, 21, 24]
    kept = runs.config(root, "kept", max_train_steps=12, checkpointing_steps=None, checkpoints_kept=4)
    assert saved_steps(runs.run(kept)) == [6, 8, 10, 12]


def said(capsys):
    return capsys.readouterr().out.splitlines()


def test_a_run_says_what_it_is_how_far_it_is_and_what_comes_next(root, capsys, monkeypatch):
    options = {"loss_type": "stablevm", "batch_size": 5, "max_train_steps": 4, "log_steps": 2, "epochs": 7}
    settings = runs.config(root, "told", sampling_steps=4, checkpointing_steps=2, **options, **runs.ALIGNED)
    folder = runs.run(settings)
    lines = said(capsys)
    rows = dict(line.split(maxsplit=1) for line in lines)
    assert rows["run"] == f"{folder}, from scratch" and re.match(
        r"cpu \(\d+ threads?\), float32, 1 process$", rows["device"]
    )
    assert rows["data"] == f"{root / 'data'}: 40 samples in 3 classes, 1 x 8 x 8 pixels"
    assert re.match(r"SiT-XXS/2, 0\.\d million parameters", rows["network"])
    assert rows["objective"].startswith("stablevm. StableVM (Yang et al., 2026)")
    assert rows["bank"].startswith("3 classes x 8 samples, one of each at first, 0.01 MB in the host's memory")
    assert rows["loss"] == "velocity_loss + 0.5 alignment_loss"
    assert rows["alignment"] == "block 1 with digits (REPA); weight hard around t = 0.7"
    assert rows["steps"] == (
        "4 of 5 samples, 0.5 passes over the data: --max-train-steps ends the run, before the 56 steps of --epochs 7"
    )
    assert rows["saves"] == "checkpoint every 2 steps; samples every 4; metrics every 2"
    number = r"-?\d+\.\d{4}"
    step = rf"step 4 of 4: velocity_loss {number}, alignment_loss {number}, [\d.,]+ images/s, 0:00:00 left"
    assert any(re.fullmatch(step, line) for line in lines)
    assert f"step 2: saved {folder / 'checkpoints' / '0000002'}" in lines
    for label in ("checkpoint", "samples", "metrics"):
        assert Path(rows[label]).exists()
    words = shlex.split(rows["next"])
    assert words[:2] == ["stablevm", "generate"]
    monkeypatch.chdir(root)
    assert cli.generate([*words[2:], "--num-steps", "2"]) == 0 and (root / "samples" / "told.png").is_file()
    capsys.readouterr()
    runs.run(replace(settings, max_train_steps=400, epochs=1))
    rows = dict(line.split(maxsplit=1) for line in said(capsys))
    assert rows["run"] == f"{folder}, resumes from step 4"
    assert rows["steps"].endswith("--epochs 1 ends the run, before --max-train-steps 400")


def test_a_bar_on_a_terminal_and_lines_in_a_file(capsys, monkeypatch):
    for terminal in (False, True):
        monkeypatch.setattr(console, "on_terminal", lambda: terminal)  # noqa: B023
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)  # noqa: B023
        meter = Meter("run", step=10, total_steps=30, show=True)
        meter.advance()
        meter.report(11, {"velocity_loss": 0.5}, 1234.5)
        meter.close()
        out, err = capsys.readouterr()
        assert (out == "step 11 of 30: velocity_loss 0.5000, 1,234 images/s, 0:00:00 left\n") is not terminal
        assert ("11/30" in err) is terminal


def test_other_processes_than_the_main_one_are_silent(capsys, monkeypatch):
    for terminal in (False, True):
        monkeypatch.setattr(console, "on_terminal", lambda: terminal)  # noqa: B023
        meter = Meter("run", step=0, total_steps=3, show=False)
        meter.report(1, {"velocity_loss": 0.5}, 12.0)
        meter.close()
    assert capsys.readouterr() == ("", "")
