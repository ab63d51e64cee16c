"""The scheduler for pipelines of diffusers: a tiny pipeline, and the sampler that it must agree with."""

import copy
import pickle

import numpy as np
import pytest
import torch
from diffusers import (
    ConfigMixin,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    ModelMixin,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import register_to_config
from torch import nn

from stablevm.integrations.diffusers_scheduler import StableVSFlowMatchScheduler
from stablevm.interpolant import LINEAR
from stablevm.solvers.fixed_steps import euler, heun, ode_times, stable_velocity, thinned
from stablevm.solvers.integration import integrate
from stablevm.solvers.settings import SamplerSettings
from stablevm.toy.mixture import GaussianMixture
from tests.helpers.mixtures import make_mixture

SPLIT, BELOW = 0.85, 9
# Printed by the published scheduler for 30 steps, shift 3, split 0.85 and 9 steps below.
PUBLISHED_SIGMAS = [0.8513, 0.8314, 0.7878, 0.7380, 0.6808, 0.6143, 0.4915, 0.3887, 0.2626, 0.1043, 0.0]


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
    assert [round(sigma, 4) for sigma in pipe.scheduler.sigmas[10:].tolist()] == PUBLISHED_SIGMAS
    assert torch.equal(pipe.scheduler.timesteps, 1000 * pipe.scheduler.sigmas[:-1])
    assert (by_stablevs - by_euler).abs().max() < 0.1 * by_euler.std()


def test_configuration_survives_saving(tmp_path):
    options = {"shift": 2.0, "split_time": 0.6, "steps_below": 4, "noise_factor": 0.5, "grid_below": "even"}
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
    scheduler = StableVSFlowMatchScheduler(noise_factor=noise_factor, grid_below="even")
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
    assert torch.allclose(x, expected, rtol=0, atol=2e-4)


def test_noise_needs_its_generator_alone_and_half_precision_stays():
    pipe = pipeline(StableVSFlowMatchScheduler(noise_factor=1.0), torch.bfloat16)
    first = draw(pipe, steps=14)
    assert first.dtype == torch.bfloat16 and torch.equal(first, draw(pipe, steps=14))
    assert not torch.equal(first, draw(pipeline(StableVSFlowMatchScheduler(), torch.bfloat16), steps=14))


@pytest.mark.parametrize("grid_below", ["schedule", "even"])
def test_few_sigmas_all_below_the_split_stay(grid_below):
    scheduler = StableVSFlowMatchScheduler(grid_below=grid_below)
    scheduler.set_timesteps(sigmas=[0.6, 0.4, 0.2])
    assert torch.allclose(scheduler.sigmas, torch.tensor([0.6, 0.4, 0.2, 0.0]))
    image, noise = torch.ones(2, 3), torch.zeros(2, 3)
    assert torch.allclose(scheduler.scale_noise(image, scheduler.timesteps[:1].expand(2), noise), image * 0.4)
    velocity = noise - image
    x = 0.4 * image
    for t in scheduler.timesteps:
        x = scheduler.step(velocity, t, x).prev_sample
    assert torch.allclose(x, image)


# --- grids ---


def test_the_even_grid_starts_from_exactly_the_split():
    scheduler = StableVSFlowMatchScheduler(shift=3.0, grid_below="even")
    scheduler.set_timesteps(30)  # Euler: ... .8701 .8513, of which the latter is left out
    assert scheduler.sigmas[9] == pytest.approx(0.8701, abs=1e-4)
    assert torch.allclose(scheduler.sigmas[10:], SPLIT * torch.linspace(1, 0, BELOW + 1), atol=1e-6)
    assert torch.allclose(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])


def test_what_is_thinned():
    assert thinned(19, 9).tolist() == [0, 2, 4, 6, 8, 11, 13, 15, 17]  # ties go to the even number, as published
    assert thinned(10, 9).tolist() == list(range(9)) and thinned(9, 9).tolist() == list(range(9))
    assert thinned(3, 9).tolist() == [0, 1, 2] and thinned(7, 1).tolist() == [0] and thinned(0, 9).tolist() == []
    for count in range(40):
        for kept in range(1, 12):
            assert len(set(thinned(count, kept).tolist())) == min(count, kept)


def error_to_the_ode(mixture, scheduler, steps):
    """Root mean square distance of 500 points from the ends of the mixture's exact flow, and the number of steps."""
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(1)).double()
    exact = heun(lambda x, t: mixture.field(LINEAR, x, t), x, ode_times(300))
    scheduler.set_timesteps(steps)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        x = scheduler.step(mixture.field(LINEAR, x.double(), sigma.double()), t, x).prev_sample
    return (x - exact).square().sum(1).mean().sqrt().item(), len(scheduler.timesteps)


def test_neither_grid_is_always_nearer_to_the_ode():
    """Figures of docs/differences.md, in two dimensions with a shift of 3."""
    angles = torch.arange(8).double() * torch.pi / 4
    ring = 4 * torch.stack([angles.cos(), angles.sin()], 1)
    wide = GaussianMixture(torch.full((8,), 1 / 8).double(), ring, torch.full((8, 2), 0.25).double())
    errors = {}
    for name, mixture in {"narrow": make_mixture(8, 2, seed=0), "wide": wide}.items():
        for grid in ("schedule", "even"):
            errors[name, grid] = error_to_the_ode(
                mixture, StableVSFlowMatchScheduler(shift=3.0, grid_below=grid), steps=30
            )
        errors[name, "euler"] = error_to_the_ode(mixture, FlowMatchEulerDiscreteScheduler(shift=3.0), steps=30)
    assert {taken for _, taken in errors.values()} == {19, 20, 30}
    assert errors["narrow", "even"] < errors["narrow", "schedule"]
    assert errors["wide", "schedule"] < errors["wide", "even"]


def test_a_shift_that_depends_on_the_image():
    euler_scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    scheduler = StableVSFlowMatchScheduler.from_config(euler_scheduler.config)
    for each in (euler_scheduler, scheduler):
        each.set_timesteps(sigmas=np.linspace(1, 1 / 30, 30).tolist(), mu=1.15)
    assert set(scheduler.sigmas.tolist()) < set(euler_scheduler.sigmas.tolist())
    assert scheduler.sigmas[0] == 1 and (scheduler.sigmas[:-1] < SPLIT).sum() == BELOW


# --- the middle of a schedule ---

STRENGTHS = [1.0, 0.8, 0.6, 0.4, 0.33, 0.3, 0.1, 0.01]


def cut(scheduler, steps, strength):
    """As pipelines of diffusers do it (Stable Diffusion 3: by the steps asked for)."""
    start = int(max(steps - min(steps * strength, steps), 0))
    return scheduler.timesteps[start:], start


@pytest.mark.parametrize("grid_below", ["schedule", "even"])
@pytest.mark.parametrize("says_where", [True, False])
def test_a_strength_is_the_euler_schedulers(grid_below, says_where):
    x, noise = torch.zeros(1, 2), torch.ones(1, 2)
    for strength in STRENGTHS:
        begun = []
        for scheduler in (
            FlowMatchEulerDiscreteScheduler(shift=3.0),
            StableVSFlowMatchScheduler(shift=3.0, grid_below=grid_below),
        ):
            scheduler.set_timesteps(30)
            timesteps, start = cut(scheduler, 30, strength)
            if says_where:
                scheduler.set_begin_index(start)
            begun.append((timesteps[0], scheduler.scale_noise(x, timesteps[:1], noise)))
        assert begun[0][0] == begun[1][0] and torch.equal(begun[0][1], begun[1][1])
        assert (timesteps.diff() < 0).all()
        for t in timesteps:
            assert scheduler.sigmas[scheduler.step_index or start] * 1000 == pytest.approx(t.item(), rel=1e-5)
            assert scheduler.scale_noise(0 * noise, t[None], noise)[0, 0].item() == pytest.approx(
                t.item() / 1000, rel=1e-5
            )
            x = scheduler.step(noise, t, x).prev_sample
        assert scheduler.sigmas[scheduler.step_index] == 0, "it ends with the image"


def test_sigmas_are_cut_with_the_timesteps():
    """LTX slices both, without setting a begin index."""

    def get_timesteps(sigmas, timesteps, start):
        return sigmas[start:], timesteps[start:]

    scheduler = StableVSFlowMatchScheduler(shift=3.0)
    scheduler.set_timesteps(30)
    sigmas, timesteps = get_timesteps(scheduler.sigmas, scheduler.timesteps, 21)
    assert torch.equal(1000 * sigmas[:-1], timesteps) and timesteps[0] == pytest.approx(536.03, abs=0.01)
    assert scheduler.sigmas[12:].tolist() == scheduler.sigmas.tolist()[12:], "to whoever looks, a tensor"


def test_a_run_from_the_start_after_a_look_at_the_middle():
    scheduler = StableVSFlowMatchScheduler(shift=3.0)
    scheduler.set_timesteps(30)
    scheduler.timesteps[18:]
    x = torch.zeros(1, 2)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.ones(1, 2), t, x).prev_sample
    assert torch.allclose(x, torch.full((1, 2), -1.0)) and len(scheduler.timesteps) == 20


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_scheduler_that_is_copied_in_the_middle(duplicate):
    """LTX-2 copies one for its sound."""
    scheduler = StableVSFlowMatchScheduler(shift=3.0)
    scheduler.set_timesteps(30)
    other = duplicate(scheduler)
    assert repr(other.timesteps) == repr(torch.tensor(scheduler.timesteps.tolist()))
    assert torch.equal(other.timesteps[18:], scheduler.timesteps[18:])
    other.set_begin_index(18)
    assert len(scheduler.timesteps) == 20 and other.begin_index == 18 and scheduler.begin_index is None


@pytest.mark.parametrize("grid_below", ["schedule", "even"])
def test_the_network_is_asked_at_timesteps_that_belong_to_the_sigmas(grid_below):
    """Pairs of a schedule of one's own: timestep 1000 sigma^2, say. They were 1000 900 800 700 850 708 before."""
    sigmas = np.linspace(1, 0.05, 20)
    scheduler = StableVSFlowMatchScheduler(steps_below=6, grid_below=grid_below)
    scheduler.set_timesteps(sigmas=sigmas.tolist(), timesteps=(1000 * sigmas**2).tolist())
    assert len(scheduler.timesteps) < 20 and (scheduler.timesteps.diff() < 0).all()
    expected = np.interp(scheduler.sigmas[:-1], [0, *sigmas[::-1]], [0, *1000 * sigmas[::-1] ** 2])
    assert np.allclose(scheduler.timesteps, expected, rtol=1e-5)


# --- configurations ---


def test_a_saved_pipeline_loads(tmp_path):
    pipe = pipeline(StableVSFlowMatchScheduler(shift=2.0, split_time=0.6, steps_below=4))
    pipe.save_pretrained(tmp_path)
    loaded = TinyPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.scheduler, StableVSFlowMatchScheduler) and loaded.scheduler.config.split_time == 0.6
    assert torch.allclose(draw(loaded), draw(pipe), atol=1e-5)


PUBLISHED = {
    "use_fast_low_schedule": True,
    "fast_low_split_point": 0.7,
    "fast_low_low_substeps": 5,
    "low_region_noise_factor": 0.1,
}


@pytest.mark.parametrize("make", [lambda options: StableVSFlowMatchScheduler(**options),
                                  StableVSFlowMatchScheduler.from_config,
                                  lambda options: StableVSFlowMatchScheduler.from_config({"shift": 1.0}, **options),
                                  lambda options: StableVSFlowMatchScheduler.from_config(
                                      StableVSFlowMatchScheduler(split_time=0.3).config, **options)])  # fmt: skip
def test_published_names_of_arguments(make):
    config = make(PUBLISHED).config
    assert (config.split_time, config.steps_below, config.noise_factor) == (0.7, 5, 0.1)


def test_a_name_and_its_published_one_are_not_both_given():
    with pytest.raises(TypeError, match="fast_low_split_point: the published name of split_time"):
        StableVSFlowMatchScheduler(split_time=0.6, fast_low_split_point=0.7)


def test_switched_off_it_is_the_euler_scheduler():
    by_euler = draw(pipeline(FlowMatchEulerDiscreteScheduler(shift=3.0)))
    off = pipeline(StableVSFlowMatchScheduler(shift=3.0, use_fast_low_schedule=False, noise_factor=1.0))
    assert torch.equal(draw(off), by_euler)


@pytest.mark.parametrize(
    "make",
    [StableVSFlowMatchScheduler, lambda **given: StableVSFlowMatchScheduler.from_config({"shift": 3.0}, **given)],
)
def test_unknown_arguments_are_refused(make):
    with pytest.raises(TypeError, match="fast_low_split"):
        make(fast_low_split=0.7)


def test_a_flow_shift_is_the_shift():
    """Wan's pipelines carry the configuration of a scheduler for several processes."""
    unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    scheduler = StableVSFlowMatchScheduler.from_config(unipc.config)
    scheduler.set_timesteps(30)
    expected = FlowMatchEulerDiscreteScheduler(shift=5.0)
    expected.set_timesteps(30)
    assert scheduler.config.shift == 5 and torch.equal(scheduler.sigmas[:10], expected.sigmas[:10])
    assert StableVSFlowMatchScheduler.from_config(FlowMatchHeunDiscreteScheduler(shift=2.0).config).config.shift == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DDIMScheduler().config, "prediction_type epsilon"),
        (DDIMScheduler(prediction_type="v_prediction").config, "prediction_type v_prediction"),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction").config, "use_flow_sigmas False"),
        ({"_class_name": "DDIMScheduler", "beta_start": 0.1}, "DDIMScheduler: not the configuration"),
        ({"_class_name": "ScoreSdeVeScheduler", "snr": 0.15}, "ScoreSdeVeScheduler: not the configuration"),
    ],
)  # fmt: skip
def test_other_processes_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        StableVSFlowMatchScheduler.from_config(config)


@pytest.mark.parametrize(
    "options",
    [
        {"split_time": 1.0},
        {"steps_below": 0},
        {"steps_below": 2.5},
        {"steps_below": True},
        {"steps_below": "9"},
        {"split_time": "0.7"},
        {"noise_factor": 1.1},
        {"invert_sigmas": True},
        {"grid_below": "log"},
    ],
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
