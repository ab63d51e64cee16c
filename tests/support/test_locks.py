"""One command at a time in a folder: the second is refused in a line, and no crash leaves a lock behind."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from stablevm import cli
from stablevm.support import locks
from stablevm.support.errors import UserError
from stablevm.support.locks import is_foreign, owned

HOLDER = """
import sys, time
from stablevm.support.locks import owned
with owned(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""
FORKING = """
import os, sys, time
from stablevm.support.locks import owned
with owned(sys.argv[1]):
    if os.fork() == 0:
        os.setsid()
        print(os.getpid(), flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0.3)
    monkeypatch.setattr(owned.__wrapped__, "__kwdefaults__", {"patience": 0.3})


def start(folder, program=HOLDER, **environment):
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder), "an option\x1b[2J"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    line = process.stdout.readline().strip()
    return (process, line)


def test_the_second_command_names_the_first(tmp_path):
    folder = tmp_path / "run"
    process, _ = start(folder)
    try:
        with pytest.raises(UserError) as refused, owned(folder):
            pass
    finally:
        process.kill()
        process.wait()
    assert re.fullmatch(
        rf"{re.escape(str(folder))}: another command is running there: process {process.pid} on \S+ since "
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \(.*an option\\x1b\[2J'\); wait until it ends, or stop it",
        str(refused.value),
    )


def test_a_killed_process_leaves_no_lock(tmp_path):
    process, _ = start(tmp_path)
    process.kill()
    process.wait()
    assert [path.name for path in tmp_path.iterdir()] == [".lock-0"]
    assert not any(map(is_foreign, tmp_path.iterdir()))
    with owned(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_forked_readers_of_a_killed_process_hold_nothing(tmp_path):
    process, child = start(tmp_path, FORKING)
    process.kill()
    process.wait()
    try:
        with owned(tmp_path):
            pass
    finally:
        os.kill(int(child), signal.SIGKILL)


def test_processes_of_one_launch_share_and_those_that_survive_it_keep_others_out(tmp_path, monkeypatch):
    launch = {"MASTER_PORT": "29500", "WORLD_SIZE": "2"}
    second, _ = start(tmp_path, RANK="1", **launch)
    try:
        for name, value in launch.items():
            monkeypatch.setenv(name, value)
        with owned(tmp_path):
            assert {path.name for path in tmp_path.iterdir()} == {".lock-0", ".lock-1"}
        monkeypatch.setenv("MASTER_PORT", "29501")
        with pytest.raises(UserError, match=f"process {second.pid} "), owned(tmp_path):
            pass
    finally:
        second.kill()
        second.wait()
    with owned(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {".lock-0"}, "what a killed process left is removed"


def test_files_of_one_folder_are_owned_apart(tmp_path):
    refused = pytest.raises(UserError, match=re.escape(f"{tmp_path / 'one.npz'}: another command"))
    with owned(tmp_path, "one.npz"), owned(tmp_path, "other.npz"), owned(tmp_path), refused, owned(tmp_path, "one.npz"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_into_which_nothing_was_written_is_not_left(tmp_path):
    with owned(tmp_path / "a" / "b"):
        pass
    assert not list(tmp_path.iterdir())
    with owned(tmp_path / "a" / "b"):
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "kept"]


def test_a_folder_that_its_last_holder_removes_is_made_again(tmp_path, monkeypatch):
    """As where two commands of one name end at once, because their data are missing."""
    folder, opened = tmp_path / "run", []

    def open_too_late(path):
        opened.append(path)
        if len(opened) == 1:
            folder.rmdir()
        return real(path)

    real = locks._open
    monkeypatch.setattr(locks, "_open", open_too_late)
    with owned(folder):
        assert (folder / ".lock-0").exists() and len(opened) == 2
    assert not folder.exists()


def test_a_folder_that_cannot_be_made_is_reported():
    with pytest.raises(UserError, match=r"^/proc/none: can't make this folder"), owned("/proc/none"):
        pass


def test_one_that_waits_continues_when_the_other_has_ended(tmp_path):
    process, _ = start(tmp_path)
    waiting = subprocess.Popen(
        [sys.executable, "-c", HOLDER.replace("sys.argv[1]", "sys.argv[1], patience=1e9"), str(tmp_path)],
        stdout=subprocess.PIPE,
    )
    time.sleep(0.1)
    process.kill()
    assert waiting.stdout.readline() == b"held\n"
    waiting.kill()


def test_where_there_are_no_locks_it_is_said(tmp_path, monkeypatch, capsys):
    def none(descriptor, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    with owned(tmp_path):
        pass
    assert capsys.readouterr().err.startswith(f"warning: {tmp_path}: can't be locked (Function not implemented);")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (cli.main, ["prepare", "digits", "{}"]),
        (cli.main, ["quickstart", "--output-dir={}"]),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_commands_refuse_a_folder_in_which_another_is_at_work(command, words, tmp_path, capsys):
    with owned(tmp_path):
        assert command([word.format(tmp_path) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}: another command is running there: process {os.getpid()} ")
