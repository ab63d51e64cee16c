"""Whatever writes, a disk that takes no more is the system's error with the file's name, and leaves nothing behind.

A limit on the size of files stands for the full disk: the system refuses the write in the same way.
"""

import errno
import resource
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from stablevm import cli
from stablevm.figures.style import new_figure, save_figure
from stablevm.sampling.archive import write_archive
from stablevm.sampling.parts import PartFolder
from stablevm.support import files
from stablevm.support.images import save_gif, save_png
from stablevm.support.tensor_files import save_tensors

NOISE = np.random.default_rng(0).integers(0, 256, (3, 200, 200, 3), np.uint8)


@contextmanager
def files_of_at_most(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def figure(path):
    drawn = new_figure(4)
    drawn.subplots().plot(NOISE[0, :, :, 0])
    save_figure(drawn, path)


def archive(path):
    labels = np.zeros(len(NOISE), np.int64)
    files.write_with(path, lambda temporary: write_archive(temporary, iter([NOISE]), labels, {}))


WRITERS = {
    "x.safetensors": lambda path: save_tensors(path, {"x": torch.zeros(100_000)}),
    "x.json": lambda path: files.write_json(path, [0] * 100_000),
    "x.txt": lambda path: files.write_text(path, "x" * 100_000),
    "x.png": lambda path: save_png(path, NOISE[0]),
    "x.gif": lambda path: save_gif(path, NOISE, 10),
    "figure.png": figure,
    "x.npz": archive,
    "parts": lambda path: PartFolder(path, 3, {}).write(range(3), NOISE),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_the_systems_error_with_the_files_name(name, tmp_path):
    with files_of_at_most(8192), pytest.raises(OSError) as caught:
        WRITERS[name](tmp_path / name)
    assert caught.value.errno == errno.EFBIG and str(tmp_path / name) in str(caught.value.filename)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    WRITERS[name](tmp_path / name)


@pytest.mark.parametrize(
    "command",
    [
        lambda folder: cli.main(["prepare", "digits", str(folder)]),
        lambda folder: cli.toy(
            ["--output-dir", str(folder), "--no-plot-variance", "--updates", "1", "--eval-samples", "2"]
        ),
    ],
    ids=["digits", "toy"],
)
def test_a_command_tells_it_in_one_line(command, tmp_path, capsys):
    with files_of_at_most(8192):
        assert command(tmp_path / "out") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: File too large: ") and str(tmp_path / "out") in last
    assert command(tmp_path / "out") == 0
