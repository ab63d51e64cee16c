"""On a GPU all results are those of the CPU: draws, bank, targets, guard, average, clock, training, resuming, sampling.

    pytest -m cuda tests/device

Each test runs on the CPU too, where it can only show that the test itself works; without a GPU the others are skipped.
"""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from stablevm.bank import ClassBank
from stablevm.draw import ObjectiveSettings
from stablevm.interpolant import LINEAR
from stablevm.meanflow import MeanFlow
from stablevm.networks.autoencoder import latent_spec_of
from stablevm.networks.registry import build_network, network_config
from stablevm.networks.snapshot import ModelCard
from stablevm.objective import FlowMatching, StableTargetField, StableVM
from stablevm.posterior import posterior
from stablevm.support import rng
from stablevm.training.guard import GuardedAdamW
from stablevm.training.step import PhaseClock
from stablevm.training.weights import MovingAverage
from tests.helpers import runs
from tests.helpers.checkpoints import save_checkpoint, tiny_card
from tests.helpers.tiny_vae import save_tiny_vae

ROOT = Path(__file__).parents[2]
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
CLASSES, ROWS, SHAPE = 3, 12, (4, 8, 8)
SETTINGS = ObjectiveSettings(label_dropout=0.3, null_class=CLASSES, instant_share=0.5)
HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}  # what hides all GPUs from a process


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, NO_GPU])])
def device(request):
    return torch.device(request.param)


@contextmanager
def no_waiting(device):
    """Raise an error where the host would wait for the GPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def batch(device):
    latents = torch.randn(ROWS, *SHAPE, generator=torch.Generator().manual_seed(0))
    return rng.to_device(latents, device), rng.to_device(torch.arange(ROWS) % CLASSES, device)


def objectives(device):
    return {
        "si": FlowMatching(SETTINGS),
        "stf": StableTargetField(SETTINGS),
        "stablevm": StableVM(ClassBank(CLASSES, 6, SHAPE, device=device), SETTINGS),
        "stablevm, batch anchors": StableVM(ClassBank(CLASSES, 6, SHAPE, device=device), SETTINGS, anchors="batch"),
    }


def drawn(name, device, times=3):
    objective, (latents, labels) = objectives(device)[name], batch(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    for step in range(times):  # the first draw of a bank counts what is in it
        streams = rng.RowGenerators.for_keys(0, "device", step, positions=range(ROWS))
        pool = {"pool_generator": rng.generator(0, step)} if name.startswith("stablevm") else {}
        with no_waiting(device):
            draw = objective.draw(latents, labels, streams, **pool)
    return draw


@pytest.mark.parametrize("name", objectives("cpu"))
def test_draws_are_those_of_the_cpu_and_wait_for_nothing(name, device):
    mine, reference = drawn(name, device), drawn(name, torch.device("cpu"))
    for field in fields(reference):
        value, expected = getattr(mine, field.name), getattr(reference, field.name)
        home = "cpu" if field.name.startswith("host_") else device.type
        assert value.device.type == home, field.name
        torch.testing.assert_close(value.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_bank_saves_and_restores_itself(dtype, device):
    latents, labels = batch(device)
    bank, other = (ClassBank(CLASSES, 2, SHAPE, dtype=dtype, device=device) for _ in range(2))
    slots = bank.insert(latents, labels, torch.arange(ROWS, device=device))
    other.load_state_dict({name: value.cpu() for name, value in bank.state_dict().items()})
    kept = slots[slots != bank.discarded_slot]
    assert other.device.type == device.type and torch.equal(other.gather(kept), bank.gather(kept))
    assert torch.equal(other.ids_at(kept), bank.ids_at(kept))


@pytest.mark.parametrize("allowed", [False, True])
def test_weights_of_references_are_float32_whatever_tf32_says(allowed, device):
    stream = torch.Generator().manual_seed(1)
    x0, noise, references = (torch.randn(n, 64, generator=stream) for n in (32, 32, 200))
    t = torch.linspace(0.05, 1, 32)
    exact = posterior(LINEAR, x0.double(), noise.double(), t.double(), references.double())
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        with torch.autocast(device.type, torch.bfloat16):
            found = posterior(LINEAR, *(value.to(device) for value in (x0, noise, t, references)))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    torch.testing.assert_close(found.offset.cpu().double(), exact.offset.double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.ess.cpu().double(), exact.ess.double(), rtol=1e-3, atol=1e-3)


@pytest.mark.cuda
@NO_GPU
def test_the_kernel_of_the_target_agrees_with_float64():
    pytest.importorskip("triton")
    command = [sys.executable, ROOT / "benchmarks" / "target_kernel.py", "--device", "cuda"]
    done = subprocess.run(command, cwd=ROOT, env=runs.ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def network(device, **options):
    config = network_config("SiT-XXS/2", input_size=8, in_channels=4, num_classes=CLASSES, **options)
    return build_network(config, torch.Generator().manual_seed(2)).to(device)


def test_derivatives_of_meanflow_are_those_of_the_cpu(device):
    found = []
    for place in (device, torch.device("cpu")):
        model = network(place, intervals=True)
        with torch.no_grad():
            model.final_layer.linear.weight.fill_(0.05)
        with torch.autocast(place.type, torch.bfloat16):
            found.append(MeanFlow().target(model, drawn("si", place)).cpu())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_the_guard_and_the_average_skip_a_bad_step_without_waiting(device):
    model = network(device)
    average = MovingAverage(model, 0.9)
    optimizer = GuardedAdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    for is_good in (True, False):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) if is_good else torch.full_like(parameter, torch.nan)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        smooth = {name: value.clone() for name, value in average.model.state_dict().items()}
        norm = torch.ones((), device=device) if is_good else torch.full((), torch.nan, device=device)
        with no_waiting(device):
            optimizer.skip = ~norm.isfinite()
            optimizer.step()
            average.update(model, 5, norm.isfinite())
        changed = any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
        followed = any(not torch.equal(value, smooth[name]) for name, value in average.model.state_dict().items())
        assert changed == followed == is_good


def test_the_clock_adds_up_to_the_time_that_passed(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    started, clock = time.perf_counter(), PhaseClock(device)
    values = torch.ones(500, 500, device=device)
    for phase in ("first", "second"):
        for _ in range(20):
            values = (values @ values).clamp(-1, 1)
        clock.end(phase)
    seconds = clock.read()
    passed = time.perf_counter() - started
    assert list(seconds) == ["first", "second"] and 0 < sum(seconds.values()) <= passed * 1.05


def test_copies_to_the_device_are_whole_and_do_not_wait(device):
    values = torch.arange(10_000).reshape(100, 100)
    rng.to_device(values, device)
    with no_waiting(device):
        copies = [rng.to_device(values + number, device) for number in range(20)]
    assert all(torch.equal(copy.cpu(), values + number) for number, copy in enumerate(copies))


def settings_of(root, name, device, **options):
    defaults = {"loss_type": "stablevm", "prefill_bank_fully": True, "weighting": "logit_normal"}
    return runs.config(root, name, **{**defaults, **options}), {} if device.type == "cuda" else HIDDEN


def trained(root, name, device, launcher=(), **options):
    """The folder of a run in a process of its own, which sees only the device."""
    config, hidden = settings_of(root, name, device, **options)
    command = [*(launcher or (sys.executable,)), "-m", "stablevm", "train", *runs.as_arguments(config)]
    done = subprocess.run(command, cwd=ROOT, env={**runs.ENVIRONMENT, **hidden}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return config.folder


@pytest.mark.slow
def test_training_resumes_and_loses_as_on_the_cpu(root, device):
    whole = trained(root, f"whole-{device}", device)
    trained(root, f"halves-{device}", device, max_train_steps=3)
    halves = trained(root, f"halves-{device}", device)
    reference = runs.losses(runs.run(settings_of(root, f"reference-{device}", device)[0]))
    assert runs.losses(halves) == pytest.approx(runs.losses(whole), rel=1e-3)
    assert runs.losses(whole) == pytest.approx(reference, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains(precision, root, device):
    if device.type == "cpu" and precision == "fp16":
        pytest.skip("accelerate has no scaler of gradients on a CPU")
    folder = trained(root, f"{precision}-{device}", device, mixed_precision=precision, **runs.ALIGNED)
    assert len(runs.losses(folder)) == 6 and all(0 < loss < 10 for loss in runs.losses(folder))


@pytest.mark.slow
@pytest.mark.cuda
@NO_GPU
def test_one_gpu_holds_the_shards_of_fsdp(root):
    gpu = torch.device("cuda")
    launcher = (
        *(sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2"),
        *("--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
    )
    sharded = trained(root, "sharded", gpu, launcher)
    assert runs.losses(sharded) == pytest.approx(runs.losses(trained(root, "plain", gpu)), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [("--mode", "sde"), ("--mode", "ode", "--solver", "heun"), ("--mode", "stablevs")])
def test_images_agree_with_the_cpu_to_one_level(mode, tmp_path, device):
    checkpoint, found = save_checkpoint(tmp_path / "checkpoint", tiny_card()), []
    for name, hidden in (("here", {} if device.type == "cuda" else HIDDEN), ("cpu", HIDDEN)):
        command = [sys.executable, "-m", "stablevm", "generate", "--ckpt", str(checkpoint), *mode, "--num-steps", "12"]
        more = ["--num-fid-samples", "16", "--cfg-scale", "1.5", "--sample-dir", str(tmp_path), "--name", name]
        done = subprocess.run([*command, *more], cwd=ROOT, env={**os.environ, **hidden}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        with np.load(tmp_path / f"{name}.npz") as archive:
            found.append(archive["arr_0"].astype(int))
    assert np.abs(found[0] - found[1]).max() <= 1 and found[0].std() > 20


def test_a_pipeline_whose_parts_wait_on_the_cpu_makes_the_same_images(tmp_path, device):
    pytest.importorskip("diffusers")
    from stablevm import StableVMPipeline

    latent = latent_spec_of(str(save_tiny_vae(tmp_path / "vae")), 32)
    model = network_config("SiT-XXS/2", input_size=4, in_channels=4, num_classes=CLASSES)
    card = ModelCard(model, latent, "linear", "v", tuple(map(str, range(CLASSES))), step=1)
    pipe = StableVMPipeline.from_checkpoint(save_checkpoint(tmp_path / "checkpoint", card))
    found = []
    for where in ("cpu", device.type):
        pipe.enable_model_cpu_offload(device=where)
        images = pipe([0, 1, 2], num_inference_steps=8, guidance_scale=1.5, generator=pipe.generators(0, [0, 1, 2]))
        found.append(np.stack([np.asarray(image) for image in images.images]).astype(int))
        assert {pipe.transformer.device.type, pipe.vae.device.type} == {"cpu"}
    assert np.abs(found[0] - found[1]).max() <= 1
