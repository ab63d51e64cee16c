"""`stablevm variance` on a small data set: what it writes, and what it refuses."""

import json
import re

import pytest
import runs
import torch
from PIL import Image

from stablevm import cli


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variance") / "data"
    labels = torch.tensor([0] * 30 + [1] * 9 + [2])  # class 1 is smaller than the references, class 2 has no variance
    return runs.write_data(folder, labels, ("many", "few", "one"))


def run(data, folder, *options):
    return cli.main(["variance", f"--data-dir={data}", f"--output-dir={folder}", "--rows=60", *options])


def test_what_it_writes(data, tmp_path, capsys):
    assert run(data, tmp_path, "--references=12", "--times=10") == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "variance.json").read_text())
    assert found["classes"] == [0, 1] and found["references"] == 12 and len(found["t"]) == len(found["ess"]) == 10
    assert 0 < found["tau"] <= 1 and found["xi"] in [0, *found["t"]]
    assert all(fewer <= plain for fewer, plain in zip(found["stablevm"], found["cfm"], strict=True))
    assert f"--proj-tau {found['tau']:.2f}" in said and f"xi = {found['xi']:.2f}" in said
    assert "1 of 2 classes have fewer than 12 samples" in said
    assert Image.open(tmp_path / "variance.png").size == (2000, 580)


def test_options_change_the_curve(data, tmp_path):
    curves = []
    for number, options in enumerate(
        [[], ["--seed=1"], ["--references=5"], ["--classes=0"], ["--path-type=cosine"], ["--rows=50"], ["--times=4"]]
    ):  # fewer references than samples: with all of them StableVM's variance is 0, whatever the options
        assert run(data, tmp_path / str(number), "--references=12", *options) == 0
        curves.append(json.loads((tmp_path / str(number) / "variance.json").read_text())["stablevm"])
    assert all(curves.count(curve) == 1 for curve in curves)
    for name, options in (("again", []), ("all", ["--classes", "all"])):  # those with a variance are the default's
        assert run(data, tmp_path / name, "--references=12", *options) == 0
        assert json.loads((tmp_path / name / "variance.json").read_text())["stablevm"] == curves[0]


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--classes=0,2"], "--classes 0,2: .* has 1 samples of it; name classes with 2 or more"),
        (["--classes=7"], "--classes 7: .* has classes 0 to 2"),
        (["--classes=0,0"], "--classes 0,0: expected all, or distinct class indices"),
        (["--references=1"], "--references 1: expected at least 2"),
    ],
)
def test_mistakes_are_one_line(options, expected, data, tmp_path, capsys):
    assert run(data, tmp_path / "out", *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(expected, line), line
    assert not (tmp_path / "out").exists()
