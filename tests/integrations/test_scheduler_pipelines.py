"""Image to image and inpainting in the pipelines of diffusers themselves, with tiny networks of random weights."""

import itertools

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from stablevm.integrations.diffusers_scheduler import (
    StableVSDPMSolverMultistepScheduler,
    StableVSFlowMatchScheduler,
    StableVSUniPCMultistepScheduler,
)

pytest.importorskip("transformers", reason="diffusers has these pipelines where transformers is installed")

STEPS = 30
PROMPT_WIDTH, POOLED_WIDTH = 32, 64


def autoencoder(channels):
    """An untrained one that leaves the size of an image as it is."""
    return AutoencoderKL(
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def pipeline(name, transformer, scheduler, channels, encoders, **sizes):
    """The pipeline called `name` around a transformer of one layer; without text encoders, which prompts replace."""
    import diffusers

    common = {"patch_size": 1, "in_channels": 16, "num_layers": 1, "num_attention_heads": 2}
    widths = {"joint_attention_dim": PROMPT_WIDTH, "pooled_projection_dim": POOLED_WIDTH}
    parts = {"transformer": getattr(diffusers, transformer)(**common, **widths, **sizes), "vae": autoencoder(channels)}
    return getattr(diffusers, name)(**parts, scheduler=scheduler, **dict.fromkeys(encoders))


def stable_diffusion_3(name, scheduler):
    encoders = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    sizes = {"sample_size": 32, "out_channels": 16, "attention_head_dim": 8, "caption_projection_dim": 16}
    return pipeline(name, "SD3Transformer2DModel", scheduler, 16, encoders, **sizes)


def flux(name, scheduler):
    encoders = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    sizes = {"num_single_layers": 1, "attention_head_dim": 16, "axes_dims_rope": [4, 4, 8]}
    return pipeline(name, "FluxTransformer2DModel", scheduler, 4, encoders, **sizes)


PIPELINES = {
    "StableDiffusion3Img2ImgPipeline": (stable_diffusion_3, {"shift": 3.0}, 1),
    "StableDiffusion3InpaintPipeline": (stable_diffusion_3, {"shift": 3.0}, 1),
    "FluxImg2ImgPipeline": (flux, {"use_dynamic_shifting": True}, 1000),
    "FluxInpaintPipeline": (flux, {"use_dynamic_shifting": True}, 1000),
}


def run(name, scheduler_class, strength):
    """The timesteps at which the network was asked, and the latents that came out."""
    make, options, unit = PIPELINES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = make(name, scheduler_class(**options))
        image = torch.rand(1, 3, 16, 16)
        mask = (torch.rand(1, 1, 16, 16) > 0.5).float()
    pipe.set_progress_bar_config(disable=True)
    asked = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, options: asked.append(unit * options["timestep"][0].item()), with_kwargs=True
    )
    latents = pipe(
        image=image,
        strength=strength,
        num_inference_steps=STEPS,
        prompt_embeds=torch.zeros(1, 4, PROMPT_WIDTH),
        pooled_prompt_embeds=torch.zeros(1, POOLED_WIDTH),
        generator=torch.Generator().manual_seed(0),
        guidance_scale=1.0,
        height=16,
        width=16,
        output_type="latent",
        **({"mask_image": mask} if "Inpaint" in name else {}),
    )[0]
    return asked, latents


@pytest.mark.parametrize("name", PIPELINES)
def test_a_strength_is_the_euler_schedulers(name):
    for strength in (1.0, 0.8, 0.6, 0.4, 0.33, 0.3, 0.1):
        by_euler, expected = run(name, FlowMatchEulerDiscreteScheduler, strength)
        by_stablevs, latents = run(name, StableVSFlowMatchScheduler, strength)
        assert by_stablevs[0] == by_euler[0]
        assert len(by_euler) == round(strength * STEPS) and len(by_stablevs) < len(by_euler)
        assert all(t > after for t, after in itertools.pairwise(by_stablevs))
        assert (latents - expected).abs().max() < 0.1 * expected.std()


@pytest.mark.parametrize("kind", [StableVSDPMSolverMultistepScheduler, StableVSUniPCMultistepScheduler])
@pytest.mark.parametrize("name", PIPELINES)
def test_multistep_schedulers_begin_where_their_base_class_would(name, kind):
    for strength in (0.6, 0.3):
        by_base, expected = run(name, lambda **given: kind(use_fast_low_schedule=False, **given), strength)
        by_stablevs, latents = run(name, kind, strength)
        assert by_stablevs[0] == by_base[0] and len(by_base) == round(strength * STEPS) > len(by_stablevs)
        assert all(t > after for t, after in itertools.pairwise(by_stablevs))
        assert (latents - expected).abs().max() < 0.2 * expected.std()  # 7 steps of order 1 for 18 of order 2
