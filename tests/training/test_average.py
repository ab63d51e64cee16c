"""Averages of power-function profile: their formula, snapshots in a run, and any width from those of two."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stablevm import cli
from stablevm.networks.snapshot import load_card, load_model
from stablevm.support.errors import UserError
from stablevm.training.average import WIDTHS, Known, coefficients, decay_of, exponent_of, profile, snapshot_steps
from stablevm.training.weights import PowerAverage
from tests.helpers import runs

ROOT = Path(__file__).parents[2]
SHORT = {"average_every": 2, "checkpointing_steps": 3}


@pytest.mark.parametrize("width, exponent", [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_of_the_published_widths(width, exponent):
    """EDM2, section 3.1, gives both."""
    found = exponent_of(width)
    assert found == pytest.approx(exponent, abs=0.005)
    assert (found + 1) / ((found + 2) ** 2 * (found + 3)) == pytest.approx(width**2)


@pytest.mark.parametrize("width", [0, -0.1, 0.3, float("nan")])
def test_widths_without_a_profile(width):
    with pytest.raises(UserError, match=r"width .*: expected above 0 and below 0\.289"):
        exponent_of(width)


def test_the_profile_is_that_of_the_decays_and_has_the_width():
    exponent, steps = exponent_of(0.15), torch.arange(1, 2001, dtype=torch.float64)
    weights = torch.zeros(2000, dtype=torch.float64)
    for step in range(1, 2001):
        weights *= decay_of(exponent, step)
        weights[step - 1] += 1 - decay_of(exponent, step)
    found = profile(exponent, 2000, steps)
    assert torch.allclose(found, weights, atol=1e-12) and found.sum() == pytest.approx(1)
    mean = (found * steps).sum()
    deviation = (found * (steps - mean).square()).sum().sqrt()
    assert deviation / 2000 == pytest.approx(0.15, rel=1e-3)
    assert profile(exponent, 10, steps)[10:].abs().max() == 0


def walk(stream, steps, size=50):
    """Weights that drift and shake, as in training: float64 (steps, size)."""
    noise = torch.randn(steps, size, generator=stream, dtype=torch.float64)
    return 0.05 * noise.cumsum(0) + 0.2 * torch.randn(steps, size, generator=stream, dtype=torch.float64) + 1


def test_any_width_from_snapshots_of_two(stream):
    """Below 1 % of what training changes, and of the weights, for widths within those that EDM2 sweeps."""
    count, every = 400, 20
    weights, network = walk(stream, count), nn.ParameterList([torch.zeros(50)])
    wanted = (0.05, 0.07, 0.1, 0.13, 0.15)
    tracked = {width: PowerAverage(network, width) for width in {*WIDTHS, *wanted}}
    known, snapshots = [], []
    for step in range(1, count + 1):
        for width, average in tracked.items():
            average.update(nn.ParameterList([weights[step - 1].float()]), step - 1)
            if step % every == 0 and width in WIDTHS:
                known.append(Known(step, width))
                snapshots.append(average.model[0].detach().double().clone())
    for width in wanted:
        shares, error = coefficients(known, count, width)
        assert shares.sum() == pytest.approx(1) and error < 0.01
        found, exact = (shares[:, None] * torch.stack(snapshots)).sum(0), tracked[width].model[0].double()
        assert (found - exact).norm() < 0.01 * exact.norm(), width
        assert (found - exact).norm() < 0.01 * (weights[-1] - weights[0]).norm(), width


def test_many_steps_are_read_in_blocks():
    """The result is that of one block, whatever their size."""
    known = [Known(step, width) for step in (50_000, 100_000) for width in WIDTHS]
    shares, error = coefficients(known, 100_000, 0.08)
    few = [Known(each.step // 1000, each.width) for each in known]
    assert torch.allclose(shares, coefficients(few, 100, 0.08)[0], atol=0.03) and 0 < error < 0.2
    exact, error = coefficients(known, 100_000, 0.05)
    assert torch.allclose(exact, torch.tensor([0, 0, 1, 0], dtype=torch.float64), atol=1e-9) and error < 1e-12


@pytest.fixture(scope="module")
def trained(root):
    return runs.run(runs.config(root, "followed", **SHORT))


def test_a_run_saves_snapshots_and_goes_on_with_its_averages(root, trained):
    assert snapshot_steps(trained) == [2, 4, 6]
    settings = runs.config(root, "stopped", **SHORT)
    runs.run(replace(settings, max_train_steps=3))
    assert snapshot_steps(settings.folder) == [2, 3]
    runs.run(settings)
    runs.assert_same_checkpoint(settings.folder, trained)
    for step in (2, 4, 6):
        for width in WIDTHS:
            name = f"averages/{step:07d}/average-{width:g}.safetensors"
            one, two = load_file(settings.folder / name), load_file(trained / name)
            assert all(torch.equal(one[key], two[key]) for key in one | two), name
    with pytest.raises(UserError, match="--average-every 2, this command says --average-every 3"):
        runs.run(replace(settings, average_every=3, max_train_steps=9))


def test_two_widths_follow_the_weights_of_each_step(root):
    """With a checkpoint at each step, the averages can be computed from those."""
    folder = runs.run(runs.config(root, "each", average_every=6, checkpointing_steps=1))
    states = [load_file(folder / f"checkpoints/{step:07d}/model.safetensors") for step in range(1, 7)]
    for width in WIDTHS:
        found = load_file(folder / f"averages/0000006/average-{width:g}.safetensors")
        shares = profile(exponent_of(width), 6, torch.arange(1, 7, dtype=torch.float64))
        for name, value in found.items():
            exact = sum(share * state[name].double() for share, state in zip(shares, states, strict=True))
            assert torch.allclose(value.double(), exact, atol=1e-6), name


def test_a_snapshot_that_a_kill_left_undone_is_made_first(root, trained):
    settings = runs.config(root, "killed", **SHORT)
    runs.run(settings)
    (settings.folder / "averages" / "0000006" / "model.json").unlink()
    runs.run(settings)
    assert snapshot_steps(settings.folder) == [2, 4, 6]


def test_a_return_sets_newer_snapshots_aside(root):
    settings = runs.config(root, "back", **SHORT)
    runs.run(settings)
    runs.run(replace(settings, resume_step=3, max_train_steps=3))
    aside = settings.folder / "checkpoints" / "newer-than-0000003" / "averages"
    assert snapshot_steps(settings.folder) == [2, 3] and sorted(path.name for path in aside.iterdir()) == [
        "0000004",
        "0000006",
    ]


def test_average_writes_a_checkpoint_that_generate_takes(root, trained, tmp_path, capsys):
    run = str(trained)
    assert cli.main(["average", run, "--width", "0.1"]) == 0
    target = trained / "averages" / "0000006-width-0.1"
    made = load_file(target / "ema.safetensors")
    tracked = load_file(trained / "averages" / "0000006" / "average-0.1.safetensors")
    assert all(torch.allclose(made[name], tracked[name], atol=1e-7) for name in made | tracked)
    load_model(target, load_card(target))
    told = capsys.readouterr().out
    assert "from 3 snapshots" in told and str(target) in told
    words = ["--num-fid-samples=2", "--num-steps=2", f"--sample-dir={tmp_path}", "--name=made"]
    assert cli.main(["generate", "--ckpt", str(target), *words]) == 0
    assert cli.main(["average", run, "--width", "0.1"]) == 0
    assert "already complete" in capsys.readouterr().out
    assert cli.main(["average", run, "--width", "0.2", "--step", "4", "--output", str(tmp_path / "early")]) == 0
    assert load_card(tmp_path / "early").step == 4
    assert json.loads((tmp_path / "early" / "average.json").read_text())["snapshots"] == 2


def test_another_runs_average_and_other_files_are_kept(trained, tmp_path, capsys):
    other = shutil.copytree(trained, tmp_path / "other")
    snapshot = other / "averages" / "0000006" / "average-0.05.safetensors"
    save_file({name: value + 1 for name, value in load_file(snapshot).items()}, snapshot)
    assert cli.main(["average", str(trained), "--width", "0.11", "--output", str(tmp_path / "made")]) == 0
    before = (tmp_path / "made" / "ema.safetensors").read_bytes()
    capsys.readouterr()
    assert cli.main(["average", str(other), "--width", "0.11", "--output", str(tmp_path / "made")]) == 2
    assert f"holds the average of another run than {other}; give another --output" in capsys.readouterr().err
    assert (tmp_path / "made" / "ema.safetensors").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "dataset.json").write_text("{}")
    assert cli.main(["average", str(trained), "--width", "0.11", "--output", str(tmp_path / "mine")]) == 2
    assert "mine: holds other files; give another --output" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["dataset.json"]


@pytest.mark.parametrize(
    "words, told",
    [
        (["--width", "0.5"], "--width 0.5: expected above 0 and below 0.289"),
        (["--width", "0.1", "--step", "5"], "--step 5: .* has no snapshot of that step; there are 2, 4, 6"),
        (["--width", "0.1", "--output", "OTHER"], "holds the average of width 0.12 after step 6"),
    ],
)
def test_refusals_of_average(trained, tmp_path, capsys, words, told):
    other = str(tmp_path / "other")
    assert cli.main(["average", str(trained), "--width", "0.12", "--output", other]) == 0
    capsys.readouterr()
    assert cli.main(["average", str(trained), *(other if word == "OTHER" else word for word in words)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and re.search(told, lines[0]), lines


def test_a_run_without_snapshots_and_a_damaged_one(root, trained, tmp_path, capsys):
    assert cli.main(["average", str(tmp_path), "--width", "0.1"]) == 2
    assert "has no snapshots of averages; train with --average-every" in capsys.readouterr().err
    settings = runs.config(root, "damaged", **SHORT)
    runs.run(settings)
    (settings.folder / "averages" / "0000004" / "average-0.05.safetensors").write_bytes(b"no tensors")
    assert cli.main(["average", str(settings.folder), "--width", "0.1"]) == 2
    assert "0000004/average-0.05.safetensors: is missing or damaged" in capsys.readouterr().err
    assert snapshot_steps(settings.folder) == [2, 4, 6]
    assert not (settings.folder / "averages" / "0000006-width-0.1").exists()


@pytest.mark.slow
def test_two_processes_follow_alike(root, trained):
    settings = runs.config(root, "by-two", **SHORT)
    done = subprocess.run(
        [*runs.TWO_PROCESSES, ROOT / "train.py", *runs.as_arguments(settings)],
        env=runs.ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for width in WIDTHS:
        name = f"averages/0000006/average-{width:g}.safetensors"
        one, two = load_file(settings.folder / name), load_file(trained / name)
        assert all(torch.allclose(one[key], two[key], atol=1e-5) for key in one | two), name
