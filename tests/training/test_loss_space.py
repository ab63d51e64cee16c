"""JiT's setting: the network predicts data and the loss is in velocities; its drawn times; a run with JiT."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stablevm import cli
from stablevm.bank import ClassBank
from stablevm.draw import ObjectiveSettings
from stablevm.interpolant import COSINE, LINEAR
from stablevm.networks.snapshot import load_card
from stablevm.objective import FlowMatching, StableVM, squared_error
from stablevm.support.errors import UserError
from stablevm.times import draw_times
from stablevm.training.step import BatchDrawer
from tests.helpers import runs

ROOT = Path(__file__).parents[2]
TIMES = {"weighting": "logit_normal", "weighting_mean": 0.8, "weighting_std": 0.8}
JIT = {"model": "JiT-XXS/2", "prediction": "x", "loss_space": "v", **TIMES}
WHOLE = {**JIT, **runs.ALIGNED, "loss_type": "stablevm", "proj_weight_schedule": "sigmoid", "checkpointing_steps": 2}


@pytest.fixture(scope="module")
def whole(root):
    return runs.run(runs.config(root, "whole", sampling_steps=6, **WHOLE))


@pytest.mark.parametrize("path", [LINEAR, COSINE], ids=lambda path: path.name)
@pytest.mark.parametrize("kind", ["si", "stablevm"])
def test_the_loss_is_that_of_the_velocities_with_either_target(kind, path):
    """StableVM's target of the data, weighed, gives the loss of its target of the velocity."""
    stream = torch.Generator().manual_seed(0)
    latents, labels = torch.randn(24, 1, 2, 2, generator=stream), torch.arange(24) % 2
    prediction = torch.randn(24, 1, 2, 2, generator=stream)
    found = {}
    for kind_of_target in ("x", "v"):
        settings = ObjectiveSettings(path, prediction=kind_of_target)
        objective = (
            FlowMatching(settings) if kind == "si" else StableVM(ClassBank(2, 12, (1, 2, 2)), settings, anchors="batch")
        )
        found[kind_of_target] = objective.draw(latents, labels, torch.Generator().manual_seed(5))
    draw = found["x"]
    velocity = path.convert(prediction.double(), draw.x_t.double(), draw.t.double(), "x0", "velocity")
    expected = squared_error(velocity, found["v"].target)
    weighed = squared_error(prediction, draw.target) * path.velocity_weight(draw.t)
    rows = draw.t >= 0.05
    assert 15 < rows.sum() < 24
    torch.testing.assert_close(weighed[rows], expected[rows], rtol=1e-3, atol=1e-4)
    assert (weighed[~rows] < expected[~rows] + 1e-4).all()
    if kind == "stablevm":
        assert (draw.ess > 1.1).any()


def test_the_loss_of_a_run(root, monkeypatch):
    """The network's output starts as 0, so the first loss is the mean square of the targets, weighed."""
    seen = []
    samples = BatchDrawer.samples
    monkeypatch.setattr(BatchDrawer, "samples", lambda *given: (seen.append(samples(*given)), seen[-1])[1])
    folder = runs.run(runs.config(root, "first", max_train_steps=1, gradient_accumulation_steps=2, **JIT))
    (each,), (row,) = seen, map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    weights = each.draw.t.clamp(min=0.05) ** -2
    expected = (each.draw.target.square().flatten(1).mean(1) * weights).mean()
    assert row["loss"] == row["velocity_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_the_token_is_weighed_too(root, monkeypatch):
    seen = []
    samples = BatchDrawer.samples
    monkeypatch.setattr(BatchDrawer, "samples", lambda *given: (seen.append(samples(*given)), seen[-1])[1])
    folder = runs.run(runs.config(root, "token", max_train_steps=1, cls_token=True, **JIT, **runs.ALIGNED))
    (each,), (row,) = seen, map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    expected = (each.cls_target.square().mean(1) * each.weights).mean()
    assert row["cls_token_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_it_is_evaluated_sampled_and_resumed(root, whole):
    settings = runs.config(root, "parts", sampling_steps=6, **WHOLE)
    for steps in (2, 6):
        folder = runs.run(replace(settings, max_train_steps=steps))
    runs.assert_same_checkpoint(folder, whole)
    card = load_card(whole / "checkpoints" / "0000006")
    assert (card.model.kind, card.prediction, card.model.qk_norm) == ("jit", "x", True)
    command = ["generate", "--ckpt", str(whole), "--sample-dir", str(root), "--num-fid-samples", "3", "--name", "x"]
    assert cli.main([*command, "--mode", "ode", "--solver", "heun", "--num-steps", "5", "--cfg-scale", "2"]) == 0


@pytest.mark.slow
def test_two_processes_are_one(root, whole):
    settings = runs.config(root, "two", **WHOLE)
    done = subprocess.run(
        [*runs.TWO_PROCESSES, ROOT / "train.py", *runs.as_arguments(settings)],
        env=runs.ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert runs.losses(settings.folder) == pytest.approx(runs.losses(whole), rel=1e-4)


@pytest.mark.parametrize("path", [LINEAR, COSINE], ids=lambda path: path.name)
def test_times_have_the_mean_and_deviation_that_were_asked_for(path):
    """Seed 0, 20,000 times: |z| < 4 for the mean, and for the deviation."""
    t = draw_times("logit_normal", path, 20_000, torch.Generator().manual_seed(0), mean=0.8, deviation=0.5).double()
    c = path.coefficients(t)
    ratios = (c.sigma / c.alpha).log()
    assert abs(ratios.mean() - 0.8) < 4 * 0.5 / 20_000**0.5
    assert abs(ratios.std() - 0.5) < 4 * 0.5 / 40_000**0.5
    own = draw_times("lognormal", path, 8, torch.Generator().manual_seed(0), mean=-1.2, deviation=1.2)
    assert torch.equal(own, draw_times("lognormal", path, 8, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"loss_space": "x"}, "--loss-space x: expected v, or --prediction x with it"),
        ({**JIT, "contrastive_coeff": 0.05}, "--contrastive-coeff 0.05: expected 0 with --loss-space v"),
        ({"weighting_mean": 0.5}, "--weighting-mean 0.5: expected --weighting lognormal or logit_normal with it"),
        ({"weighting_std": 0.5}, "--weighting-std 0.5: expected --weighting lognormal or logit_normal with it"),
        ({**TIMES, "weighting_std": 0.0}, "--weighting-std 0.0: expected a finite number above 0"),
    ],
)
def test_what_can_not_be_is_refused(options, told, root):
    with pytest.raises(UserError, match=told):
        runs.config(root, **options).validate()


@pytest.mark.parametrize(
    "given", [{"weighting_std": -1.0, "weighting": "lognormal"}, {"weighting_mean": 0.1}, {"weighting_std": 1.0}]
)
def test_the_library_refuses_it_too(given):
    with pytest.raises(UserError, match="weighting_std"):
        ObjectiveSettings(**given)
