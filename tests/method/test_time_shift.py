"""The shift of times towards noise: in what training draws and in every sampler's grid, and never in the targets."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from stablevm import COSINE, LINEAR, ClassBank, SamplerSettings, StableVM, draw, draw_times
from stablevm.draw import ObjectiveSettings
from stablevm.networks.snapshot import load_card, load_model
from stablevm.sampling.config import GenerateConfig
from stablevm.sampling.generation import generate
from stablevm.sampling.guidance import sample_latents
from stablevm.solvers.integration import integrate
from stablevm.support.errors import UserError
from stablevm.support.rng import RowGenerators
from stablevm.times import automatic_shift
from tests.helpers import runs

TIMES = torch.linspace(0, 1, 11, dtype=torch.float64)
PATHS = pytest.mark.parametrize("path", [LINEAR, COSINE], ids=lambda path: path.name)


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
def test_on_the_linear_path_it_is_the_published_formula(factor):
    found = LINEAR.shift(TIMES, factor)
    torch.testing.assert_close(found, factor * TIMES / (1 + (factor - 1) * TIMES))
    assert found[0] == 0 and found[-1] == 1


@PATHS
def test_it_multiplies_the_ratio_of_noise_to_data_and_is_undone_by_its_inverse(path):
    t = TIMES[1:-1]
    ratio = (lambda c: c.sigma / c.alpha)(path.coefficients(t))
    shifted = path.shift(t, 2.5)
    torch.testing.assert_close((lambda c: c.sigma / c.alpha)(path.coefficients(shifted)), 2.5 * ratio)
    torch.testing.assert_close(path.shift(shifted, 1 / 2.5), t)


@pytest.mark.parametrize(("shape", "factor"), [((4, 32, 32), 1.0), ((32, 16, 16), 2**0.5), ((768, 16, 16), 48**0.5)])
def test_the_automatic_one_follows_from_the_number_of_values(shape, factor):
    assert automatic_shift(shape) == pytest.approx(factor)


@PATHS
@pytest.mark.parametrize("name", ["uniform", "logit_normal"])
def test_drawn_times_are_the_plain_ones_shifted(path, name):
    plain, shifted = (
        draw_times(name, path, 1000, torch.Generator().manual_seed(0), shift=shift) for shift in (1.0, 4.0)
    )
    torch.testing.assert_close(shifted, path.shift(plain, 4.0), rtol=1e-4, atol=1e-5)
    assert shifted.mean() > plain.mean() + 0.1 and shifted.max() <= 1


def test_the_target_at_a_time_is_untouched(monkeypatch):
    """With the times of a shifted draw given to an objective that shifts nothing, all else is the same, bit by bit."""
    latents = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % 2

    def drawn(shift):
        objective = StableVM(ClassBank(2, 8, shape=(1, 2, 2)), ObjectiveSettings(time_shift=shift))
        return objective.draw(latents, labels, torch.Generator().manual_seed(1))

    shifted = drawn(5.0)
    given = draw.draw_times
    monkeypatch.setattr(draw, "draw_times", lambda *given_, **more: given(*given_, **{**more, "shift": 5.0}))
    plain = drawn(1.0)
    for name in ("t", "x_t", "target", "ess"):
        assert torch.equal(getattr(shifted, name), getattr(plain, name))
    assert shifted.ess.max() > 1, "references have taken part"


def grid(path=LINEAR, **settings):
    """The times at which the velocity is evaluated."""
    times = []

    def velocity(x, t):
        times.append(float(t))
        return torch.zeros_like(x)

    integrate(velocity, lambda: torch.zeros(1, 1), path, SamplerSettings(**settings))
    return times


@PATHS
@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "ode", "num_steps": 8},
        {"mode": "sde", "num_steps": 8},
        {"mode": "stablevs", "num_steps": 8, "steps_below": 3},
    ],
    ids=lambda settings: settings["mode"],
)
def test_grids_are_shifted_and_keep_their_ends(path, settings):
    plain, shifted = grid(path, **settings), grid(path, **settings, time_shift=3.0)
    assert grid(path, **settings, time_shift=1.0) == plain and len(shifted) == len(plain) and shifted[0] == 1
    assert shifted == sorted(shifted, reverse=True)
    if settings["mode"] == "ode":
        assert shifted == pytest.approx(path.shift(torch.tensor(plain, dtype=torch.float64), 3.0).tolist())
    if settings["mode"] == "sde":
        assert shifted[-1] == pytest.approx(0.04), "the last time with noise is the one of the options"
    if settings["mode"] == "stablevs":
        assert shifted[5] == pytest.approx(0.85), "the split too"
    assert sum(shifted) > sum(plain)


@pytest.mark.parametrize("settings", [{"mode": "ode", "solver": "dopri5"}, {"mode": "ode", "edm_schedule": True}])
def test_what_has_no_such_grid_refuses_a_shift(settings):
    with pytest.raises(UserError, match=r"time_shift 2.0 has no effect with"):
        SamplerSettings(**settings, time_shift=2.0)
    assert SamplerSettings(**settings).time_shift is None


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, "much", True])
def test_shifts_that_can_not_be(value):
    with pytest.raises(UserError, match="time_shift"):
        SamplerSettings(mode="ode", time_shift=value)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shift")
    runs.write_data(folder / "data")
    return folder


def test_it_is_recorded_and_sampling_follows(root, capsys):
    """Latents of 1 x 8 x 8 values: auto is sqrt(64 / 4096)."""
    settings = runs.config(root, "auto", time_shift="auto", max_train_steps=2, sampling_steps=2)
    folder = runs.run(settings) / "checkpoints" / "0000002"
    card = load_card(folder)
    assert card.time_shift == 0.125
    times = []
    sample_latents(
        load_model(folder, card),
        card,
        torch.tensor([0]),
        RowGenerators.for_keys("x", positions=range(1)),
        SamplerSettings(mode="ode", num_steps=4),
        "cpu",
        lambda x, t, v: times.append(float(t)),
    )
    assert times == pytest.approx(LINEAR.shift(torch.tensor([1.0, 0.75, 0.5, 0.25]), 0.125).tolist())
    made = {}
    for name, options in (("follows", {}), ("same", {"time_shift": 0.125}), ("none", {"time_shift": 1.0})):
        generate(
            GenerateConfig(
                ckpt=folder, mode="ode", num_steps=4, num_fid_samples=3, sample_dir=root, name=name, **options
            )
        )
        with np.load(root / f"{name}.npz") as archive:
            made[name] = archive["arr_0"], json.loads(str(archive["protocol"])).get("time_shift")
    assert np.array_equal(made["follows"][0], made["same"][0]) and not np.array_equal(made["none"][0], made["same"][0])
    assert [made[name][1] for name in made] == [0.125, 0.125, None]
    with pytest.raises(UserError, match=r"holds a run with --time-shift auto, this command says --time-shift 1.0"):
        runs.run(replace(settings, time_shift=1.0, max_train_steps=3))


def test_losses_of_another_shift_are_others(root):
    one, two = (runs.losses(runs.run(runs.config(root, f"s{s}", time_shift=s, max_train_steps=2))) for s in (1.0, 4.0))
    assert one != two
