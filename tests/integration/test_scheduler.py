"""The scheduler for pipelines of diffusers: a tiny pipeline, and the sampler that it must agree with."""

import pytest
import torch
from diffusers import ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from mixtures import make_mixture
from torch import nn

from stablevm.interpolant import LINEAR
from stablevm.sampling.sampler import SamplerSettings, integrate
from stablevm.sampling.scheduler import StableVSFlowMatchScheduler
from stablevm.sampling.solvers import euler, stable_velocity

SPLIT, BELOW = 0.85, 9


class TinyTransformer(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, channels: int = 2, width: int = 8):
        super().__init__()
        self.enter, self.leave = nn.Linear(channels + 1, width), nn.Linear(width, channels)
        self.block = nn.TransformerEncoderLayer(width, 2, width, dropout=0.0, batch_first=True)

    def forward(self, x, timestep):
        tokens = x.flatten(2).mT
        time = (timestep / 1000).reshape(-1, 1, 1).expand(len(tokens), tokens.shape[1], 1).to(x.dtype)
        return self.leave(self.block(self.enter(torch.cat([tokens, time], -1)))).mT.reshape(x.shape)


class TinyPipeline(DiffusionPipeline):
    """The denoising loop of the flow-matching pipelines of diffusers, and nothing else."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, num_inference_steps, generator):
        x = torch.randn(2, 2, 4, 4, generator=generator, dtype=self.transformer.dtype)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            velocity = self.transformer(x, t.expand(len(x)))
            x = self.scheduler.step(velocity, t, x, generator=generator, return_dict=False)[0]
        return x


def pipeline(scheduler, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyPipeline(TinyTransformer(), scheduler).to(dtype)


def draw(pipe, steps=30):
    return pipe(steps, torch.Generator().manual_seed(1))


def test_it_drops_into_a_pipeline_and_keeps_its_shift():
    pipe = pipeline(FlowMatchEulerDiscreteScheduler(shift=3.0))
    by_euler = draw(pipe)
    base = pipe.scheduler.sigmas
    pipe.scheduler = StableVSFlowMatchScheduler.from_config(pipe.scheduler.config)
    by_stablevs = draw(pipe)
    kept = base[base > SPLIT]
    assert pipe.scheduler.config.shift == 3 and torch.equal(pipe.scheduler.sigmas[: len(kept)], kept)
    # 30 steps of a model with shift 3 are the published 20: 11 above the split and 9 below it.
    assert len(kept) == 11 and len(pipe.scheduler.timesteps) == pipe.scheduler.num_inference_steps == 20
    assert torch.allclose(pipe.scheduler.sigmas[11:], SPLIT * torch.linspace(1, 0, BELOW + 1), atol=1e-6)
    assert torch.allclose(pipe.scheduler.timesteps, 1000 * pipe.scheduler.sigmas[:-1])
    assert (by_stablevs - by_euler).abs().max() < 0.1 * by_euler.std()


def test_configuration_survives_saving(tmp_path):
    options = {"shift": 2.0, "split_time": 0.6, "steps_below": 4, "noise_factor": 0.5}
    pipe = pipeline(StableVSFlowMatchScheduler(**options))
    pipe.save_pretrained(tmp_path)
    loaded = StableVSFlowMatchScheduler.from_pretrained(tmp_path / "scheduler")
    assert {name: loaded.config[name] for name in options} == options
    assert torch.equal(draw(pipeline(loaded)), draw(pipe))
    as_euler = FlowMatchEulerDiscreteScheduler.from_config(loaded.config)
    assert as_euler.config.shift == 2, "and back again"


@pytest.mark.parametrize("noise_factor", [0.0, 0.7])
def test_it_agrees_with_the_sampler_on_the_mixture(noise_factor):
    mixture = make_mixture(20, 6, seed=2)
    scheduler = StableVSFlowMatchScheduler(noise_factor=noise_factor)
    scheduler.set_timesteps(sigmas=[1 - 0.15 * i / 11 for i in range(11)] + [SPLIT])
    assert len(scheduler.timesteps) == 12, "no more steps than were asked for"
    scheduler.set_timesteps(sigmas=[1 - 0.15 * i / 11 for i in range(11)] + [SPLIT] * BELOW)
    settings = SamplerSettings(mode="stablevs", num_steps=20, noise_factor=noise_factor)

    def noises():
        stream = torch.Generator().manual_seed(3)
        return lambda: torch.randn(50, 6, generator=stream)

    noise = noises()
    expected = integrate(lambda x, t, rows=None: mixture.field(LINEAR, x, t), noise, LINEAR, settings)
    stream = torch.Generator().manual_seed(3)
    x = torch.randn(50, 6, generator=stream)
    for t in scheduler.timesteps:
        velocity = mixture.field(LINEAR, x, t.double() / 1000).float()
        x = scheduler.step(velocity, t, x, generator=stream).prev_sample
    assert torch.allclose(x.double(), expected, rtol=0, atol=2e-4)


def test_noise_needs_its_generator_alone_and_half_precision_stays():
    pipe = pipeline(StableVSFlowMatchScheduler(noise_factor=1.0), torch.bfloat16)
    first = draw(pipe, steps=14)
    assert first.dtype == torch.bfloat16 and torch.equal(first, draw(pipe, steps=14))
    assert not torch.equal(first, draw(pipeline(StableVSFlowMatchScheduler(), torch.bfloat16), steps=14))


def test_image_to_image_starts_below_the_split():
    """Few sigmas, all of them low: as many steps as there were, from the first of them; noise is added as ever."""
    scheduler = StableVSFlowMatchScheduler()
    scheduler.set_timesteps(sigmas=[0.6, 0.4, 0.2])
    assert torch.allclose(scheduler.sigmas, torch.tensor([0.6, 0.4, 0.2, 0.0]))
    image, noise = torch.ones(2, 3), torch.zeros(2, 3)
    assert torch.allclose(scheduler.scale_noise(image, scheduler.timesteps[:1].expand(2), noise), image * 0.4)
    velocity = noise - image
    x = 0.4 * image
    for t in scheduler.timesteps:
        x = scheduler.step(velocity, t, x).prev_sample
    assert torch.allclose(x, image)


@pytest.mark.parametrize(
    "options", [{"split_time": 1.0}, {"steps_below": 0}, {"noise_factor": 1.1}, {"invert_sigmas": True}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        StableVSFlowMatchScheduler(**options)


def test_without_noise_a_step_is_eulers():
    x, times = torch.ones(1, 2), torch.tensor([0.8, 0.5, 0.0])
    by_euler, by_posterior = (
        euler(lambda x, t: x * t, x, times),
        stable_velocity(lambda x, t: x * t, x, times, LINEAR, None),
    )
    assert torch.allclose(by_euler, by_posterior)
