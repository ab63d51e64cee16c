"""Runs with bad numbers, damaged files, a full disk or kills reach the same end, or stop with the reason."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from stablevm import cli
from stablevm.networks import snapshot
from stablevm.support import tensor_files
from stablevm.training import terms
from stablevm.training.checkpoint import Record, best_record, damage, saved_steps
from tests.helpers import runs

ROOT = Path(__file__).parents[2]
SPOILED = 20  # the row of the data whose latent is NaN


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    runs.write_data(folder / "data")
    shard = runs.write_data(folder / "spoiled") / "latents-00000.safetensors"
    tensors = load_file(shard)
    tensors["moments"][SPOILED] = torch.nan  # which the writer would have refused
    save_file(tensors, shard)
    return folder


@pytest.fixture(scope="module")
def whole(root):
    return runs.run(runs.config(root, "whole", checkpointing_steps=2))


def parts(folder, number):
    files = (folder / "checkpoints" / f"{number:07d}").glob("*.safetensors")
    return {file.stem: load_file(file) for file in files}


def assert_same(one, other):
    assert one.keys() == other.keys() >= {"ema", "model", "optimizer"}
    for part in one:
        assert one[part].keys() == other[part].keys()
        assert all(torch.equal(value, other[part][name]) for name, value in one[part].items()), part


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def faults(folder):
    return [row for row in rows(folder) if "fault" in row]


def refused(settings, capsys):
    """The error line of a command that ends with status 2, and its warnings."""
    capsys.readouterr()
    runs.AcceleratorState._reset_state(True)
    assert cli.train(runs.as_arguments(settings)) == 2
    *warnings, error = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith(("error: ", "warning"))
    ]
    return error, warnings


def on_spoiled(root, name, **options):
    return runs.config(root, name, data_dir=root / "spoiled", **options)


@pytest.fixture(scope="module")
def shaken(root):
    """One epoch over data with a sample that is NaN, with a checkpoint of every step."""
    return runs.run(on_spoiled(root, "shaken", checkpointing_steps=1, max_train_steps=5, log_steps=5))


def test_a_bad_sample_costs_one_step_and_is_named(root, shaken):
    (fault,) = faults(shaken)
    number = fault["step"]
    assert fault["fault"] == "loss" and fault["rows"][0] == SPOILED and fault["samples"] == 8 and number > 1
    assert_same(parts(shaken, number), parts(shaken, number - 1))
    losses = {row["step"]: row["loss"] for row in rows(shaken) if "loss" in row}
    assert [step for step, loss in losses.items() if loss is None] == [number]
    seldom = runs.run(on_spoiled(root, "seldom", max_train_steps=5, log_steps=5))
    losses.pop(number)
    assert rows(seldom)[-1]["loss"] == pytest.approx(sum(losses.values()) / 4, rel=1e-6), "it counts in no mean"


def test_bad_steps_do_not_hinder_resuming(root, shaken):
    settings = on_spoiled(root, "shaken-resumed", max_train_steps=5, log_steps=5)
    runs.run(replace(settings, max_train_steps=2))
    assert_same(parts(runs.run(settings), 5), parts(shaken, 5))


@pytest.mark.slow
def test_processes_agree_on_bad_steps(root, shaken):
    settings = on_spoiled(root, "shaken-by-two", max_train_steps=5, log_steps=5)
    done = launch(settings)
    assert done.returncode == 0, done.stderr[-2000:]
    assert faults(settings.folder) == faults(shaken)
    assert done.stderr.count("the loss is not finite") == 1
    assert all(value.isfinite().all() for part in parts(settings.folder, 5).values() for value in part.values())


def test_too_many_bad_steps_end_the_run(root, capsys, monkeypatch):
    def squared_error(prediction, target):
        calls.append(1)
        return measure(prediction, target) * (1 if len(calls) <= 3 else torch.inf)

    calls, measure = [], terms.squared_error
    monkeypatch.setattr(terms, "squared_error", squared_error)
    settings = runs.config(root, "hopeless", max_bad_steps=3, checkpointing_steps=1, checkpoints_kept=1)
    error, warnings = refused(settings, capsys)
    assert "3 steps in a row (--max-bad-steps): 4, 5, 6; the newest checkpoint is of step 5" in error
    assert [line[9:41] for line in warnings[-3:]] == [f"step {n}: the loss is not finite; " for n in (4, 5, 6)]
    assert saved_steps(settings.folder) == [3, 4, 5], "the last one before the bad steps is not removed"
    assert_same(parts(settings.folder, 3), parts(settings.folder, 5))


def test_the_best_checkpoint_is_kept(root):
    options = {"checkpointing_steps": 2, "checkpoints_kept": 1, "keep_best": "velocity_loss", "learning_rate": 1e-9}
    folder = runs.run(runs.config(root, "best", **options))
    losses = runs.losses(folder)
    means = {last: (losses[last - 2] + losses[last - 1]) / 2 for last in (2, 4, 6)}
    lowest = min(means, key=means.get)
    assert best_record(folder) == Record("velocity_loss", pytest.approx(means[lowest], rel=1e-6), lowest)
    assert snapshot.load_card(folder / "checkpoints" / "best").step == lowest and saved_steps(folder) == [6]


def test_a_metric_that_is_not_computed(root, capsys):
    error, _ = refused(runs.config(root, "no-metric", keep_best="alignment_loss"), capsys)
    assert error.startswith("error: --keep-best alignment_loss: expected a loss that is computed")


def spoil(folder, number):
    file = folder / "checkpoints" / f"{number:07d}" / "ema.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def copy_of(whole, root, name):
    """The finished run under another name: a folder that was moved."""
    shutil.copytree(whole, root / "exps" / name)
    return runs.config(root, name, checkpointing_steps=2)


def test_a_damaged_newest_checkpoint_is_passed_over(root, whole, capsys):
    settings = copy_of(whole, root, "damaged")
    spoil(settings.folder, 6)
    runs.run(settings)
    warning = capsys.readouterr().err.splitlines()[0]
    assert warning == f"warning: checkpoint {settings.folder}/checkpoints/0000006: ema.safetensors is damaged; " \
                      "trying the one before"  # fmt: skip
    assert damage(settings.folder / "checkpoints" / "0000006") is None
    assert_same(parts(settings.folder, 6), parts(whole, 6))
    assert [row["step"] for row in rows(settings.folder)] == list(range(1, 7))


def test_no_checkpoint_is_whole(root, whole, capsys):
    settings = copy_of(whole, root, "ruined")
    for number in (2, 4, 6):
        spoil(settings.folder, number)
    error, warnings = refused(settings, capsys)
    assert "no checkpoint is intact (0000006: ema.safetensors is damaged; 0000004: " in error and len(warnings) == 3
    error, _ = refused(replace(settings, resume_step=4), capsys)
    assert error.startswith("error: --resume-step 4: ") and "ema.safetensors is damaged; there are: 2, 4, 6" in error


def test_newer_checkpoints_make_way(root, whole, capsys):
    settings = copy_of(whole, root, "back")
    runs.run(replace(settings, resume_step=2, max_train_steps=3))
    aside = settings.folder / "checkpoints" / "newer-than-0000002"
    assert f"resumes from step 2; newer checkpoints were moved to {aside}" in capsys.readouterr().out
    assert saved_steps(settings.folder) == [2, 3] and len(list(aside.glob("0*"))) == 2
    assert_same(parts(runs.run(settings), 6), parts(whole, 6))


def test_a_moved_run_resumes_where_it_is(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "elsewhere" / "renamed")
    place = [f"--output-dir={tmp_path / 'elsewhere'}", "--exp-name=renamed"]
    assert cli.train([*place, "--resume", "--max-train-steps=8"]) == 0
    assert saved_steps(tmp_path / "elsewhere" / "renamed") == [2, 4, 6, 8]
    assert json.loads((tmp_path / "elsewhere" / "renamed" / "config.json").read_text())["exp_name"] == "renamed"
    assert saved_steps(whole) == [2, 4, 6]


def test_leftovers_are_swept(root):
    settings = runs.config(root, "littered")
    runs.run(replace(settings, max_train_steps=2))
    (settings.folder / "samples").mkdir()
    leftovers = [settings.folder / name for name in (".tmp-1-a-config.json", "samples/.tmp-1-b-step.png")]
    for leftover in leftovers:
        leftover.write_text("half")
    runs.run(settings)
    assert not any(leftover.exists() for leftover in leftovers)


def test_a_full_disk_loses_nothing(root, whole, capsys, monkeypatch):
    settings = runs.config(root, "full", checkpointing_steps=2)

    def save_file(tensors, path, metadata=None):
        if "0000004" in str(path):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        write(tensors, path, metadata)

    write = tensor_files.save_file
    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "save_file", save_file)
        error, _ = refused(settings, capsys)
    assert error.startswith(f"error: {os.strerror(errno.ENOSPC)}: {settings.folder}/checkpoints/")
    assert saved_steps(settings.folder) == [2] and damage(settings.folder / "checkpoints" / "0000002") is None
    assert [row["step"] for row in rows(settings.folder)] == [1, 2, 3, 4]
    assert_same(parts(runs.run(settings), 6), parts(whole, 6))


def launch(settings):
    return subprocess.run(
        [*runs.TWO_PROCESSES, ROOT / "train.py", *runs.as_arguments(settings)],
        env=runs.ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mistake", [{"cfg_prob": 2.0}, {"batch_size": 9}, {"model": "SiT-XXS/3"}], ids=str)
def test_of_two_processes_one_tells_the_error(mistake, root):
    done = launch(runs.config(root, "twice", **mistake))
    assert done.returncode != 0
    assert [line[:7] for line in done.stderr.splitlines() if "error: --" in line] == ["error: "], done.stderr
    assert "exitcode  : 2" in done.stderr, "as torchrun tells"


@pytest.mark.slow
def test_two_processes_with_different_options(root):
    """One line that names the option, and nothing is written."""
    settings = runs.config(root, "different")
    start = 'exec "$@" --seed $RANK'
    done = subprocess.run(
        [*runs.TWO_PROCESSES, "--no-python", "bash", "-c", start, "bash", sys.executable, ROOT / "train.py",
         *(word for word in runs.as_arguments(settings) if not word.startswith("--seed"))],
        env=runs.ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "process 0 has --seed 0, process 1 has --seed 1" in line
    assert not (settings.folder / "config.json").exists()


@pytest.mark.slow
def test_two_processes_stop_as_slurm_stops_them(root):
    """Started without a launcher; SIGTERM reaches each process, and the loaders' workers too."""
    settings = runs.config(root, "requeued", max_train_steps=9_999, log_steps=5, num_workers=1)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in "01":
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, ROOT / "train.py", *runs.as_arguments(settings)],
                env={**runs.ENVIRONMENT, **place}, start_new_session=True,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )
        )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (settings.folder / "metrics.jsonl").exists() or len(rows(settings.folder)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for process in processes:
        os.killpg(process.pid, signal.SIGTERM)
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2
    (saved,) = saved_steps(settings.folder)
    assert rows(settings.folder)[-1]["step"] == saved and f"interrupted; saved step {saved}" in outputs[0]
    assert "interrupted" not in outputs[1]


@pytest.mark.slow
def test_ten_kills_at_random_moments(root, monkeypatch):
    """SIGKILL spares nothing: not a file half-written, not a rename half-done."""
    options = {"loss_type": "stablevm", "prefill_bank_fully": True, "max_train_steps": 300, "checkpointing_steps": 3,
               "checkpoints_kept": 2, "keep_best": "loss"}  # fmt: skip
    calm = runs.run(runs.config(root, "calm", **options | {"checkpointing_steps": 300}))
    settings, moments = runs.config(root, "killed", **options), random.Random(5)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    processes = multiprocessing.get_context("forkserver")  # which has imported all, so that training starts at once
    processes.set_forkserver_preload(["tests.helpers.runs"])
    for number in range(10):
        before = saved_steps(settings.folder)
        process = processes.Process(target=runs.run, args=(settings,))
        process.start()
        while number % 2 and saved_steps(settings.folder) == before:  # every other time it gets on, however slow it is
            time.sleep(0.01)
        time.sleep(moments.uniform(0.05, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was still running"
    runs.run(settings)
    assert_same(parts(settings.folder, 300), parts(calm, 300))
    assert [row["loss"] for row in rows(settings.folder)] == [row["loss"] for row in rows(calm)]
    assert best_record(settings.folder) is not None
