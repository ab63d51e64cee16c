"""Checkpoint folders: complete or absent, the newest ones kept, damage named."""

import errno
import math
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from stablevm.networks import snapshot
from stablevm.support import tensor_files
from stablevm.support.errors import UserError
from stablevm.training import checkpoint
from stablevm.training.checkpoint import Record, TrainingState
from tests.helpers.checkpoints import random_weights, tiny_card
from tests.helpers.data_sets import kill_at_rename, one_line

FILES = ["SHA256SUMS", "bank.safetensors", "ema.safetensors", "model.json", "model.safetensors",
         "optimizer.safetensors", "training.json"]  # fmt: skip


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


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def fill_with_zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("harm", [truncate, flip, fill_with_zeros, Path.unlink])
@pytest.mark.parametrize("file", FILES)
def test_the_damaged_file_is_named(file, harm, state, tmp_path):
    folder = checkpoint.save(tmp_path, state)
    assert checkpoint.damage(folder) is None
    harm(folder / file)
    if file == "SHA256SUMS" and harm is flip:
        assert checkpoint.damage(folder) is not None, "a sum or a name no longer fits"
    else:
        assert checkpoint.damage(folder) == f"{file} is {'missing' if harm is Path.unlink else 'damaged'}"


def test_sums_are_the_ones_that_sha256sum_checks(state, tmp_path):
    folder = checkpoint.save(tmp_path, state)
    done = subprocess.run(
        ["sha256sum", "--strict", "--check", "SHA256SUMS"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.count(": OK") == len(FILES) - 1


def full_disk(patch, after):
    """Let the disk be full for the file of tensors number `after`, counted from 0."""
    written = []

    def save_file(tensors, path, metadata=None):
        written.append(path)
        if len(written) > after:
            Path(path).write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save(tensors, path, metadata)

    save = tensor_files.save_file
    patch.setattr(tensor_files, "save_file", save_file)


@pytest.mark.parametrize("after", range(4))
def test_a_full_disk_loses_nothing(after, state, tmp_path):
    checkpoint.save(tmp_path, at(state, 100))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError) as error:
        full_disk(patch, after)
        checkpoint.save(tmp_path, at(state, 200), keep=1)
    assert error.value.errno == errno.ENOSPC and error.value.filename.endswith(".safetensors")
    assert names(tmp_path / "checkpoints") == ["0000100"]
    assert checkpoint.damage(tmp_path / "checkpoints" / "0000100") is None


def test_newer_checkpoints_are_set_aside(state, tmp_path):
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, at(state, step))
    assert checkpoint.set_aside(tmp_path, 30) is None
    aside = checkpoint.set_aside(tmp_path, 10)
    assert aside.name == "newer-than-0000010" and names(aside) == ["0000020", "0000030"]
    assert checkpoint.saved_steps(tmp_path) == [10]
    checkpoint.end_return(tmp_path)
    checkpoint.save(tmp_path, at(replace(state, bank={}), 20))
    another = checkpoint.set_aside(tmp_path, 10)
    assert another.name == "newer-than-0000010-2" and names(another) == ["0000020"]
    assert (aside / "0000020" / "bank.safetensors").exists(), "nothing set aside is replaced"


def test_the_best_of_a_course_that_is_left_goes_with_it(state, tmp_path):
    for step, value in ((10, 0.5), (20, 0.4)):
        checkpoint.save(tmp_path, at(state, step))
        checkpoint.keep_if_best(tmp_path, Record("loss", value, step))
    aside = checkpoint.set_aside(tmp_path, 10)
    assert names(aside) == ["0000020", "best"] and checkpoint.best_record(tmp_path) is None
    checkpoint.end_return(tmp_path)
    assert checkpoint.keep_if_best(tmp_path, Record("loss", 0.5, 10))
    checkpoint.save(tmp_path, at(state, 20))
    assert names(checkpoint.set_aside(tmp_path, 10)) == ["0000020"]
    assert checkpoint.best_record(tmp_path) == Record("loss", 0.5, 10), "one of a step before the return stays"


def test_checkpoints_between_the_intervals_take_no_place(state, tmp_path):
    kept = []
    for step in (10, 15, 20, 25, 30, 37):
        checkpoint.save(tmp_path, at(state, step), keep=2, every=10)
        kept.append(checkpoint.saved_steps(tmp_path))
    assert kept == [[10], [10, 15], [10, 20], [20, 25], [20, 30], [30, 37]]
    checkpoint.save(tmp_path, at(state, 42), keep=3, every=7)
    assert checkpoint.saved_steps(tmp_path) == [30, 37, 42], "with another interval those of the old one are no fewer"


@pytest.mark.parametrize("moved", [0, 1])
def test_a_return_that_was_killed_between_its_moves_is_finished(moved, state, tmp_path, monkeypatch):
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, at(state, step))
    replace_path, done = Path.replace, []

    def killed(path, target):
        if path.name.isdigit():
            if len(done) == moved:
                raise KeyboardInterrupt
            done.append(path)
        return replace_path(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        checkpoint.set_aside(tmp_path, 10)
    assert checkpoint.saved_steps(tmp_path) == [10], "the abandoned newest is in place for nobody"
    aside = checkpoint.set_aside(tmp_path, 10)
    checkpoint.end_return(tmp_path)
    assert names(aside) == ["0000020", "0000030"] and names(tmp_path / "checkpoints") == ["0000010", aside.name]


def test_the_best_is_kept(state, tmp_path):
    def reach(step, value, metric="velocity_loss", keep=1):
        checkpoint.save(tmp_path, at(state, step), keep)
        return checkpoint.keep_if_best(tmp_path, Record(metric, value, step))

    assert checkpoint.best_record(tmp_path) is None
    assert reach(10, 0.5) and not reach(20, 0.6) and not reach(30, math.nan) and not reach(40, 0.5)
    best = tmp_path / "checkpoints" / "best"
    assert checkpoint.best_record(tmp_path) == Record("velocity_loss", 0.5, 10)
    assert snapshot.load_card(best).step == 10 and checkpoint.damage(best) is None
    assert names(tmp_path / "checkpoints") == ["0000040", "best"], "it outlives the newest ones"
    assert reach(50, 0.4) and snapshot.load_card(best).step == 50
    assert reach(60, 70.0, metric="fid"), "values of another metric do not compare"
    assert checkpoint.best_record(tmp_path) == Record("fid", 70.0, 60)


@pytest.mark.parametrize("renamed", range(3))
def test_a_kill_leaves_the_old_best_or_the_new(renamed, state, tmp_path):
    """Renamed are the record, the old best out of its place, and the new one into it; then the old one is removed."""
    checkpoint.save(tmp_path, at(state, 10))
    checkpoint.keep_if_best(tmp_path, Record("loss", 0.5, 10))
    checkpoint.save(tmp_path, at(state, 20))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_at_rename(patch, renamed)
        checkpoint.keep_if_best(tmp_path, Record("loss", 0.4, 20))
    checkpoint.sweep(tmp_path)
    assert names(tmp_path / "checkpoints") == ["0000010", "0000020", "best"]
    assert checkpoint.best_record(tmp_path) == Record("loss", 0.5, 10)


def test_the_best_without_hard_links(state, tmp_path, monkeypatch):
    def link(source, target):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    checkpoint.save(tmp_path, state)
    assert checkpoint.keep_if_best(tmp_path, Record("loss", 1.0, 120))
    assert checkpoint.damage(tmp_path / "checkpoints" / "best") is None
