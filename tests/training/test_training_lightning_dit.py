"""StableVM and VA-REPA with LightningDiT on latents of 32 x 8 x 8: trained, killed, resumed, sampled, evaluated."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from stablevm import cli
from stablevm.data.manifest import Manifest
from stablevm.data.writer import ShardWriter
from stablevm.evaluation.config import ReferenceConfig
from stablevm.evaluation.reference import reference
from stablevm.networks.autoencoder import latent_spec_of, load_autoencoder
from stablevm.networks.snapshot import load_card
from tests.helpers import runs
from tests.helpers.tiny_vae import save_tiny_vae

TRAIN = Path(__file__).parents[2] / "train.py"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pictures of 8 x 8 pixels, encoded by an autoencoder that keeps the side."""
    folder = tmp_path_factory.mktemp("lightning")
    runs.write_encoder(folder / "encoder.safetensors")
    latent = latent_spec_of(str(save_tiny_vae(folder / "vae", widths=(4,), latent_channels=32)), 8)
    assert latent.shape == (32, 8, 8)
    coder = load_autoencoder(latent)
    stream = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (runs.SAMPLES, 3, 8, 8), generator=stream, dtype=torch.uint8)
    writer = ShardWriter(
        folder / "data", Manifest(("a", "b", "c"), 8, "none", latent, has_flips=False, has_images=True)
    )
    rows = torch.arange(len(images))
    moments = coder.encode(images).half()
    writer.add(moments=moments, moments_flip=None, labels=rows % 3, index=rows, images=images)
    writer.finish()
    reference(ReferenceConfig(source=folder / "data", output=folder / "ref.npz", statistics=False))
    return folder


def settings(root, name, **options):
    model = {"model": "LightningDiT-XXS/2", "qk_norm": True, "loss_type": "stablevm", **runs.ALIGNED}
    return runs.config(root, name, **{**model, "checkpointing_steps": 2, **options})


@pytest.fixture(scope="module")
def whole(root):
    evaluated = {"eval_reference": str(root / "ref.npz"), "eval_samples": 12, "eval_enc_type": "digits"}
    more = {"eval_every": 6, "eval_weights": str(root / "encoder.safetensors"), **evaluated}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        return runs.run(settings(root, "whole", **more))


def test_it_is_evaluated_and_sampled(root, whole):
    assert '"eval_frechet_distance"' in (whole / "metrics.jsonl").read_text()
    folder = whole / "checkpoints" / "0000006"
    card = load_card(folder)
    assert (card.model.kind, card.latent.shape, card.model.projector_dims) == ("lightning_dit", (32, 8, 8), (64,))
    command = ["generate", "--ckpt", str(folder), "--sample-dir", str(root), "--name", "x", "--num-fid-samples", "5"]
    assert cli.main([*command, "--mode", "stablevs", "--num-steps", "4", "--steps-below", "2", "--cfg-scale", "2"]) == 0
    assert (root / "x.npz").is_file()
    features = ["--no-inception", "--encoder", "digits", "--encoder-weights", str(root / "encoder.safetensors")]
    command = [
        "evaluate",
        str(root / "x.npz"),
        "--reference",
        str(root / "ref.npz"),
        "--cache-dir",
        str(root / "cache"),
    ]
    assert cli.main([*command, *features, "--output", str(root / "numbers.json")]) == 0
    assert "frechet_distance" in (root / "numbers.json").read_text()


def test_killed_and_resumed_it_is_the_same(root, whole):
    """The kill comes as soon as there is a checkpoint, wherever the process is then."""
    options = settings(root, "killed")
    process = subprocess.Popen(
        [sys.executable, TRAIN, *runs.as_arguments(options)],
        env=runs.ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    while process.poll() is None and not (options.folder / "checkpoints" / "0000002").is_dir():
        time.sleep(0.01)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    runs.assert_same_checkpoint(runs.run(options), whole)


@pytest.mark.slow
def test_two_processes_are_one(root, whole):
    options = settings(root, "two")
    done = subprocess.run(
        [*runs.TWO_PROCESSES, TRAIN, *runs.as_arguments(options)], env=runs.ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = map(json.loads, (whole / "metrics.jsonl").read_text().splitlines())
    expected = [row["loss"] for row in rows if "loss" in row]  # not of the evaluation
    assert len(expected) == 6 and runs.losses(options.folder) == pytest.approx(expected, abs=1e-5)
