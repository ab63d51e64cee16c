"""`gmm_exp.py` at small size: files, reuse, figures, moving pictures, mistakes."""

import json

import pytest
import torch
from PIL import Image

from stablevm import cli

TINY = [
    "--updates=6", "--eval-every=3", "--batch-size=8", "--references=16", "--components=3", "--dimension=3",
    "--eval-samples=20", "--variance-samples=10", "--variance-dimensions", "2", "5",
]  # fmt: skip


def toy(folder, *options):
    return cli.toy([*TINY, f"--output-dir={folder}", *options])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    assert toy(folder, "-e", "all", "--seeds=2", "--use_tensorboard") == 0
    return folder


def test_one_file_for_each_method_and_seed(finished):
    results = [json.loads(path.read_text()) for path in (finished / "data").glob("*-velocity-seed*.json")]
    assert {(result["method"], result["seed"]) for result in results} == {
        (method, seed) for method in ("cfm", "stf", "stable_vm", "stable_vm_efficient") for seed in (0, 1)
    }
    for result in results:
        assert result["updates"] == [0, 3, 6] and result["settings"]["dimension"] == 3
        assert len(result["divergence"]) == 3 and len(result["divergence"][0]) == len(result["times"])
    first = {result["divergence"][0][0] for result in results if result["seed"] == 0}
    assert len(first) == 1, "all methods start from the same network on the same points"


def test_streamed_learns_as_plain(finished):
    def last(method):
        path = next((finished / "data").glob(f"{method}-velocity-seed0-*.json"))
        return json.loads(path.read_text())["divergence"][-1]

    assert last("stable_vm") == pytest.approx(last("stable_vm_efficient"), rel=1e-5)
    assert last("stable_vm") != last("stf")


def test_figures_and_table(finished):
    assert (finished / "divergence-velocity.md").read_text().count("(2) |") == 4
    for name in ("divergence-velocity.png", "variance-velocity.png"):
        with Image.open(finished / name) as picture:
            assert picture.width == 2000
    curves = json.loads((finished / "data" / "variance-velocity.json").read_text())
    assert list(curves) == ["Mixture, d = 2", "Mixture, d = 5", "Handwritten digits"]
    assert list((finished / "logs").rglob("metrics.jsonl")) and list((finished / "logs").rglob("events.out*"))


def test_finished_results_are_not_computed_again(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in (finished / "data").glob("cfm*")}
    assert toy(finished, "--exp", "cfm", "--no_plot_variance") == 0
    assert "exists already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (finished / "data").glob("cfm*")} == before


def test_only_plot(finished, tmp_path, capsys):
    (finished / "variance-velocity.png").unlink()
    assert toy(finished, "--only_plot") == 0
    assert (finished / "variance-velocity.png").exists()
    assert toy(tmp_path, "--only_plot", "--no_plot_variance") == 0
    assert "no finished result" in capsys.readouterr().out


@pytest.mark.parametrize("field", ["velocity", "score"])
def test_moving_pictures(field, tmp_path, monkeypatch):
    from stablevm.toy import films

    monkeypatch.setattr(films, "FRAME_TIMES", films.FRAME_TIMES[:2])
    monkeypatch.setattr(films, "SHOWN_STEPS", 2)
    options = [f"--vector_field={field}", "--exp=stf", "--enable_visualization", "--no_plot_variance"]
    assert toy(tmp_path, *options) == 0
    for kind, frames in (("field", 2), ("paths", 3)):
        with Image.open(tmp_path / f"stf-{field}-{kind}.gif") as picture:
            assert picture.n_frames == frames


def test_cifar10(tmp_path):
    files = tmp_path / "cifar"
    files.mkdir()
    stream = torch.Generator().manual_seed(0)
    for number in range(1, 6):
        bytes_ = torch.randint(256, (4, 3073), generator=stream).to(torch.uint8).numpy().tobytes()
        (files / f"data_batch_{number}.bin").write_bytes(bytes_)
    assert toy(tmp_path / "out", "--exp=cfm", f"--cifar10-data-path={files}") == 0
    assert "CIFAR-10" in json.loads((tmp_path / "out" / "data" / "variance-velocity.json").read_text())


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--exp=gan"], "error: --exp gan: expected cfm"),
        (["--seeds=0"], "error: --seeds 0: expected at least 1"),
        (["--imagenet-data-path=nowhere"], "error: --imagenet-data-path nowhere: no such folder"),
        (["--cifar10-data-path=nowhere"], "error: --cifar10-data-path nowhere: no file data_batch_1.bin"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_trained(options, expected, tmp_path, capsys):
    assert toy(tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith(expected) and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_killed_writers_left_is_removed(tmp_path):
    assert toy(tmp_path, "-e", "cfm") == 0
    (result,) = (tmp_path / "data").glob("cfm-*.json")
    logs = tmp_path / "logs" / result.stem
    result.unlink()  # as if it had been killed right before that
    for path in (tmp_path / "data" / "variance-velocity.json", result, logs / "metrics.jsonl", tmp_path / "x.png"):
        path.with_name(f".tmp-1-0123abcd-{path.name}").write_text("half")
    assert toy(tmp_path, "-e", "cfm") == 0
    assert result.exists() and not list(tmp_path.rglob(".*"))
