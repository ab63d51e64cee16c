"""A tiny data set, a tiny encoder, and short training runs: shared by the tests of training."""

import json
import os
import sys

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from stablevm.data.manifest import Manifest
from stablevm.data.writer import ShardWriter
from stablevm.networks.autoencoder import IDENTITY, LatentSpec, unit_to_pixels
from stablevm.networks.small_net import SmallNet
from stablevm.training.config import TrainConfig
from stablevm.training.trainer import train

SAMPLES, CLASSES = 40, 3
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # of commands that are started as a process
ALIGNED = {"use_proj_loss": True, "enc_type": "digits", "encoder_depth": 1}


def write_data(folder, labels=None, class_names=("zero", "one", "two"), flips=False):
    """40 grey pictures of 8 x 8: a bright bar, whose height depends on the class, on noise."""
    stream = torch.Generator().manual_seed(1)
    labels = torch.arange(SAMPLES) % CLASSES if labels is None else labels
    pixels = torch.randn(len(labels), 1, 8, 8, generator=stream) * 0.2 - 0.5
    pixels[torch.arange(len(labels)), 0, 2 * labels + 1] += 1
    pixels = pixels.clamp(-1, 1)
    latent = LatentSpec(shape=(1, 8, 8), scale=1.0, shift=0.0, autoencoder=IDENTITY)
    writer = ShardWriter(folder, Manifest(class_names, 8, "none", latent, has_flips=flips, has_images=True))
    moments = torch.cat([pixels, torch.full_like(pixels, 0.01)], dim=1).half()
    writer.add(
        moments=moments,
        moments_flip=moments.flip(-1) if flips else None,
        labels=labels,
        index=torch.arange(len(labels)),
        images=unit_to_pixels(pixels).repeat(1, 3, 1, 1),
    )
    writer.finish()
    return folder


def write_encoder(path):
    net = SmallNet(torch.Generator().manual_seed(2))
    save_file(net.state_dict(), path)
    return path


def config(root, name="run", **options):
    """A run of 6 steps on the data and with the encoder in `root`, logging each step."""
    defaults = {
        "output_dir": root / "exps",
        "data_dir": root / "data",
        "model": "SiT-XXS/2",
        "report_to": "none",
        "batch_size": 8,
        "max_train_steps": 6,
        "log_steps": 1,
        "checkpointing_steps": 1000,
        "sampling_steps": 0,
        "num_workers": 0,
        "learning_rate": 1e-3,
        "mixed_precision": "no",
        "ema_decay": 0.9,
        "bank_capacity_per_class": 8,
        "encoder_weights": str(root / "encoder.safetensors"),
    }
    return TrainConfig(exp_name=name, **(defaults | options))


def run(configuration):
    """Train in this process; returns the run's folder."""
    AcceleratorState._reset_state(True)  # accelerate keeps the precision of the first Accelerator of a process
    train(configuration)
    return configuration.folder


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def saved(folder, step):
    """All tensors of a checkpoint: weights, their average, the optimiser's state and the bank."""
    files = (folder / "checkpoints" / f"{step:07d}").glob("*.safetensors")
    return {file.stem: load_file(file) for file in files}


def assert_same_checkpoint(folder, other, step=6):
    one, two = saved(folder, step), saved(other, step)
    assert one.keys() == two.keys() >= {"ema", "model", "optimizer"}
    for part in one:
        assert one[part].keys() == two[part].keys()
        for name, value in one[part].items():
            assert torch.equal(value, two[part][name]), (part, name)


def as_arguments(configuration):
    """The command line of a configuration."""
    words = []
    for name, value in configuration.to_dict().items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words.append(f"--{name}={value}")
    return words
