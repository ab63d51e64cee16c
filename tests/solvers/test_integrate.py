"""`integrate` in other people's hands: settings that can't be honoured, shapes, half precision, and dopri5's end."""

import math

import numpy as np
import pytest
import torch

from stablevm import LINEAR, SamplerSettings, UserError, integrate, stable_velocity_step
from stablevm.solvers.dopri5 import dopri5

EULER = SamplerSettings("ode", num_steps=4)
DOPRI5 = SamplerSettings("ode", solver="dopri5")


def start(shape=(3, 2), dtype=torch.float32):
    return lambda: torch.linspace(-1, 1, math.prod(shape)).reshape(shape).to(dtype)


def towards_one(x, t, rows=None):
    """The velocity of data that is all 1: `(x - 1) / t`, infinite at t = 0."""
    return (x - 1) / (t if t.ndim == 0 else t[:, None])


# Settings


@pytest.mark.parametrize(
    "given, message",
    [
        ({"mode": "sde", "solver": "dopri5"}, "solver 'dopri5': expected euler or heun with mode 'sde'"),
        ({"mode": "stablevs", "solver": "dopri5"}, "solver 'dopri5': expected euler or heun with mode 'stablevs'"),
        ({"mode": "stablevs", "num_steps": 9}, "steps_below 9: expected fewer than num_steps 9"),
        ({"mode": "stablevs", "steps_below": 0}, "steps_below 0: expected at least 1"),
        ({"mode": "stablevs", "noise_factor": 1.5}, r"noise_factor 1.5: expected a number in \[0, 1\]"),
        ({"mode": "stablevs", "split_time": 1.0}, "split_time 1.0: expected a time between 0 and 1"),
        ({"mode": "stablevs", "edm_schedule": True}, "edm_schedule True: expected mode 'ode' or sde"),
        ({"mode": "ode", "num_steps": 0}, "num_steps 0: expected at least 1"),
        ({"mode": "ode", "num_steps": 9.5}, "num_steps 9.5: expected a value of type int"),
        ({"mode": "ode", "num_steps": True}, "num_steps True: expected a value of type int"),
        ({"mode": "ode", "num_steps": 1, "edm_schedule": True}, "num_steps 1: expected at least 2 with edm_schedule"),
        ({"num_steps": 1}, "num_steps 1: expected at least 2 with mode 'sde'"),
        ({"last_time": 1.5}, "last_time 1.5: expected a time between 0 and 1"),
        ({"last_time": math.nan}, "last_time nan"),
        ({"diffusion_scale": -1.0}, "diffusion_scale -1.0: expected 0 or more"),
        ({"diffusion_scale": math.inf}, "diffusion_scale inf"),
        ({"mode": "ode", "solver": "dopri5", "rtol": 0.0}, "rtol 0.0: expected a finite number above 0"),
        ({"mode": "flow"}, "mode 'flow': expected one of ode, sde, stablevs"),
        ({"edm_schedule": "yes"}, "edm_schedule 'yes': expected a value of type bool"),
        ({"mode": "ode", "diffusion_scale": 2.0}, "diffusion_scale 2.0 has no effect with mode 'ode': leave it out"),
        ({"mode": "ode", "rtol": 1e-5}, "rtol 1e-05 has no effect with solver 'euler'"),
        ({"mode": "ode", "solver": "dopri5", "num_steps": 9}, "num_steps 9 has no effect with solver 'dopri5'"),
        ({"mode": "stablevs", "diffusion_scale": 2.0}, "diffusion_scale 2.0 has no effect with above_split 'ode'"),
        ({"cfg_scale": 1.5, "legacy": True}, "no cfg_scale, legacy any more"),
        ({"precision": "fp32"}, "no precision any more"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(given, message):
    with pytest.raises(UserError, match=f"^(SamplerSettings has )?{message}"):
        SamplerSettings(**given)


def test_numbers_of_numpy_are_numbers():
    assert SamplerSettings("ode", num_steps=np.int64(7)).num_steps == 7
    assert SamplerSettings(diffusion_scale=np.float32(2)).diffusion_scale == 2


def test_what_is_no_path_and_no_settings_is_refused():
    with pytest.raises(UserError, match="path 'linear'"):
        integrate(towards_one, start(), "linear", EULER)
    with pytest.raises(UserError, match="settings None"):
        integrate(towards_one, start(), LINEAR, None)


# Shapes


@pytest.mark.parametrize("settings", [EULER, DOPRI5, SamplerSettings(num_steps=4), SamplerSettings("stablevs")])
def test_a_velocity_of_another_shape_is_refused(settings):
    """(B,) for (B, 1) would broadcast to (B, B), one channel for three to all of them."""
    with pytest.raises(UserError, match=r"the velocity is \(3,\), the state \(3, 1\): expected the same"):
        integrate(lambda x, t, rows=None: x[:, 0], start((3, 1)), LINEAR, settings)
    with pytest.raises(UserError, match=r"the velocity is \(2, 1, 4\), the state \(2, 3, 4\)"):
        integrate(lambda x, t, rows=None: x[:, :1], start((2, 3, 4)), LINEAR, settings)


@pytest.mark.parametrize("settings", [EULER, DOPRI5, SamplerSettings("stablevs")])
def test_a_velocity_of_whole_or_complex_numbers_is_refused(settings):
    """Of complex ones the imaginary part would be dropped, with no more than a warning of torch's."""
    for dtype in (torch.complex64, torch.int64):
        with pytest.raises(UserError, match=rf"the velocity is {dtype} \(3, 1\): expected floating-point numbers"):
            integrate(lambda x, t, rows=None, dtype=dtype: x.to(dtype), start((3, 1)), LINEAR, settings)


def test_noise_that_is_no_function_is_refused():
    with pytest.raises(UserError, match="noise is a Tensor: expected a function"):
        integrate(lambda x, t, rows=None: x, torch.zeros(3, 2), LINEAR, EULER)


def test_noise_that_is_no_batch_and_noise_of_another_shape_are_refused():
    for wrong in (torch.zeros(()), torch.zeros(3, 2, dtype=torch.int64), [0.0]):
        with pytest.raises(UserError, match=r"noise\(\) returned .*: expected floating-point numbers \(B, ...\)"):
            integrate(towards_one, lambda wrong=wrong: wrong, LINEAR, EULER)
    shapes = iter([(3, 2), (3, 1)])
    with pytest.raises(UserError, match=r"the noise is \(3, 1\), the state \(3, 2\)"):
        integrate(towards_one, lambda: torch.zeros(next(shapes)), LINEAR, SamplerSettings(num_steps=4))


def test_a_step_of_stablevs_refuses_what_integrate_refuses():
    x, t = torch.zeros(3, 1), torch.tensor(0.5)
    with pytest.raises(UserError, match="the velocity is"):
        stable_velocity_step(x[:, 0], x, t, t / 2, LINEAR, start())
    with pytest.raises(UserError, match=r"noise_factor 1\.5"):
        stable_velocity_step(x, x, t, t / 2, LINEAR, start(), 1.5)


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "settings",
    [
        SamplerSettings("ode", num_steps=1000),
        SamplerSettings("ode", num_steps=500, solver="heun"),
        SamplerSettings("ode", solver="dopri5", rtol=1e-6, atol=1e-8),
        SamplerSettings("stablevs", num_steps=1000, steps_below=850),
    ],
)
def test_half_precision_states_move(dtype, settings):
    """Towards 1 from -1: each of 1,000 steps is below half a unit of bfloat16, which would round every one away."""
    seen = set()

    def velocity(x, t, rows=None):
        seen.add(x.dtype)
        return torch.full_like(x, -2.0)

    end = integrate(velocity, lambda: torch.full((2, 3), -1.0, dtype=dtype), LINEAR, settings)
    assert end.dtype == dtype and seen == {dtype}, "the network's dtype stays the user's"
    torch.testing.assert_close(end, torch.ones_like(end), rtol=0.01, atol=0.01)


def test_dopri5_shows_half_precision_networks_times_that_are_not_rounded():
    times = []
    integrate(
        lambda x, t, rows: (times.append(t), x)[1],
        start(dtype=torch.bfloat16), LINEAR, SamplerSettings("ode", solver="dopri5", rtol=1e-5),
    )  # fmt: skip
    assert {t.dtype for t in times} == {torch.float32}


# dopri5 ends


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("at", [1.0, 0.5])
def test_rows_that_meet_nan_are_nan_and_leave_the_others_alone(broken, at):
    """From the first evaluation on, or from the middle."""

    def velocity(x, t, rows):
        v = x - 0.3
        v[(rows == 1) & (t <= at)] = broken
        return v

    end = dopri5(velocity, start()().double())
    whole = dopri5(lambda x, t, rows: x - 0.3, start()().double())
    assert end[1].isnan().all()
    torch.testing.assert_close(end[[0, 2]], whole[[0, 2]], rtol=1e-3, atol=1e-3)
    assert dopri5(lambda x, t, rows: x * math.nan, start()()).isnan().all()
    assert dopri5(towards_one, torch.full((1, 2), math.nan)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_first_probe_does_not_reach_the_data(dtype):
    """A small slope beside a large state made a probe of length 1, where the velocity divides by 0."""
    target = 1000.0
    seen = []

    def velocity(x, t, rows):
        seen.append(t.min().item())
        return (x - target) / t[:, None]

    x = torch.full((2, 3), target + 1, dtype=dtype)
    end = dopri5(velocity, x)
    assert min(seen) > 0
    torch.testing.assert_close(end, torch.full_like(x, target), rtol=1e-5, atol=0)


def test_a_tolerance_that_cannot_be_met_ends_in_a_line():
    """Rounding to float16 at each evaluation, or a jump, with a tolerance far below either."""
    with pytest.raises(
        UserError, match=r"rtol 1e-14, atol 1e-16: dopri5 can't meet this tolerance at t = .*larger tolerances"
    ):
        dopri5(lambda x, t, rows: (7 * x).half().to(x), start((1, 2), torch.float64)() + 0.1, rtol=1e-14, atol=1e-16)
    with pytest.raises(UserError, match=r"meet this tolerance at t = 0.5,"):
        dopri5(lambda x, t, rows: torch.sign(t - 0.5)[:, None] * 1e9 + x, start()().double(), rtol=1e-12, atol=1e-12)


def test_a_state_of_one_number_a_sample():
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    for settings in (SamplerSettings("ode", num_steps=4000), DOPRI5):
        end = integrate(lambda x, t, rows=None: x, lambda: x, LINEAR, settings)
        torch.testing.assert_close(end, x / math.e, rtol=1e-3, atol=1e-6)


def test_an_empty_batch_is_no_endless_loop():
    assert dopri5(towards_one, torch.zeros(0, 3)).shape == (0, 3)
