"""The schedulers in the pipelines of diffusers themselves, with tiny networks of random weights.

Images and videos from text, from images and from videos, inpainting; in each the schedulers are made from the
configuration of the pipeline's own.
"""

import functools
import itertools

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from stablevm.integrations.diffusers_scheduler import (
    StableVSDPMSolverMultistepScheduler,
    StableVSFlowMatchScheduler,
    StableVSUniPCMultistepScheduler,
)
from tests.helpers.tiny_pipelines import embeddings, tiny_pipeline

pytest.importorskip("transformers", reason="diffusers has these pipelines where transformers is installed")

STEPS = 30
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 256, "base_shift": 0.5}
SCHEDULERS = {
    "StableDiffusion3": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "Flux": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0, max_image_seq_len=4096, max_shift=1.15, **DYNAMIC),
    "QwenImage": lambda: FlowMatchEulerDiscreteScheduler(
        shift=1.0, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02, **DYNAMIC
    ),
    "Wan": lambda: UniPCMultistepScheduler(flow_shift=3.0, **FLOW),
}
TO_IMAGE = ("Img2ImgPipeline", "InpaintPipeline")
FROM_TEXT = ["StableDiffusion3Pipeline", "FluxPipeline", "QwenImagePipeline", "WanPipeline"]
FROM_IMAGES = [*map("".join, itertools.product(("StableDiffusion3", "Flux", "QwenImage"), TO_IMAGE)),
               "WanVideoToVideoPipeline"]  # fmt: skip
KINDS = [StableVSFlowMatchScheduler, StableVSDPMSolverMultistepScheduler, StableVSUniPCMultistepScheduler]
each_kind = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def made(name):
    """The pipeline, and the configuration of its own scheduler."""
    own = next(make for start, make in SCHEDULERS.items() if name.startswith(start))()
    pipe = tiny_pipeline(name, own, with_text=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe, own.config


def inputs(name):
    """What the pipeline begins with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = {"height": 32, "width": 32}
        if name == "WanPipeline":
            return size | {"num_frames": 5}
        if name in FROM_TEXT:
            return size
        if name == "WanVideoToVideoPipeline":
            return size | {"video": [torch.rand(5, 3, 32, 32)]}
        mask = {"mask_image": (torch.rand(1, 1, 32, 32) > 0.5).float()} if "Inpaint" in name else {}
        return size | {"image": torch.rand(1, 3, 32, 32), **mask}


def run(name, scheduler, **call):
    """The times at which the network was asked, of 1000, and the latents that came out."""
    pipe, _ = made(name)
    pipe.scheduler = scheduler
    asked = []
    unit = 1000 if name.startswith(("Flux", "QwenImage")) else 1
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, options: asked.append(unit * options["timestep"].flatten()[0].item()), with_kwargs=True
    )
    guidance = {} if name.startswith("QwenImage") else {"guidance_scale": 1.0}
    generator = torch.Generator().manual_seed(0)
    call |= {"num_inference_steps": STEPS, "generator": generator, "output_type": "latent", **guidance}
    latents = pipe(**embeddings(name), **inputs(name), **call)[0]
    hook.remove()
    return asked, latents


@each_kind
@pytest.mark.parametrize("name", FROM_TEXT)
def test_from_text_by_fewer_evaluations(name, kind):
    _, config = made(name)
    by_base, expected = run(name, kind.from_config(config, use_fast_low_schedule=False))
    by_stablevs, latents = run(name, kind.from_config(config))
    above = sum(t >= 850 for t in by_base)
    assert len(by_base) == STEPS and len(by_stablevs) == above + 9
    assert by_stablevs[:above] == by_base[:above]
    assert (latents - expected).abs().max() < 0.1 * expected.std()


@each_kind
@pytest.mark.parametrize("name", FROM_IMAGES)
def test_a_strength_is_the_base_classs(name, kind):
    _, config = made(name)
    for strength in (0.6, 0.3):
        by_base, expected = run(name, kind.from_config(config, use_fast_low_schedule=False), strength=strength)
        by_stablevs, latents = run(name, kind.from_config(config), strength=strength)
        assert by_stablevs[0] == by_base[0] and len(by_base) == round(strength * STEPS) > len(by_stablevs)
        assert all(t > after for t, after in itertools.pairwise(by_stablevs))
        assert (latents - expected).abs().max() < 0.2 * expected.std()


@pytest.mark.parametrize("name", [name for name in FROM_IMAGES if not name.startswith("Wan")])
def test_a_strength_is_the_euler_schedulers(name):
    """Of the Euler scheduler itself, for the strengths at the ends."""
    _, config = made(name)
    for strength in (1.0, 0.33, 0.1):
        by_euler, expected = run(name, FlowMatchEulerDiscreteScheduler.from_config(config), strength=strength)
        by_stablevs, latents = run(name, StableVSFlowMatchScheduler.from_config(config), strength=strength)
        assert by_stablevs[0] == by_euler[0] and len(by_stablevs) <= len(by_euler)
        assert (latents - expected).abs().max() < 0.1 * expected.std()


def test_wan_with_two_networks():
    """Wan 2.2 changes the network at a time, which lies within the steps above the split or below it."""
    pipe, config = made("WanPipeline")
    pipe.register_modules(transformer_2=pipe.transformer)
    try:
        for boundary in (0.875, 0.5):
            pipe.register_to_config(boundary_ratio=boundary)
            asked, latents = run("WanPipeline", StableVSUniPCMultistepScheduler.from_config(config))
            assert len(asked) == 20 and latents.isfinite().all()
    finally:
        pipe.register_to_config(boundary_ratio=None)
        pipe.register_modules(transformer_2=None)
