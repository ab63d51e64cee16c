"""Checkpointed activations: less is kept for the backward pass, and nothing else changes."""

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stablevm.networks.registry import build_network, network_config
from stablevm.support.errors import UserError
from tests.helpers import runs

ROOT = Path(__file__).parents[2]
OPTIONS = {"loss_type": "stablevm", "gradient_accumulation_steps": 2, **runs.ALIGNED}
MODELS = ("SiT-XXS/2", "LightningDiT-XXS/2")


@pytest.fixture(scope="module")
def whole(root):
    return {model: runs.run(runs.config(root, model.replace("/", "-"), model=model, **OPTIONS)) for model in MODELS}


@pytest.mark.parametrize("model", MODELS)
def test_all_weights_and_moments_are_the_same_bit_for_bit(model, root, whole):
    settings = runs.config(root, f"again-{model.replace('/', '-')}", model=model, **OPTIONS)
    runs.run(replace(settings, max_train_steps=3, checkpoint_activations=True))
    runs.assert_same_checkpoint(runs.run(settings), whole[model])


def noting(kept):
    def pack(tensor):
        kept.append(tensor.nbytes)
        return tensor

    return pack


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_and_only_the_blocks_inputs_are_kept(model, dtype):
    config = network_config(model, input_size=8, in_channels=4, num_classes=3, projector_dims=(8,), encoder_depth=1)
    found = []
    for checkpointed in (False, True):
        network = build_network(config, torch.Generator().manual_seed(3))
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(4))
        if checkpointed:
            network.checkpoint_activations()
        kept: list[int] = []
        stream = torch.Generator().manual_seed(5)
        x, t = torch.randn(6, 4, 8, 8, generator=stream), torch.rand(6, generator=stream)
        hooks = torch.autograd.graph.saved_tensors_hooks(noting(kept), lambda each: each)
        with hooks, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            prediction, tokens = network(x, t, torch.arange(6) % 3, features=True)
        (prediction.float().square().mean() + tokens[0].float().square().mean()).backward()
        gradients = {name: each.grad for name, each in network.named_parameters() if each.requires_grad}
        found.append((sum(kept), gradients))
    (plain, expected), (less, gradients) = found
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    assert less < 0.5 * plain


def test_nothing_is_computed_twice_without_gradients():
    network = build_network(network_config("SiT-XXS/2", input_size=8, in_channels=1, num_classes=2))
    network.checkpoint_activations()
    calls = []
    network.blocks[0].register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    inputs = torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        network(*inputs)
    assert calls == [False]
    network(*inputs).sum().backward()
    assert calls == [False, True, True]


def test_a_network_without_it_is_refused(monkeypatch, root):
    from stablevm.networks.backbone import Backbone
    from stablevm.networks.sit import SiT

    monkeypatch.setattr(SiT, "checkpoint_activations", Backbone.checkpoint_activations)
    with pytest.raises(UserError, match="checkpoint_activations: a network of kind sit does not support it"):
        runs.run(runs.config(root, "refused", checkpoint_activations=True))
    assert not (root / "exps" / "refused").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler here")
def test_with_compiled_blocks(root, whole):
    settings = runs.config(root, "compiled", **OPTIONS, compile=True, checkpoint_activations=True)
    assert runs.losses(runs.run(settings)) == pytest.approx(runs.losses(whole["SiT-XXS/2"]), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["train.py", "tests.helpers.sharded"])
def test_two_processes_are_one(program, root, whole):
    """With DDP, and with FSDP's shards, which each block gathers once more for the backward pass."""
    how = ["-m", program] if program.startswith("tests") else [program]
    settings = runs.config(root, f"two-{program}", **OPTIONS, checkpoint_activations=True)
    done = subprocess.run(
        [*runs.TWO_PROCESSES, *how, *runs.as_arguments(settings)],
        cwd=ROOT, env=runs.ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert runs.losses(settings.folder) == pytest.approx(runs.losses(whole["SiT-XXS/2"]), abs=1e-5)
