"""Messages that many processes print once, and the values that their launcher may set."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from stablevm import cli
from stablevm.support import launcher
from stablevm.support.errors import UserError
from stablevm.support.launcher import Place, tell


@pytest.fixture
def store(monkeypatch):
    """The store that torchrun keeps, of a launch of three processes; this one is the second."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(server.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture
def in_processes(monkeypatch):
    """A function that calls another with each rank, in the place of the process of that rank."""

    def call(ranks, action):
        for rank in ranks:
            monkeypatch.setenv("RANK", rank)
            action(rank)

    return call


def test_an_error_is_printed_by_the_first_process(store, in_processes, capsys):
    in_processes("102", lambda rank: tell("error: the same"))
    assert capsys.readouterr().err == "error: the same (process 1)\n"


def test_errors_that_differ_are_all_printed(store, in_processes, capsys):
    in_processes("20", lambda rank: tell(f"error: of {rank}"))
    assert capsys.readouterr().err == "error: of 2 (process 2)\nerror: of 0\n"


def test_a_restarted_launch_tells_again(store, monkeypatch, capsys):
    tell("error: x")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    tell("error: x")
    assert capsys.readouterr().err == "error: x (process 1)\n" * 2


def test_no_process_ends_before_the_line_is_printed(store, monkeypatch, capsys):
    """If it did, the launcher would end the process that is printing."""
    claimed, may_speak = threading.Event(), threading.Event()

    def slow(*arguments, **options):
        claimed.set()
        assert may_speak.wait(60)
        print(*arguments, **options)

    monkeypatch.setattr(launcher, "print", slow, raising=False)
    first, second = (threading.Thread(target=tell, args=["error: x"]) for _ in range(2))
    first.start()
    assert claimed.wait(60)
    second.start()
    second.join(0.2)
    assert second.is_alive(), "waits for the first one, which has not spoken"
    may_speak.set()
    first.join(60)
    second.join(60)
    assert not first.is_alive() and not second.is_alive()
    assert capsys.readouterr().err == "error: x (process 1)\n"


def test_where_the_speaker_was_killed_another_speaks(store, monkeypatch, capsys):
    monkeypatch.setattr(launcher, "PRINTING_PATIENCE", timedelta(seconds=0.1))

    def killed(*_, **__):
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(launcher, "print", killed, raising=False)
        tell("error: x")
    tell("error: x")
    assert capsys.readouterr().err == "error: x (process 1)\n"


def test_without_the_launchers_store_each_speaks_for_itself(store, in_processes, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    in_processes("01", lambda rank: tell("error: x"))
    assert capsys.readouterr().err == "error: x\nerror: x (process 1)\n"


def test_errors_of_the_option_parser_are_printed_once_too(store, in_processes, capsys):
    statuses = []
    in_processes("01", lambda rank: statuses.append(cli.generate(["--no-such-option"])))
    assert statuses == [2, 2]
    assert capsys.readouterr().err.count("no-such-option") == 1


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("RANK", "abc", "RANK=abc: expected a number, 0 or more"),
        ("RANK", "-1", "RANK=-1: expected a number, 0 or more"),
        ("RANK", "", "RANK=: expected a number, 0 or more"),
        ("RANK", "9" * 5000, "expected a number, 0 or more"),
        ("RANK", "2", "RANK=2: expected less than WORLD_SIZE=2"),
        ("WORLD_SIZE", "0", "WORLD_SIZE=0: expected a number, 1 or more"),
        ("WORLD_SIZE", "two", "WORLD_SIZE=two: expected a number, 1 or more"),
        ("LOCAL_RANK", "1.5", "LOCAL_RANK=1.5: expected a number, 0 or more"),
    ],
)
@pytest.mark.parametrize("command", [cli.generate, cli.train], ids=["generate", "train"])
def test_what_no_launcher_says_is_one_line(name, value, told, command, monkeypatch, capsys, tmp_path):
    for variable, number in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(variable, number)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=told):
        Place.from_environment()
    assert command(["--exp-name=x", f"--data-dir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
