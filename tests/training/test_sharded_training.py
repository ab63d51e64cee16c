"""FSDP: the same losses, and checkpoints from which any number of processes can resume."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stablevm import cli
from stablevm.training.average import snapshot_steps
from tests.helpers import runs

ROOT = Path(__file__).parents[2]
OPTIONS = {"loss_type": "stablevm", "prefill_bank_fully": True, "sampling_steps": 6, "average_every": 6}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    runs.write_data(folder / "data")
    return folder


def launch(settings):
    done = subprocess.run(
        [*runs.TWO_PROCESSES, "-m", "tests.helpers.sharded", *runs.as_arguments(settings)],
        cwd=ROOT, env=runs.ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-9000:]


@pytest.mark.slow
def test_shards_change_nothing(root):
    whole = runs.run(runs.config(root, "whole", checkpointing_steps=3, **OPTIONS))
    settings = runs.config(root, "sharded", checkpointing_steps=3, **OPTIONS)
    launch(replace(settings, max_train_steps=3))
    launch(settings)
    assert runs.losses(settings.folder) == pytest.approx(runs.losses(whole), abs=1e-5)
    mine, theirs = runs.saved(settings.folder, 6), runs.saved(whole, 6)
    assert mine.keys() == theirs.keys()
    for part in ("model", "ema", "optimizer", "average-0.05", "average-0.1"):
        assert mine[part].keys() == theirs[part].keys()
        assert all(torch.allclose(mine[part][name], theirs[part][name], atol=1e-4) for name in mine[part]), part
    assert (settings.folder / "samples" / "step-0000006.png").exists()
    assert snapshot_steps(settings.folder) == [3, 6] and snapshot_steps(whole) == [6]
    runs.run(replace(settings, max_train_steps=8))
    assert len(runs.losses(settings.folder)) == 8, "and one process goes on alone"


def test_sharding_that_accelerate_would_leave_out(root, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    runs.AcceleratorState._reset_state(True)
    assert cli.train(runs.as_arguments(runs.config(root, "refused"))) == 2
    assert capsys.readouterr().err.startswith("error: FSDP: accelerate shards only over several GPUs")
