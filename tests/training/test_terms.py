"""Terms of the loss: what contrastive flow matching converges to, and alignment that stops."""

import json
import subprocess
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from stablevm.data.shards import ShardDataset
from stablevm.networks import projectors
from stablevm.networks.encoders import load_encoder
from stablevm.networks.projectors import mlp_projector
from stablevm.objective import FlowMatching, squared_error
from stablevm.support.errors import UserError
from stablevm.training import engine
from stablevm.training.terms import Alignment, Contrast, Output, Samples
from tests.helpers import runs

ROOT = Path(__file__).parents[2]
STOPPED = {**runs.ALIGNED, "proj_weight_schedule": "sigmoid", "loss_type": "stablevm", "proj_stop_step": 3}


def samples_of(draw, *, parts=1, part=0):
    """Those of one of `parts` processes."""
    rows = len(draw.t) // parts
    positions = range(part * rows, (part + 1) * rows)
    firsts = draw.target.unflatten(0, (parts, rows))[:, :1].flatten(0, 1)
    own = replace(
        draw, target=draw.target[positions.start : positions.stop], t=draw.t[positions.start : positions.stop]
    )
    return Samples(own, None, positions, lambda value: value * parts, lambda value: firsts)


def drawn(count, classes=2, seed=0):
    """Data of two classes with means -1 and 3, and their targets."""
    stream = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=stream)
    latents = 0.5 * torch.randn(count, 1, 1, 1, generator=stream) + 4.0 * labels.view(-1, 1, 1, 1) - 1
    return labels, FlowMatching().draw(latents, labels, stream)


def value(prediction, draw, **processes):
    return Contrast(0.05).begin(samples_of(draw, **processes))(slice(None))(Output(prediction, []))


@pytest.mark.parametrize("weight", [0.05, 0.5])
def test_the_minimum_is_shifted_away_from_the_other_target(weight):
    _, draw = drawn(6)
    best = (draw.target - weight * draw.target.roll(-1, dims=0)) / (1 - weight)
    for prediction, is_minimum in ((best, True), (draw.target, False)):
        free = prediction.clone().requires_grad_()
        (squared_error(free, draw.target).mean() + weight * value(free, draw)).backward()
        assert torch.allclose(free.grad, torch.zeros_like(free), atol=1e-6) == is_minimum


def test_a_prediction_for_each_class_lies_farther_from_the_mean_by_a_fixed_factor():
    """Its minimum is linear in targets: per class, (mean - L * mean of the others) / (1 - L). Seed 0, 200,000 samples:
    |z| < 4.
    """
    weight, count = 0.2, 200_000
    labels, draw = drawn(count)
    v, others = draw.target.flatten(), draw.target.flatten().roll(-1)
    overall = v.mean()
    for label in (0, 1):
        of_class = labels == label
        optimum = (v[of_class].mean() - weight * others[of_class].mean()) / (1 - weight)
        predicted = overall + (v[of_class].mean() - overall) / (1 - weight)
        error = weight / (1 - weight) * others[of_class].std() / of_class.sum().sqrt()
        assert abs(optimum - predicted) < 4 * error
        assert abs(optimum - v[of_class].mean()) > 40 * error, "flow matching's minimum is another"


def test_processes_have_the_others_of_one():
    _, draw = drawn(8)
    prediction = torch.randn(draw.target.shape, generator=torch.Generator().manual_seed(1))
    whole = value(prediction, draw)
    assert whole == pytest.approx(float(-squared_error(prediction, draw.target.roll(-1, dims=0)).mean()), rel=1e-5)
    halves = [value(prediction[4 * part : 4 * part + 4], draw, parts=2, part=part) for part in (0, 1)]
    torch.testing.assert_close(sum(halves), whole)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_contrast_is_summed_and_logged_whatever_the_parts(root):
    found = [
        rows(
            runs.run(runs.config(root, f"contrast-{parts}", contrastive_coeff=0.05, gradient_accumulation_steps=parts))
        )
        for parts in (1, 2)
    ]
    for row, other in zip(*found, strict=True):
        assert row["loss"] == pytest.approx(row["velocity_loss"] + 0.05 * row["contrastive_loss"], rel=1e-6)
        assert "seconds/encoder" not in row, "the term has no encoder"
        assert row["contrastive_loss"] < 0 and other["loss"] == pytest.approx(row["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"contrastive_coeff": 1.0}, r"--contrastive-coeff 1.0: expected a weight in \[0, 1\)"),
        ({"contrastive_coeff": 0.1, "batch_size": 1}, "0 with --batch-size 1: there is no other sample"),
        ({"proj_stop_step": -1}, "--proj-stop-step -1: expected 0 or more"),
    ],
)
def test_values_that_can_not_be_are_refused(options, told, root):
    with pytest.raises(UserError, match=told):
        runs.config(root, **options).validate()


@pytest.fixture(scope="module")
def stopped(root):
    return runs.run(runs.config(root, "stopped", checkpointing_steps=2, **STOPPED))


def test_alignment_stops_and_nothing_is_encoded_or_read_any_more(root, stopped, monkeypatch):
    seen = {"encoded": 0, "read": 0}

    def counted(name, function):
        def count(*arguments):
            seen[name] += 1
            return function(*arguments)

        return count

    monkeypatch.setattr(Alignment, "features", counted("encoded", Alignment.features))
    monkeypatch.setattr(ShardDataset, "images", counted("read", ShardDataset.images))
    folder = runs.run(runs.config(root, "counted", **STOPPED))
    assert seen == {"encoded": 3, "read": 3}
    aligned = rows(runs.run(runs.config(root, "aligned", **{**STOPPED, "proj_stop_step": 0})))
    for row, other in zip(rows(folder), aligned, strict=True):
        assert (row["alignment_loss"] != 0) == (row["step"] <= 3) and other["alignment_loss"] != 0
        if row["step"] <= 3:
            assert row["loss"] == other["loss"]
        else:
            assert row["loss"] == row["velocity_loss"]


def test_encoders_and_projectors_are_idle_after_the_stop(root, monkeypatch):
    """The encoder is gone from memory, and no token is projected; gradients of the projectors are 0, not missing."""
    loaded, projected = [], []

    def load(*arguments, **options):
        loaded.append(weakref.ref(encoder := load_encoder(*arguments, **options)))
        return encoder

    class Counted(nn.Sequential):
        def forward(self, tokens):
            projected.append(loaded[0]() is not None)
            return super().forward(tokens)

    monkeypatch.setattr(engine, "load_encoder", load)
    monkeypatch.setattr(projectors, "mlp_projector", lambda *sizes: Counted(*mlp_projector(*sizes)))
    folder = runs.run(runs.config(root, "idle", max_train_steps=5, **STOPPED))
    assert projected == [True] * 3 and loaded[0]() is None
    moments = runs.saved(folder, 5)["optimizer"]
    assert {float(moments[name]) for name in moments if name.endswith(".step") and "projectors" in name} == {5.0}


def test_a_run_that_stops_aligning_is_resumed_before_and_after(root, stopped):
    """At step 2, which still aligns, and at 4, which does not."""
    settings = runs.config(root, "parts", checkpointing_steps=2, **STOPPED)
    for steps in (2, 4, 6):
        folder = runs.run(replace(settings, max_train_steps=steps))
    runs.assert_same_checkpoint(folder, stopped)


def test_when_it_stops_may_change_on_resume_and_a_line_says_so(root, capsys):
    settings = runs.config(root, "changed", **{**STOPPED, "proj_stop_step": 0})
    runs.run(replace(settings, max_train_steps=2))
    assert "--proj-stop-step" not in capsys.readouterr().out
    found = rows(runs.run(replace(settings, proj_stop_step=4)))
    assert "--proj-stop-step 4 from step 2 on, instead of --proj-stop-step 0" in capsys.readouterr().out
    assert [row["alignment_loss"] != 0 for row in found] == [True] * 4 + [False] * 2


@pytest.mark.slow
@pytest.mark.parametrize("options", [STOPPED, {"contrastive_coeff": 0.3, "loss_type": "stablevm"}], ids=str)
def test_two_processes_are_one(options, root, stopped):
    name = "stopped" if "proj_stop_step" in options else "contrast"
    alone = runs.run(runs.config(root, f"one-{name}", **options))
    settings = runs.config(root, f"two-{name}", **options)
    done = subprocess.run(
        [*runs.TWO_PROCESSES, ROOT / "train.py", *runs.as_arguments(settings)],
        env=runs.ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert runs.losses(settings.folder) == pytest.approx(runs.losses(alone), abs=1e-5)
