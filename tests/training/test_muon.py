"""Muon for the matrices of a network's blocks: matrix by matrix, skipped without a trace, resumed bit for bit."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stablevm import cli
from stablevm.networks.registry import build_network, network_config
from stablevm.support.errors import UserError
from stablevm.training.muon import MOMENTUM, GuardedMuon, make_optimizer
from tests.helpers import runs

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
ROOT = Path(__file__).parents[2]
OPTIONS = {"lr": 0.1, "weight_decay": 0.1}
MUON = {"optimizer": "muon", "checkpointing_steps": 3}
NAN = float("nan")


def weights():
    """A stack of three matrices, one alone, and a bias."""
    stream = torch.Generator().manual_seed(0)
    return torch.nn.ParameterList([torch.randn(size, generator=stream) for size in ((24, 6), (8, 6), (5,))])


def step(parameters, optimizer, seed, skip=None, scale=1.0):
    stream = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = scale * torch.randn(parameter.shape, generator=stream)
    optimizer.skip = None if skip is None else torch.tensor(skip)
    optimizer.step()


def made(parameters):
    return GuardedMuon(list(parameters), {parameters[0]: 3, parameters[1]: 1}, momentum=0.95, **OPTIONS)


def everything(parameters, optimizer):
    states = [value for parameter in parameters for value in optimizer.state[parameter].values()]
    return [value.clone() for value in [*(parameter.detach() for parameter in parameters), *states]]


def test_each_matrix_of_a_stack_is_a_parameter_of_torchs_muon():
    ours, alone = weights(), weights()
    optimizer = made(ours)
    parts = [torch.nn.Parameter(part.clone()) for part in (*alone[0].detach().chunk(3), alone[1].detach())]
    muon = torch.optim.Muon(parts, momentum=0.95, adjust_lr_fn="match_rms_adamw", **OPTIONS)
    adamw = torch.optim.AdamW([alone[2]], fused=True, **OPTIONS)
    for seed in range(3):
        step(ours, optimizer, seed, skip=False)
        for part, gradient in zip(parts, (*ours[0].grad.chunk(3), ours[1].grad), strict=True):
            part.grad = gradient
        alone[2].grad = ours[2].grad
        muon.step(), adamw.step()
    assert torch.equal(ours[0], torch.cat(parts[:3])) and torch.equal(ours[1], parts[3])
    assert torch.equal(ours[2], alone[2])
    assert set(optimizer.state[ours[0]]) == {MOMENTUM} and "exp_avg" in optimizer.state[ours[2]]
    together = GuardedMuon(list(weights()), {}, momentum=0.95, **OPTIONS)
    assert not together.state, "and the gradients of the matrices are still there afterwards"
    assert all(parameter.grad is not None for parameter in ours)


def test_updates_of_each_matrix_are_about_orthogonal_whatever_the_gradients_size():
    """Newton-Schulz leaves singular values between about 0.7 and 1.2."""
    parameters = weights()
    optimizer = GuardedMuon(list(parameters), {parameters[0]: 3}, momentum=0.0, lr=1.0, weight_decay=0.0)
    before = parameters[0].detach().clone()
    step(parameters, optimizer, 0, scale=1e3)
    for part in (before - parameters[0].detach()).chunk(3):
        values = torch.linalg.svdvals(part / (0.2 * 8**0.5))
        assert values.min() > 0.5 and values.max() < 1.4


def test_a_skipped_step_never_was():
    calm, shaken = weights(), weights()
    plain, guarded = made(calm), made(shaken)
    for seed in range(3):
        step(calm, plain, seed, skip=False)
        step(shaken, guarded, seed, skip=False)
        step(shaken, guarded, seed, skip=True, scale=NAN)
        pairs = zip(everything(shaken, guarded), everything(calm, plain), strict=True)
        assert all(torch.equal(*pair) for pair in pairs), seed


def test_the_scalers_overflow_is_skipped_too():
    parameters = weights()
    optimizer, before = made(parameters), [each.detach().clone() for each in parameters]
    optimizer.found_inf = torch.tensor(1.0)
    step(parameters, optimizer, 0)
    assert all(torch.equal(*pair) for pair in zip(parameters, before, strict=True))


@pytest.mark.parametrize(
    ("name", "stacked"),
    [("SiT-XXS/2", {"qkv": 3, "adaLN": 6}), ("LightningDiT-XXS/2", {"qkv": 3, "adaLN": 6, "w12": 2})],
)
def test_the_matrices_of_networks(name, stacked):
    network = build_network(network_config(name, input_size=8, in_channels=1, num_classes=3))
    found = network.hidden_matrices()
    assert all(found_name.startswith("blocks.") for found_name in found) and len(found) == 2 * 5
    for found_name, count in found.items():
        assert count == next((number for part, number in stacked.items() if part in found_name), 1), found_name
        rows, columns = network.get_parameter(found_name).shape
        assert rows % count == 0 and columns > 1
    matrices = {number for each, number in found.items() if "attn.proj" in each}
    assert matrices == {1}


def test_a_network_that_names_no_matrices(root):
    class Plain(torch.nn.Module):
        config = network_config("SiT-XXS/2", input_size=8, in_channels=1, num_classes=3)

        def hidden_matrices(self):
            return {}

    with pytest.raises(UserError, match=r"optimizer muon: a network of kind .* names no matrices for it"):
        make_optimizer(runs.config(root, **MUON), Plain())


@pytest.fixture(scope="module")
def trained(root):
    return runs.run(runs.config(root, "trained", **MUON))


def test_it_resumes_bit_for_bit(root, trained):
    settings = runs.config(root, "stopped", **MUON)
    runs.run(replace(settings, max_train_steps=3))
    runs.run(settings)
    runs.assert_same_checkpoint(settings.folder, trained)
    assert runs.losses(settings.folder) == runs.losses(trained)
    saved = runs.saved(trained, 6)["optimizer"]
    assert "blocks.0.attn.qkv.weight.momentum_buffer" in saved and "x_embedder.proj.weight.exp_avg" in saved
    assert "blocks.0.attn.qkv.weight.exp_avg" not in saved


def test_it_is_neither_changed_nor_added_on_resume(root, trained, capsys):
    settings = runs.config(root, "trained", **MUON)
    assert cli.train(runs.as_arguments(replace(settings, optimizer="adamw", max_train_steps=9))) == 2
    assert "holds a run with --optimizer muon" in capsys.readouterr().err
    warned = runs.config(root, "other", muon_momentum=0.9).warnings()
    assert "--muon-momentum 0.9 has no effect with --optimizer adamw" in warned


def test_a_torch_without_muon_is_named(root, monkeypatch, capsys):
    monkeypatch.delattr(torch.optim, "Muon")
    assert cli.train(runs.as_arguments(runs.config(root, "old", **MUON))) == 2
    assert "--optimizer muon: needs torch 2.9 or newer, this is 2." in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_are_one_and_fsdp_is_refused(root, trained):
    """Sums of gradients differ by rounding, which bfloat16 in Muon's iterations enlarges."""
    settings = runs.config(root, "by-two", **MUON)
    words = runs.as_arguments(settings)
    done = subprocess.run(
        [*runs.TWO_PROCESSES, ROOT / "train.py", *words], env=runs.ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert runs.losses(settings.folder) == pytest.approx(runs.losses(trained), abs=1e-4)
    sharded = [*runs.TWO_PROCESSES, "-m", "tests.helpers.sharded", *words, "--exp-name=sharded"]
    done = subprocess.run(sharded, cwd=ROOT, env=runs.ENVIRONMENT, capture_output=True, text=True)
    assert "--optimizer muon: makes whole matrices orthogonal, which FSDP shards" in done.stderr
