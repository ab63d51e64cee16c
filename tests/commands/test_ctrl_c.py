"""Ctrl-C, which every process of the terminal receives, ends commands with workers in one line, and none ignores it.

So does SIGTERM, which a job scheduler sends.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.sources import write_source
from tests.helpers.tiny_vae import save_tiny_vae

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    write_source(folder / "source", images=40, classes=2, shortest=304, longest=305)
    for path in list((folder / "source").rglob("*.JPEG")):  # 400 files: more than any command prepares in that time
        for copy in range(9):
            path.with_stem(f"{path.stem}_{copy}").hardlink_to(path)
    save_tiny_vae(folder / "vae")
    return folder


def start(folder, step, *options):
    words = [sys.executable, ROOT / "preprocessing" / "dataset_tools.py", step, "--num-workers=2", "--batch-size=2"]
    return subprocess.Popen(
        [*words, *options],
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def interrupt(process, result, times, number=signal.SIGINT):
    while not any(result.rglob("*.[pn][np][gy]")):
        assert process.poll() is None
        time.sleep(0.02)
    for time_ in range(times):
        time.sleep(0.05 * time_)
        os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=120)
    return [line for line in errors.replace("\r", "\n").splitlines() if line.strip() and "image/s" not in line]


@pytest.mark.parametrize(("step", "times"), [("convert", 1), ("convert", 2), ("encode", 1), ("encode", 2)])
def test_one_line_and_no_traceback(step, times, made):
    dest = made / f"{step}-{times}"
    options = {"convert": ["--resolution=128x128"], "encode": ["--vae=vae"]}[step]
    process = start(made, step, "--source=source", f"--dest={dest}", *options)
    lines = interrupt(process, dest, times)
    assert process.returncode == 130, lines
    assert without_rates(lines) == ["interrupted; run the same command again to resume"]


def without_rates(lines):
    return [line for line in lines if "it/s" not in line and "s/image" not in line and "?" not in line]


@pytest.mark.parametrize("processes", ["1", "2"])
def test_termination_ends_at_once_with_one_line(processes, made, monkeypatch):
    """Where there are several processes, their launcher tells."""
    monkeypatch.setenv("WORLD_SIZE", processes)
    dest = made / f"terminated-{processes}"
    process = start(made, "convert", "--source=source", f"--dest={dest}", "--resolution=128x128")
    lines = interrupt(process, dest, 1, signal.SIGTERM)
    assert process.returncode == -signal.SIGTERM, lines
    assert without_rates(lines) == ["terminated; run the same command again to resume"] * (processes == "1")


ENDING = """
import atexit, os, signal, sys
from stablevm import cli

def end(*arguments):
    raise {how}

cli.printable_streams = end  # the last thing before the command itself
atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))
sys.exit(cli.main(["data", "info", "."]))
"""


@pytest.mark.parametrize("how", ["KeyboardInterrupt", "SystemExit(130)"])
def test_another_one_while_the_program_ends_shows_nothing(how):
    ended = subprocess.run([sys.executable, "-c", ENDING.format(how=how)], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 130
    assert ended.stderr.splitlines() == (["interrupted; run the same command again to resume"] if "Key" in how else [])
