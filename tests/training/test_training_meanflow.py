"""Training with MeanFlow: processes, parts and resuming do not change it, and its images need one step."""

import subprocess

import pytest

from stablevm import cli
from stablevm.support.errors import UserError
from tests.helpers import runs

MEANFLOW = {"meanflow": True, "meanflow_instants": 0.5, "loss_type": "stablevm", "weighting": "logit_normal"}
GUIDED = {"meanflow_omega": 2.0, "meanflow_kappa": 0.5}


@pytest.fixture(scope="module")
def whole(root):
    return runs.run(runs.config(root, "whole", **MEANFLOW, **GUIDED))


def test_parts_of_a_step_are_the_step(root, whole):
    parts = runs.run(runs.config(root, "parts", **MEANFLOW, **GUIDED, gradient_accumulation_steps=2))
    assert runs.losses(parts) == pytest.approx(runs.losses(whole), rel=1e-4)


def test_a_run_resumes_where_it_stopped(root, whole):
    runs.run(runs.config(root, "halves", **MEANFLOW, **GUIDED, max_train_steps=3))
    halves = runs.run(runs.config(root, "halves", **MEANFLOW, **GUIDED))
    runs.assert_same_checkpoint(halves, whole)


@pytest.mark.slow
def test_two_processes_are_one(root, whole):
    two = runs.config(root, "two", **MEANFLOW, **GUIDED)
    command = [*runs.TWO_PROCESSES, "-m", "stablevm", "train", *runs.as_arguments(two)]
    subprocess.run(command, check=True, env=runs.ENVIRONMENT, capture_output=True)
    assert runs.losses(two.folder) == pytest.approx(runs.losses(whole), rel=1e-4)


@pytest.mark.parametrize("options", [{"model": "LightningDiT-XXS/2"}, {"mixed_precision": "bf16"}, runs.ALIGNED])
def test_it_trains_with_other_networks_precisions_and_terms(options, root):
    name = "-".join(options).replace("_", "-")
    found = runs.losses(runs.run(runs.config(root, name, **MEANFLOW, **options, max_train_steps=3)))
    assert len(found) == 3 and all(0 < loss < 10 for loss in found)


def test_images_take_one_evaluation_for_each_step(root, whole, tmp_path, capsys):
    checkpoint = whole / "checkpoints" / "0000006"
    arguments = ["--ckpt", str(checkpoint), "--num-fid-samples", "3", "--sample-dir", str(tmp_path)]
    for steps in ("1", "4"):
        assert cli.generate([*arguments, "--mode", "meanflow", "--num-steps", steps]) == 0
        assert f"{steps} network evaluations per image" in capsys.readouterr().out
    assert cli.generate([*arguments, "--mode", "ode", "--num-steps", "2"]) == 0, "its velocities work too"
    for solver in ("--solver=heun", "--heun"):
        assert cli.generate([*arguments, "--mode", "meanflow", solver]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: {solver.replace('=', ' ')}") and "--mode meanflow" in error


def test_networks_without_intervals_have_no_such_mode(root, tmp_path, capsys):
    plain = runs.run(runs.config(root, "plain", max_train_steps=1))
    arguments = ["--ckpt", str(plain / "checkpoints" / "0000001"), "--sample-dir", str(tmp_path)]
    assert cli.generate([*arguments, "--mode", "meanflow", "--num-steps", "1", "--num-fid-samples", "3"]) == 2
    assert "--mode meanflow: the network was trained without" in capsys.readouterr().err


def test_previews_take_one_step(root, monkeypatch):
    from stablevm.training import evaluation

    asked = []
    draw = evaluation.sample_latents

    def watched(model, card, labels, streams, settings, device, **more):
        asked.append((settings.mode, settings.num_steps, more["guidance"].cfg_scale))
        return draw(model, card, labels, streams, settings, device, **more)

    monkeypatch.setattr(evaluation, "sample_latents", watched)
    runs.run(runs.config(root, "previews", **MEANFLOW, max_train_steps=1, sampling_steps=1))
    assert asked == [("meanflow", 1, 1.0)]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"prediction": "x"}, "--prediction x: expected v with --meanflow"),
        ({"contrastive_coeff": 0.05}, "0 with --meanflow"),
        ({"cfg_prob": 0.0, "meanflow_omega": 2.0}, "--cfg-prob 0.0: expected more than 0 with --meanflow-omega"),
        ({"meanflow_instants": 1.5}, "--meanflow-instants 1.5: expected a probability"),
        ({"meanflow_guidance_low": 0.9, "meanflow_guidance_high": 0.5}, "at least --meanflow-guidance-low 0.9"),
    ],
)
def test_what_does_not_fit_is_refused(options, told, root):
    with pytest.raises(UserError, match=told):
        runs.config(root, **{**MEANFLOW, **options}).validate()


def test_options_without_effect_are_told(root):
    lines = "\n".join(runs.config(root, meanflow_power=0.5).warnings())
    assert "--meanflow-power 0.5 has no effect" in lines
