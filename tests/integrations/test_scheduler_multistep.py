"""The multistep schedulers of StableVS: their base classes above the split, large steps below, history between."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from stablevm.integrations.diffusers_scheduler import (
    StableVSDPMSolverMultistepScheduler,
    StableVSFlowMatchScheduler,
    StableVSUniPCMultistepScheduler,
)
from stablevm.interpolant import LINEAR
from stablevm.solvers.fixed_steps import heun, ode_times, stable_velocity_step
from tests.helpers.mixtures import make_mixture

BASES = {
    StableVSDPMSolverMultistepScheduler: DPMSolverMultistepScheduler,
    StableVSUniPCMultistepScheduler: UniPCMultistepScheduler,
}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
# Printed by the published scheduler for 30 steps, shift 3, split 0.85 and 9 steps below.
PUBLISHED_SIGMAS = [0.8513, 0.8314, 0.7878, 0.7380, 0.6808, 0.6143, 0.4915, 0.3887, 0.2626, 0.1043, 0.0]

each = pytest.mark.parametrize("kind", BASES)
kept_or_not = pytest.mark.parametrize("kept", [True, False], ids=["kept", "cleared"])


def trajectory(scheduler, x, velocity, **step):
    """The states before each step and after the last one; the schedule is set."""
    states = [x]
    for t, sigma in zip(list(scheduler.timesteps), scheduler.sigmas.tolist(), strict=False):
        states.append(scheduler.step(velocity(states[-1], sigma), t, states[-1], **step).prev_sample)
    return states


def exact(mixture):
    return lambda x, sigma: mixture.field(LINEAR, x.double(), sigma).to(x)


def start(count=200, dimension=3, dtype=torch.float64):
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


# --- steps ---


@each
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switched_off_it_is_its_base_class_bit_for_bit(kind, order, dtype):
    mixture = make_mixture(8, 3, seed=0)
    given = {"flow_shift": 3.0, "solver_order": order}
    ends = []
    for scheduler in (BASES[kind](**given, **FLOW), kind(**given, use_fast_low_schedule=False, noise_factor=1.0)):
        scheduler.set_timesteps(12)
        ends.append(trajectory(scheduler, start(dtype=dtype), exact(mixture))[-1])
    assert ends[0].dtype == dtype and torch.equal(*ends)


@each
@kept_or_not
@pytest.mark.parametrize("order", [1, 2, 3])
def test_down_to_the_split_steps_are_those_of_the_base_class(kind, order, kept):
    """The step that crosses the split too; history from below would change what follows it."""
    mixture = make_mixture(8, 3, seed=0)
    base = BASES[kind](flow_shift=3.0, solver_order=order, **FLOW)
    ours = kind(shift=3.0, solver_order=order, keep_history=kept)
    for scheduler in (base, ours):
        scheduler.set_timesteps(30)
    by_base, by_ours = (trajectory(each, start(dtype=torch.float32), exact(mixture)) for each in (base, ours))
    above = int((ours.sigmas > 0.85).sum())
    assert above == 11 and len(ours.timesteps) == ours.num_inference_steps == 20
    assert torch.equal(ours.sigmas[: above + 1], base.sigmas[: above + 1])
    assert all(map(torch.equal, by_base[: above + 1], by_ours[: above + 1]))


@each
def test_steps_below_are_those_of_stablevs_and_the_history_ends(kind):
    mixture = make_mixture(8, 3, seed=0)
    velocity = exact(mixture)
    scheduler = kind(shift=3.0, noise_factor=0.5, disable_corrector=list(range(30))) if "UniPC" in kind.__name__ else (
        kind(shift=3.0, noise_factor=0.5))  # fmt: skip
    scheduler.set_timesteps(30)
    x, generator, twin = start(), torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    for step, t in enumerate(list(scheduler.timesteps)):
        sigma, ahead = scheduler.sigmas[step], scheduler.sigmas[step + 1]
        v = velocity(x, sigma.item())
        before, x = x, scheduler.step(v, t, x, generator=generator).prev_sample
        if sigma > 0.85:
            assert scheduler.lower_order_nums == min(step + 1, 2) and scheduler.model_outputs[-1] is not None
        else:
            noise = torch.randn(200, 3, generator=twin)
            expected = stable_velocity_step(v, before, sigma, ahead, LINEAR, lambda noise=noise: noise, 0.5)
            assert torch.allclose(x, expected, atol=1e-5)
            assert scheduler.lower_order_nums == 0 and scheduler.model_outputs == [None, None]
            assert getattr(scheduler, "last_sample", None) is None


@each
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("grid", ["schedule", "even"])
def test_a_kept_history_is_the_base_class_on_our_noise_levels(kind, order, grid):
    velocity = exact(make_mixture(8, 3, seed=0))
    ours = kind(shift=3.0, solver_order=order, grid_below=grid)
    assert ours.config.keep_history is None, "kept where there is no fresh noise"
    base = BASES[kind](flow_shift=3.0, solver_order=order, **FLOW)
    ours.set_timesteps(30)
    base.set_timesteps(len(ours.timesteps))
    base.sigmas, base.timesteps = ours.sigmas[:], ours.timesteps[:]
    ends = [trajectory(each, start(dtype=torch.float32), velocity)[-1] for each in (base, ours)]
    assert torch.equal(*ends)
    cleared = kind(shift=3.0, solver_order=order, grid_below=grid, keep_history=False)
    cleared.set_timesteps(30)
    assert not torch.equal(trajectory(cleared, start(dtype=torch.float32), velocity)[-1], ends[0])


@each
def test_a_history_is_not_kept_across_fresh_noise(kind):
    with pytest.raises(ValueError, match="keep_history True: fresh noise"):
        kind(keep_history=True, noise_factor=0.1)
    with pytest.raises(ValueError, match="expected True, False or None"):
        kind(keep_history="yes")
    cleared = kind(keep_history=False)
    assert kind.from_config(cleared.config).config.keep_history is False
    assert kind.from_config(cleared.config, keep_history=None).config.keep_history is None


def test_the_corrector_completes_the_step_that_crosses_the_split():
    """The sample that the base class goes on from, after its correction, is the one that our large step starts from."""
    velocity = exact(make_mixture(8, 3, seed=0))
    base, ours = (
        UniPCMultistepScheduler(flow_shift=3.0, **FLOW),
        StableVSUniPCMultistepScheduler(shift=3.0, keep_history=False),
    )
    for scheduler in (base, ours):
        scheduler.set_timesteps(30)
    states = trajectory(base, start(), velocity)
    first, sigmas = 11, ours.sigmas
    base.set_timesteps(30)
    for step in range(first + 1):
        base.step(velocity(states[step], base.sigmas[step].item()), base.timesteps[step], states[step])
    corrected = base.last_sample
    assert not torch.equal(corrected, states[first])
    found = trajectory(ours, start(), velocity)[first + 1]
    x0 = states[first] - sigmas[first] * velocity(states[first], sigmas[first].item())
    noise = (corrected - (1 - sigmas[first]) * x0) / sigmas[first]
    assert torch.allclose(found, (1 - sigmas[first + 1]) * x0 + sigmas[first + 1] * noise, atol=1e-5)


@each
@kept_or_not
@pytest.mark.statistical
def test_the_order_is_the_solvers_above_the_split_and_1_below_unless_the_history_is_kept(kind, kept):
    """Root mean square distance to the exact flow of a wide mixture, at the split of 0.5 and at 0.25, on equal steps.

    Nearer to 0 steps do not become small in log-SNR, and so the base classes have a smaller order there too.
    Seeds are fixed, errors are those of the method, and rates between 24, 48 and 96 steps allow for 0.3.
    """
    mixture = make_mixture(3, 3, seed=3, dtype=torch.float64)
    mixture = type(mixture)(mixture.weights, mixture.means, mixture.variances + 0.3)
    x, velocity = start(), exact(mixture)
    at_split, at_quarter = [], []
    for steps in (24, 48, 96):
        scheduler = kind(split_time=0.5, steps_below=steps // 2, grid_below="even", keep_history=kept)
        # The first step, from no history, has order 1 in log-SNR, which is infinite at sigma 1: start below that. The
        # last of these levels above the split is left out: all steps down to 0.25 are equal.
        above = torch.linspace(0.9, 0.5, steps // 2 + 1, dtype=torch.float64)
        scheduler.set_timesteps(sigmas=[*above.tolist(), *(0.499 * ode_times(steps // 2)[:-1]).tolist()])
        states = trajectory(scheduler, x, velocity)
        below = int((scheduler.sigmas > 0.5).sum())
        for index, errors in ((below, at_split), (below + steps // 4, at_quarter)):
            end = scheduler.sigmas[index].item()
            truth = heun(lambda x, t: velocity(x, t.item()), x, end + (0.9 - end) * ode_times(200))
            errors.append((states[index] - truth).square().sum(1).mean().sqrt().item())
    rates = [[math.log2(a / b) for a, b in itertools.pairwise(errors)] for errors in (at_split, at_quarter)]
    assert min(rates[0]) > 1.7, rates
    assert min(rates[1]) > 1.7 if kept else all(0.7 < rate < 1.4 for rate in rates[1]), rates


@each
def test_noise_needs_its_generator_alone(kind):
    velocity = exact(make_mixture(8, 3, seed=0))
    scheduler, ends = kind(shift=3.0, noise_factor=1.0), []
    for seed in (7, 7, 8):
        scheduler.set_timesteps(20)
        generator = torch.Generator().manual_seed(seed)
        ends.append(trajectory(scheduler, start(dtype=torch.bfloat16), velocity, generator=generator)[-1])
    assert ends[0].dtype == torch.bfloat16 and torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_noise_may_be_given_to_dpm_solver():
    scheduler = StableVSDPMSolverMultistepScheduler(noise_factor=1.0)
    scheduler.set_timesteps(sigmas=[0.8, 0.4])
    x, noise = torch.zeros(1, 2), torch.tensor([[1.0, -2.0]])
    x = scheduler.step(torch.zeros(1, 2), scheduler.timesteps[0], x, variance_noise=noise).prev_sample
    assert torch.allclose(x, 0.4 * noise), "the data is 0, and so all there is at 0.4 is the noise"


@each
@kept_or_not
def test_clipping_of_the_data_holds_below_the_split(kind, kept):
    scheduler = kind(keep_history=kept, thresholding=True, sample_max_value=1.0, dynamic_thresholding_ratio=1.0)
    scheduler.set_timesteps(sigmas=[0.6, 0.3])
    x = torch.full((1, 1, 2, 2), 5.0)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
    assert torch.allclose(x, torch.ones_like(x))


@each
def test_it_says_that_timesteps_are_not_set(kind):
    with pytest.raises(ValueError, match="set_timesteps"):
        kind().step(torch.zeros(1, 2), torch.tensor(999), torch.zeros(1, 2))


# --- noise levels ---


@each
def test_sigmas_are_the_published_ones(kind):
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    unshifted = np.linspace(1, euler.sigma_min, 30)  # what the Euler scheduler shifts
    euler.set_timesteps(30)
    scheduler = kind(shift=3.0, fast_low_split_point=0.85, fast_low_low_substeps=9)
    scheduler.set_timesteps(sigmas=unshifted.tolist())
    assert [round(sigma, 4) for sigma in scheduler.sigmas[10:].tolist()] == PUBLISHED_SIGMAS
    assert torch.allclose(scheduler.sigmas[:11], euler.sigmas[:11], atol=2e-6)  # a sigma of 1 is 1e-6 less
    published = StableVSFlowMatchScheduler(shift=3.0)
    published.set_timesteps(30)
    assert torch.allclose(scheduler.timesteps.double(), published.timesteps.double(), atol=1.0)
    assert scheduler.timesteps.dtype == torch.int64 and len(scheduler.timesteps) == 20


@each
def test_a_shift_that_depends_on_the_image(kind):
    """As Flux's pipeline does it, with a number of steps or with sigmas of its own."""
    sigmas, mu = np.linspace(1, 1 / 30, 30), 1.15
    euler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    euler.set_timesteps(sigmas=sigmas.tolist(), mu=mu)
    scheduler = kind.from_config(euler.config, use_fast_low_schedule=False)
    scheduler.set_timesteps(sigmas=sigmas.tolist(), mu=mu)
    assert torch.allclose(scheduler.sigmas, euler.sigmas, atol=2e-6)
    base = BASES[kind](use_dynamic_shifting=True, **FLOW)
    for each in (base, scheduler):
        each.set_timesteps(30, mu=mu)
    assert torch.equal(scheduler.sigmas, base.sigmas) and torch.equal(scheduler.timesteps, base.timesteps)
    assert kind.from_config(scheduler.config).config["flow_shift"] == 1, "the image's shift is not the configuration's"
    plain = kind(shift=2.0)
    plain.set_timesteps(sigmas=sigmas.tolist(), mu=mu)
    assert plain.sigmas[1].item() == pytest.approx(2 * sigmas[1] / (1 + sigmas[1]), rel=1e-5)


def test_dpm_solver_has_no_timesteps_of_ones_own():
    with pytest.raises(ValueError, match="give `sigmas`"):
        StableVSDPMSolverMultistepScheduler().set_timesteps(timesteps=[999, 500])


@each
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_the_even_grid_goes_from_the_split_to_the_last_sigma(kind, final):
    scheduler = kind(shift=3.0, grid_below="even", final_sigmas_type=final)
    scheduler.set_timesteps(30)
    last = scheduler.sigmas[-1].item()
    assert torch.allclose(scheduler.sigmas[10:].double(), last + (0.85 - last) * ode_times(9), atol=1e-6)
    assert (last == 0) == (final == "zero")
    assert (scheduler.timesteps - 1000 * scheduler.sigmas[:-1]).abs().max() <= 1.5


# --- a start in the middle ---


@each
@pytest.mark.parametrize("says_where", [True, False])
@pytest.mark.parametrize("method", ["add_noise", "scale_noise"])
def test_a_strength_begins_at_the_base_classs_noise_level(kind, says_where, method):
    velocity = torch.ones(1, 2)
    for begin in (0, 3, 11, 18, 29):
        base, ours = BASES[kind](flow_shift=3.0, **FLOW), kind(shift=3.0)
        for scheduler in (base, ours):
            scheduler.set_timesteps(30)
        timesteps = ours.timesteps[begin:]
        if says_where:
            ours.set_begin_index(begin)
        given = {
            "add_noise": (0 * velocity, velocity, timesteps[:1]),
            "scale_noise": (0 * velocity, timesteps[:1], velocity),
        }
        x = getattr(ours, method)(*given[method])
        assert timesteps[0] == base.timesteps[begin] and torch.allclose(x, base.sigmas[begin] * velocity)
        assert len(timesteps) <= 30 - begin and (timesteps.diff() < 0).all()
        for t in timesteps:
            assert (ours.scale_model_input(x, t) == x).all()
            x = ours.step(velocity, t, x).prev_sample
        assert ours.sigmas[ours.step_index] == 0 and torch.allclose(x, torch.zeros(1, 2), atol=1e-5)


@each
def test_a_second_run_does_not_remember_the_first(kind):
    velocity, scheduler, ends = exact(make_mixture(8, 3, seed=0)), kind(shift=3.0), []
    for steps in (30, 5, 30):
        scheduler.set_timesteps(steps)
        ends.append(trajectory(copy.deepcopy(scheduler) if steps == 5 else scheduler, start(), velocity)[-1])
    assert torch.equal(ends[0], ends[2])


# --- configurations ---

SD3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
FLUX = SD3 | {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
              "max_image_seq_len": 4096}  # fmt: skip
QWEN = FLUX | {"shift": 1.0, "shift_terminal": 0.02, "max_shift": 0.9, "max_image_seq_len": 8192,
               "time_shift_type": "exponential", "invert_sigmas": False, "use_karras_sigmas": False}  # fmt: skip
WAN = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 5.0, "solver_order": 2, "beta_start": 0.0001, **FLOW}


@each
@pytest.mark.parametrize(("config", "shift"), [(SD3, 3.0), (FLUX, 3.0), (QWEN, 1.0), (WAN, 5.0)])
def test_configurations_of_pipelines(kind, config, shift, tmp_path):
    scheduler = kind.from_config(config, split_time=0.8)
    scheduler.save_pretrained(tmp_path)
    for made in (scheduler, kind.from_pretrained(tmp_path), kind.from_config(scheduler.config)):
        found = made.config
        assert (found.flow_shift, found.shift, found.split_time, found.use_flow_sigmas) == (shift, shift, 0.8, True)
        kept = {name for name in config if name.startswith(("base_image", "max_", "base_shift", "shift_terminal"))}
        assert all(found[name] == config[name] for name in kept), "pipelines compute mu from these"
    sigmas, mu = np.linspace(1, 1 / 20, 20), 0.9 if config.get("use_dynamic_shifting") else None
    euler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    euler.set_timesteps(sigmas=sigmas.tolist(), mu=mu)
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    above = int((euler.sigmas >= 0.8).sum())
    assert torch.allclose(scheduler.sigmas[:above], euler.sigmas[:above], atol=2e-6)
    assert len(scheduler.timesteps) == min(above + 9, 20)


@each
@pytest.mark.parametrize("name", ["shift", "flow_shift"])
def test_both_names_of_the_shift(kind, name):
    assert kind(**{name: 4.0}).config.flow_shift == kind.from_config(WAN, **{name: 4.0}).config.flow_shift == 4.0
    assert kind.from_config(SD3, **{name: 4.0}).config.shift == 4.0
    assert StableVSFlowMatchScheduler.from_config(kind(**{name: 4.0}).config).config.shift == 4.0
    with pytest.raises(TypeError, match="shift: another name of flow_shift"):
        kind(shift=2.0, flow_shift=3.0)


@each
@pytest.mark.parametrize("given", [{"prediction_type": "epsilon"}, {"use_flow_sigmas": False}, {"noise_factor": 2.0},
                                   {"use_beta_sigmas": True}, {"grid_below": "log"}])  # fmt: skip
def test_other_processes_and_values_are_refused(kind, given):
    with pytest.raises(ValueError, match=next(iter(given))):
        kind(**given)
    with pytest.raises(ValueError, match=next(iter(given))):
        kind.from_config({**WAN, **given})


@each
def test_unknown_arguments_are_refused(kind):
    for make in (kind, lambda **given: kind.from_config(SD3, **given)):
        with pytest.raises(TypeError, match="fast_low_split"):
            make(fast_low_split=0.7)
    with pytest.raises(ValueError, match="invert_sigmas"):
        kind.from_config(SD3 | {"invert_sigmas": True})
