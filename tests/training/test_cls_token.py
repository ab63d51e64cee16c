"""REG: the encoder's class token is denoised beside the image, in training, after resuming, and in sampling."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stablevm import cli
from stablevm.data.opening import open_dataset
from stablevm.interpolant import LINEAR
from stablevm.networks.encoders import load_encoder
from stablevm.networks.snapshot import load_card
from stablevm.support.errors import UserError
from stablevm.training.step import BatchDrawer
from stablevm.training.terms import Alignment
from tests.helpers import runs

ROOT = Path(__file__).parents[2]
TOKEN = {**runs.ALIGNED, "proj_weight_schedule": "sigmoid", "cls_token": True}
STABLEVM = {**TOKEN, "loss_type": "stablevm", "checkpointing_steps": 2}


@pytest.fixture(scope="module")
def whole(root):
    return runs.run(runs.config(root, "whole", sampling_steps=6, **STABLEVM))


def tokens_of(root):
    encoder = load_encoder("digits", grid_size=4, weights=root / "encoder.safetensors", device="cpu")
    return encoder.pooled(open_dataset(root / "data").images(range(runs.SAMPLES)))


def test_the_tokens_of_all_images_are_written_once(root, whole, monkeypatch):
    tokens = load_file(whole / "cls_tokens.safetensors")["tokens"]
    assert tokens.dtype == torch.float16 and torch.equal(tokens, tokens_of(root).half())
    settings = runs.config(root, "once", **STABLEVM)
    runs.run(replace(settings, max_train_steps=2))
    monkeypatch.setattr("stablevm.training.cls_tokens._encode", None)
    runs.run(replace(settings, max_train_steps=4))


def test_tokens_of_other_images_are_not_taken(root, whole, tmp_path):
    """A run that was killed before its first checkpoint may be started again with other data."""
    shutil.copytree(root, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("exps", "data"))
    runs.write_data(tmp_path / "data", labels=(torch.arange(runs.SAMPLES) + 1) % runs.CLASSES)
    settings = runs.config(tmp_path, "other", **STABLEVM)
    settings.folder.mkdir(parents=True)
    shutil.copy(whole / "cls_tokens.safetensors", settings.folder)
    (settings.folder / "config.json").write_text(json.dumps(settings.to_dict() | {"gradient_accumulation_steps": 1}))
    runs.run(settings)
    found = load_file(settings.folder / "cls_tokens.safetensors")["tokens"]
    assert torch.equal(found, tokens_of(tmp_path).half()) and not torch.equal(found, tokens_of(root).half())


def test_it_is_denoised_on_the_samples_path_and_not_part_of_the_velocity(root, monkeypatch):
    seen = []
    samples = BatchDrawer.samples
    monkeypatch.setattr(BatchDrawer, "samples", lambda *given: (seen.append(samples(*given)), seen[-1])[1])
    folder = runs.run(runs.config(root, "path", max_train_steps=2, **TOKEN))
    for row, each in zip(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()), seen, strict=True):
        draw = each.draw
        assert draw.x_t.shape == (8, 64 + 64) and draw.target.shape == draw.x0.shape == (8, 1, 8, 8)
        assert torch.equal(each.cls_tokens, tokens_of(root).half().float()[draw.ids])
        noise = each.cls_target + each.cls_tokens  # the target of flow matching is noise - data
        x_t = LINEAR.interpolate(each.cls_tokens, noise, draw.t)
        torch.testing.assert_close(draw.x_t[:, 64:], x_t, atol=1e-5, rtol=1e-5)
        assert noise.std() == pytest.approx(1, abs=0.15)
        assert row["loss"] == pytest.approx(
            row["velocity_loss"] + 0.5 * row["alignment_loss"] + 0.03 * row["cls_token_loss"], rel=1e-6
        )
    first, draw = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0]), seen[0].draw
    assert first["velocity_loss"] == pytest.approx(float(draw.target.square().mean()), rel=1e-5), "the output starts 0"
    assert first["cls_token_loss"] == pytest.approx(float(seen[0].cls_target.square().mean()), rel=1e-5)


def test_references_are_weighed_by_image_and_token(root, whole):
    """So the target is unbiased for a network that sees both: the bank holds them as one state."""
    bank = runs.saved(whole, 6)["bank"]
    assert bank["entries"].shape[-1] == 64 + 64
    ids, tokens = bank["ids"].flatten(), tokens_of(root).half().float()
    held = bank["entries"].reshape(len(ids), -1)[ids >= 0]
    assert torch.equal(held[:, 64:].float(), tokens[ids[ids >= 0]])


@pytest.mark.parametrize("irepa", [False, True])
def test_the_networks_token_is_aligned_too_except_by_a_convolution(irepa, root, monkeypatch):
    features = []
    share = Alignment.begin

    def begin(self, samples):
        aim_at = share(self, samples)
        return lambda span: (features.append((aim_at(span).__self__, samples)), aim_at(span))[1]

    monkeypatch.setattr(Alignment, "begin", begin)
    runs.run(runs.config(root, f"aligned-{irepa}", max_train_steps=1, use_irepa=irepa, **TOKEN))
    ((aim, samples),) = features
    assert aim.features[0].shape == (8, 16 if irepa else 17, 64)
    if not irepa:
        assert torch.equal(aim.features[0][:, 0], samples.cls_tokens)


@pytest.mark.parametrize("model", ["SiT-XXS/2", "LightningDiT-XXS/2"])
def test_a_resumed_run_is_the_same(model, root):
    options = {**STABLEVM, "model": model, "gradient_accumulation_steps": 2, "bank_anchors": "batch"}
    whole = runs.run(runs.config(root, f"whole-{model[:3]}", **options))
    settings = runs.config(root, f"parts-{model[:3]}", **options)
    for steps in (2, 6):
        folder = runs.run(replace(settings, max_train_steps=steps))
    runs.assert_same_checkpoint(folder, whole)


def test_a_bank_of_all_the_data_holds_tokens_also_after_resuming(root):
    options = {**STABLEVM, "bank_capacity_per_class": "all"}
    whole = runs.run(runs.config(root, "whole-all", **options))
    settings = runs.config(root, "parts-all", **options)
    for steps in (4, 6):
        folder = runs.run(replace(settings, max_train_steps=steps))
    runs.assert_same_checkpoint(folder, whole)


@pytest.mark.slow
def test_two_processes_are_one(root, whole):
    settings = runs.config(root, "two", **STABLEVM)
    done = subprocess.run(
        [*runs.TWO_PROCESSES, ROOT / "train.py", *runs.as_arguments(settings)],
        env=runs.ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert runs.losses(settings.folder) == pytest.approx(runs.losses(whole), abs=1e-5)
    name = "cls_tokens.safetensors"
    assert (settings.folder / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("how", [["--mode", "ode", "--solver", "dopri5"], ["--mode", "sde"], ["--mode", "stablevs"]])
def test_images_are_generated(how, root, whole, capsys):
    assert (whole / "samples" / "step-0000006.png").exists()
    folder = whole / "checkpoints" / "0000006"
    assert load_card(folder).model.cls_token_dim == 64
    command = ["generate", "--ckpt", str(folder), "--sample-dir", str(root), "--name", how[-1], "--cfg-scale", "1.5"]
    steps = [] if "dopri5" in how else ["--num-steps", "12", "--trajectory"]
    assert cli.main([*command, *how, *steps, "--num-fid-samples", "3"]) == 0
    assert (root / f"{how[-1]}.npz").exists() and (root / f"{how[-1]}.gif").exists() == bool(steps)
    assert cli.main([*command, "--legacy", "--mode", "ode", "--num-fid-samples", "4", "--name", "legacy"]) == 2
    assert "--legacy: the network has a class token, whose states have no channels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"cls_token": True}, "--cls-token: expected --use-proj-loss, whose first encoder gives the token"),
        ({**TOKEN, "meanflow": True}, "--cls-token: expected no --meanflow with it"),
        ({**TOKEN, "cls_coeff": -1.0}, "--cls-coeff -1.0: expected 0 or more"),
    ],
)
def test_what_can_not_be_is_refused(options, told, root):
    with pytest.raises(UserError, match=told):
        runs.config(root, **options).validate()


def test_the_weight_alone_has_no_effect(root):
    assert any("--cls-coeff" in line for line in runs.config(root, cls_coeff=0.1).warnings())


def test_classes_without_samples_are_refused_before_anything_is_written(root):
    settings = runs.config(root, "missing", num_classes=5, **STABLEVM)
    with pytest.raises(UserError, match="has no sample of 2 of 5 classes"):
        runs.run(settings)
    assert not settings.folder.exists()
