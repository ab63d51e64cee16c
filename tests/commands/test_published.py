"""The published commands, pasted, on a CPU: a small network, and a tiny data set, autoencoder and encoder."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from stablevm.data.manifest import Manifest
from stablevm.data.writer import ShardWriter
from stablevm.networks.autoencoder import latent_spec_of
from stablevm.networks.encoders import SHORT_NAMES
from stablevm.training.tracker import read_metrics
from tests.helpers.tiny_vae import save_tiny_vae

ROOT = Path(__file__).parents[2]
SIDE, SAMPLES = 256, 8
TRAIN = """
    accelerate launch train.py --report-to=wandb --allow-tf32 --mixed-precision=fp16 --seed=0 --path-type=linear
      --prediction=v --weighting=uniform --model=SiT-XL/2 --output-dir=exps
      --exp-name=linear-stablevm-bank=256-repa-sigmoid-t=0.7-k=20 --data-dir=DATA --loss-type=stablevm
      --bank-capacity-per-class=256 --prefill-bank-fully --max-train-steps=2000000 --use-proj-loss
      --proj-weight-schedule=sigmoid --proj-k=20.0 --proj-tau=0.7
"""
GENERATE = """
    generate.py --model SiT-XL/2 --num-fid-samples 50000 --ckpt CKPT
      --path-type=linear --encoder-depth=8 --projector-embed-dims=768 --per-proc-batch-size=64 --mode=sde
      --num-steps=250 --cfg-scale=1.8 --guidance-high=0.7 --use-projector
"""
# What a CPU changes of them: fp16 needs a GPU, and size and length are cut.
SMALLER = {
    "--mixed-precision=fp16": "--mixed-precision=bf16",
    "--model=SiT-XL/2": "--model=SiT-S/8",
    "--max-train-steps=2000000": "--max-train-steps=2 --batch-size=2 --log-steps=1 --num-workers=1 --sampling-steps=0",
    "--use-proj-loss": "--use-proj-loss --enc-type=dinov2-vit-s --encoder-weights=ENCODER",
    "--model SiT-XL/2": "--model SiT-S/8",
    "--num-fid-samples 50000": "--num-fid-samples 2",
    "--projector-embed-dims=768": "--projector-embed-dims=384",
    "--num-steps=250": "--num-steps=2",
}


def write_data(folder, autoencoder):
    """Eight samples of two classes: latents 4 x 32 x 32, images of 256 pixels."""
    stream = torch.Generator().manual_seed(0)
    latent = latent_spec_of(str(autoencoder), SIDE)
    assert latent.shape == (4, 32, 32)
    description = Manifest(("cat", "dog"), SIDE, "center-crop-dhariwal", latent, has_flips=False, has_images=True)
    writer = ShardWriter(folder / "train", description)
    writer.add(
        moments=torch.rand(SAMPLES, 8, 32, 32, generator=stream).half(),
        labels=torch.arange(SAMPLES) % 2,
        index=torch.arange(SAMPLES),
        images=torch.randint(256, (SAMPLES, 3, SIDE, SIDE), generator=stream).to(torch.uint8),
    )
    writer.finish()
    return folder


def write_encoder(path):
    """DINOv2-S with random weights, in the authors' size of 37 x 37 patches."""
    with torch.random.fork_rng():
        network = timm.create_model(SHORT_NAMES["dinov2-vit-s"].timm_name)
    save_file(network.state_dict(), path)
    return path


def run(command, places, folder):
    words = command.split()
    for old, new in [*SMALLER.items(), *places.items()]:
        words = " ".join(words).replace(old, str(new)).split()
    launcher = ["-m", "accelerate.commands.launch"] if words[:2] == ["accelerate", "launch"] else []
    script, *options = words[2:] if launcher else words
    done = subprocess.run(
        [sys.executable, *launcher, ROOT / script, *options],
        cwd=folder,
        env={**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.mark.slow
def test_published_commands(tmp_path):
    pytest.importorskip("wandb")
    autoencoder = save_tiny_vae(tmp_path / "autoencoder")
    places = {
        "DATA": write_data(tmp_path / "data", autoencoder),
        "ENCODER": write_encoder(tmp_path / "dinov2.safetensors"),
    }
    run(TRAIN, places, tmp_path)
    folder = tmp_path / "exps" / "linear-stablevm-bank=256-repa-sigmoid-t=0.7-k=20"
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(abs(row["alignment_loss"]) <= 1 for row in rows)
    assert all(row["seconds/encoder"] > 0 for row in rows)
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert json.loads((folder / "config.json").read_text())["bank_capacity_per_class"] == 256

    run(GENERATE, {"CKPT": folder / "checkpoints" / "0000002"}, tmp_path)
    (archive,) = (tmp_path / "samples").glob("*.npz")
    images = np.load(archive)["arr_0"]
    assert images.shape == (2, SIDE, SIDE, 3) and images.dtype == np.uint8
