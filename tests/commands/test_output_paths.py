"""Where a command would write is checked before its module, and torch with it, is imported."""

import os
from pathlib import Path

import pytest

from stablevm import cli
from stablevm.support.errors import UserError
from stablevm.support.files import check_output, output_fault, replacing

LONG = "x" * 300
# Each command with arguments that are right but for the output, and the option that names it.
COMMANDS = {
    "quickstart": (cli.quickstart, [], "--output-dir"),
    "digits": (cli.prepare, ["digits"], ""),
    "train": (cli.train, ["--exp-name", "run", "--data-dir", "data"], "--output-dir"),
    "import": (cli.import_checkpoint, ["x.pt"], "--output"),
    "push": (lambda words: cli.main(["push", *words]), ["x", "me/net"], "--output"),
    "export": (lambda words: cli.main(["export", *words]), ["x"], ""),
    "generate": (cli.generate, ["--ckpt", "x"], "--sample-dir"),
    "extractor": (cli.extractor, ["--data-dir", "x"], "--output-dir"),
    "variance": (cli.variance, ["--data-dir", "x"], "--output-dir"),
    "benchmark": (cli.benchmark, [], "--output-dir"),
    "toy": (cli.toy, [], "--output-dir"),
    "convert": (cli.prepare, ["convert", "--source", "x", "--resolution", "8"], "--dest"),
    "encode": (cli.prepare, ["encode"], "--data-dir"),
    "pack": (cli.prepare, ["pack", "--source", "x"], "--dest"),
    "folders convert": (cli.dataset_tools, ["convert", "--source", "x", "--resolution", "8"], "--dest"),
    "folders encode": (cli.dataset_tools, ["encode", "--source", "x"], "--dest"),
    "evaluate": (cli.evaluate, ["x.npz", "--reference", "x"], "--cache-dir"),
}
FILES = {
    "info": (cli.data, ["info", "data"], "--picture"),
    "evaluate": (cli.evaluate, ["x.npz", "--reference", "x"], "--output"),
    "reference": (cli.reference, ["x"], "--output"),
}


@pytest.fixture
def places(tmp_path):
    (tmp_path / "file").write_text("not ours")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    return {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "sub" / "more",
        "too long": tmp_path / LONG,
        "below too long": tmp_path / "new" / LONG / "more",
        "a loop": tmp_path / "loop",
        "a link to nothing": tmp_path / "nowhere",
    }


@pytest.fixture(autouse=True)
def _no_work(monkeypatch):
    def begin():
        raise AssertionError("the command's work began")

    monkeypatch.setattr(cli, "printable_streams", begin)  # the last thing before the work


def refused(command, arguments, option, path, capsys):
    given = [str(path)] if not option else [option, str(path)]
    assert command([*arguments, *given]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "that can be written" in error and (option or "FOLDER") in error


@pytest.mark.parametrize(
    "place", ["a file", "below a file", "too long", "below too long", "a loop", "a link to nothing"]
)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_cannot_be_is_refused_before_work_begins(name, place, places, capsys):
    refused(*COMMANDS[name], places[place], capsys)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_is_refused_before_work_begins(name, places, tmp_path, capsys):
    for path in (tmp_path / "folder", places["below a file"], places["too long"], Path(os.devnull)):
        refused(*FILES[name], path, capsys)


def test_names_of_runs_and_archives_are_measured_too(tmp_path, capsys):
    train = ["--data-dir", "data", "--output-dir", str(tmp_path)]
    (tmp_path / "file").write_text("")
    for command, arguments, message in (
        (cli.train, [*train, "--exp-name", LONG], "a name has 300 bytes"),
        (cli.train, [*train, "--exp-name", "file"], "is a file"),
        (cli.generate, ["--ckpt", "x", "--sample-dir", str(tmp_path), "--name", LONG], "at most 240 bytes"),
    ):
        assert command(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error


def test_what_can_be_written_passes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "old.png").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    for folder in (".", "new", "new/deep", "there", "link", "link/new", str(tmp_path)):
        assert output_fault(Path(folder), is_folder=True) is None
    for file in ("new.png", "old.png", "new/deep/x.png", "x" * 250):
        assert output_fault(Path(file), is_folder=False) is None


def test_other_names_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match=r"^here: .*NUL"):
        check_output("here", tmp_path / "a\0b", is_folder=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_permission_is_reported(tmp_path):
    tmp_path.chmod(0o500)
    assert "can't be written to" in output_fault(tmp_path / "new", is_folder=True)


def test_a_name_as_long_as_the_disk_takes_is_written(tmp_path):
    path = tmp_path / ("x" * 250 + ".png")
    with replacing(path) as temporary:
        assert temporary.suffix == ".png"
        temporary.write_text("content")
    assert path.read_text() == "content"
