"""What a training does when its readers die: one line, a status, and the checkpoints as they were."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from stablevm.training.checkpoint import checkpoint_folder, damage, saved_steps
from tests.helpers import runs

TRAIN = Path(__file__).parents[2] / "train.py"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readers")
    runs.write_data(folder / "data")
    return folder


def command(root, name, **options):
    endless = {"num_workers": 1, "max_train_steps": 100_000, "checkpointing_steps": 5}
    settings = runs.config(root, name, **(endless | options))
    return [sys.executable, str(TRAIN), *runs.as_arguments(settings)], settings.folder


def assert_ended_in_a_line(process, folder, *words):
    told = process.communicate(timeout=60)[1].splitlines()[-1]
    assert process.returncode == 2 and told.startswith("error: ") and all(word in told for word in words), told
    assert saved_steps(folder) and not any(damage(checkpoint_folder(folder, step)) for step in saved_steps(folder))


def started(root, name, **options):
    words, folder = command(root, name, checkpoints_kept=2, **options)
    process = subprocess.Popen(
        words, env=runs.ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    while not saved_steps(folder) and process.poll() is None:
        time.sleep(0.05)
    return process, folder


def test_a_reader_that_is_killed(root):
    process, folder = started(root, "killed")
    psutil.Process(process.pid).children()[0].kill()
    assert_ended_in_a_line(process, folder, "a process that reads data", "was killed", "--num-workers")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_cut_short(root, tmp_path, workers):
    shutil.copytree(root / "data", tmp_path / "data")
    process, folder = started(tmp_path, "cut", num_workers=workers)
    os.truncate(tmp_path / "data" / "latents-00000.safetensors", 1000)
    assert_ended_in_a_line(process, folder, "latents-00000.safetensors", "ends at byte 1,000 of")


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("unshare"), reason="only root may mount a small /dev/shm")
def test_shared_memory_of_a_few_kilobytes(root, tmp_path):
    """Docker gives 64 MB. The queue's thread lost the error, and training waited forever."""
    words, _ = command(root, "small", batch_size=200)
    mount = 'mount -t tmpfs -o size=64k tmpfs /dev/shm || exit 77; exec "$@"'
    process = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount, "sh", *words],
        env=runs.ENVIRONMENT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if process.returncode == 77:
        pytest.skip("no mounts here")
    told = process.stderr.splitlines()[-1]
    assert process.returncode == 2 and "error: " in told, told
    assert "shared memory" in told  # it could not be had, or with torch 2.7 a reader died when it was written
    assert "--num-workers 0" in told and "--shm-size" in told
