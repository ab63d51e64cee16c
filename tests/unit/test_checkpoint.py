"""Checkpoint folders: complete or absent, the newest ones kept, damage named."""

from dataclasses import replace

import pytest
import torch
from checkpoints import random_weights, tiny_card
from data_sets import kill_at_rename, one_line

from stablevm.errors import UserError
from stablevm.training import checkpoint
from stablevm.training.checkpoint import TrainingState

FILES = ["bank.safetensors", "ema.safetensors", "model.json", "model.safetensors", "optimizer.safetensors",
         "training.json"]  # fmt: skip


@pytest.fixture(scope="module")
def state():
    card = tiny_card()
    model = random_weights(card, 1)
    return TrainingState(
        card=card,
        model=model,
        ema=random_weights(card, 2),
        optimizer={f"{name}.exp_avg": value + 1 for name, value in model.items()},
        bank={"entries": torch.arange(6.0).reshape(2, 3), "ids": torch.arange(2)},
        scaler={"scale": 1024.0, "_growth_tracker": 7},
    )


def at(state, step):
    return replace(state, card=replace(state.card, step=step))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_everything_comes_back(state, tmp_path):
    folder = checkpoint.save(tmp_path, state)
    assert folder == tmp_path / "checkpoints" / "0000120" and names(folder) == FILES
    found = checkpoint.load(tmp_path, 120)
    assert found.card == state.card and found.scaler == state.scaler
    for part in ("model", "ema", "optimizer", "bank"):
        assert equal(getattr(found, part), getattr(state, part)), part


def test_without_a_bank_there_is_no_file_of_it(state, tmp_path):
    folder = checkpoint.save(tmp_path, replace(state, bank={}, scaler={}))
    assert "bank.safetensors" not in names(folder)
    assert checkpoint.load(tmp_path, 120).bank == checkpoint.load(tmp_path, 120).scaler == {}


@pytest.mark.parametrize("renamed", range(len(FILES) + 1))
def test_an_exception_anywhere_leaves_no_folder(renamed, state, tmp_path):
    """Each file is renamed to its place, and at last the folder."""
    checkpoint.save(tmp_path, at(state, 100))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_at_rename(patch, renamed)
        checkpoint.save(tmp_path, at(state, 200), keep=1)
    assert names(tmp_path / "checkpoints") == ["0000100"]
    assert equal(checkpoint.load(tmp_path, 100).model, state.model)


def test_what_a_kill_left_behind_is_swept(state, tmp_path):
    """A killed process runs no clean-up: its folder keeps the name that `save` gave it."""
    leftover = tmp_path / "checkpoints" / ".unfinished-0000100-77-abcd"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    assert checkpoint.saved_steps(tmp_path) == []
    checkpoint.save(tmp_path, state)
    assert names(tmp_path / "checkpoints") == ["0000120"]


def test_the_newest_are_kept(state, tmp_path):
    for step in (9, 90, 1_000, 10_000_000):
        checkpoint.save(tmp_path, at(state, step), keep=2)
    assert checkpoint.saved_steps(tmp_path) == [1_000, 10_000_000], "ordered as numbers, not as text"
    checkpoint.save(tmp_path, at(state, 10_000_001), keep=0)
    assert checkpoint.saved_steps(tmp_path) == [1_000, 10_000_000, 10_000_001]


def test_a_step_reached_again_replaces_its_folder(state, tmp_path):
    checkpoint.save(tmp_path, state)
    checkpoint.save(tmp_path, replace(state, model=state.ema, bank={}))
    found = checkpoint.load(tmp_path, 120)
    assert equal(found.model, state.ema) and found.bank == {}
    assert names(tmp_path / "checkpoints") == ["0000120"]


def test_no_run_has_no_steps(tmp_path):
    assert checkpoint.saved_steps(tmp_path / "nowhere") == []


def test_other_names_are_no_steps(state, tmp_path):
    checkpoint.save(tmp_path, state)
    (tmp_path / "checkpoints" / "best").mkdir()
    assert checkpoint.saved_steps(tmp_path) == [120]


def test_a_missing_step_is_named_with_those_that_exist(state, tmp_path):
    with pytest.raises(UserError) as error:
        checkpoint.load(tmp_path, 7)
    assert one_line(error).startswith("--resume-step 7") and one_line(error).endswith("there are: none")
    for step in (100, 200):
        checkpoint.save(tmp_path, at(state, step))
    with pytest.raises(UserError, match="there are: 100, 200"):
        checkpoint.load(tmp_path, 7)


@pytest.mark.parametrize("file", FILES)
def test_the_damaged_file_is_named(file, state, tmp_path):
    path = checkpoint.save(tmp_path, state) / file
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError) as error:
        checkpoint.load(tmp_path, 120)
    assert file in one_line(error)


@pytest.mark.parametrize("file", [file for file in FILES if file != "bank.safetensors"])
def test_the_missing_file_is_named(file, state, tmp_path):
    (checkpoint.save(tmp_path, state) / file).unlink()
    with pytest.raises(UserError) as error:
        checkpoint.load(tmp_path, 120)
    assert file in one_line(error)
