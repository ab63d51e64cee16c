"""What an earlier version wrote still works: its data, its runs, its checkpoints, its public names."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

import stablevm
from stablevm import cli
from tests.helpers.runs import ALIGNED, config, losses, run

VERSIONS = sorted(folder for folder in (Path(__file__).parents[1] / "earlier").iterdir() if folder.is_dir())


@pytest.fixture(params=VERSIONS, ids=lambda folder: folder.name)
def earlier(request, tmp_path, monkeypatch):
    """A copy of the files that the version wrote, as the current folder."""
    shutil.copytree(request.param, tmp_path / "earlier")
    monkeypatch.chdir(tmp_path / "earlier")
    return Path()


def test_a_run_resumes_to_the_same_losses(earlier):
    """StableVM with a bank and alignment, from step 2 of 4: weights, optimiser, bank, data position."""
    shutil.copytree("run", "exps/run")
    options = {"loss_type": "stablevm", "prefill_bank_fully": True, "bank_capacity_per_class": 4, **ALIGNED}
    run(config(earlier, "run", max_train_steps=4, checkpointing_steps=2, resume=True, **options))
    assert losses(Path("exps/run")) == pytest.approx(json.loads(Path("losses.json").read_text()), rel=1e-4)


def test_a_checkpoint_gives_the_same_images(earlier):
    options = [
        "--num-fid-samples=6",
        "--mode=ode",
        "--num-steps=8",
        "--cfg-scale=1.5",
        "--name=again",
        "--sample-dir=.",
    ]
    assert cli.generate(["--ckpt=run/checkpoints/0000002", *options]) == 0
    before, after = (np.load(name)["arr_0"].astype(int) for name in ("images.npz", "again.npz"))
    assert before.shape == after.shape and np.abs(before - after).max() <= 1


def test_a_data_set_is_intact(earlier, capsys):
    assert cli.data(["verify", "data"]) == 0, capsys.readouterr()


def test_public_names_are_there(earlier):
    """A name that moved may warn, for one minor version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for name in json.loads(Path("public_names.json").read_text()):
            assert getattr(stablevm, name) is not None, name
