"""Alignment weights and training times against their formulas."""

import math

import pytest
import torch

from stablevm.alignment import AlignmentSchedule
from stablevm.interpolant import COSINE, INTERPOLANTS, LINEAR
from stablevm.support.errors import UserError
from stablevm.support.rng import RowGenerators
from stablevm.times import draw_times

TIMES = torch.tensor([0.0, 0.2, 0.6999, 0.7, 0.9, 1.0], dtype=torch.float64)
TAU, STEEPNESS = 0.7, 20.0


def by_hand(name, t, path):
    def snr(time):
        at = path.coefficients(torch.tensor(time, dtype=torch.float64))
        return float(at.alpha / at.sigma) ** 2 if time > 0 else math.inf

    return {
        "hard": float(t < TAU),
        "hard_high": float(t >= TAU),
        "sigmoid": 1 / (1 + math.exp(-STEEPNESS * (TAU - t))),
        "cosine": 0.5 * (1 + math.cos(math.pi * t / TAU)) if t < TAU else 0.0,
        "snr": 1.0 if t == 0 else snr(t) / (snr(t) + snr(TAU)),
        "constant": 1.0,
    }[name]


@pytest.mark.parametrize("path", INTERPOLANTS.values(), ids=INTERPOLANTS.keys())
@pytest.mark.parametrize("name", ["hard", "hard_high", "sigmoid", "cosine", "snr", "constant"])
def test_weights(name, path):
    weights = AlignmentSchedule(name, path, TAU, STEEPNESS)(TIMES)
    assert weights.tolist() == pytest.approx([by_hand(name, t, path) for t in TIMES.tolist()], abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("path", INTERPOLANTS.values(), ids=INTERPOLANTS.keys())
@pytest.mark.parametrize("name", ["hard", "hard_high", "sigmoid", "cosine", "snr", "constant"])
def test_weights_are_shares_at_the_ends_for_any_split(name, path, dtype):
    """No NaN at t = 0, t = tau and t = 1, for the least and the greatest tau too, where SNR is infinite or 0."""
    for tau in (1e-9, TAU, 1.0):
        weights = AlignmentSchedule(name, path, tau)(torch.tensor([0.0, tau, 1.0], dtype=dtype))
        assert ((weights >= 0) & (weights <= 1)).all(), (tau, weights)
        if name in ("snr", "sigmoid"):
            assert weights[1] == 0.5, tau


def test_bad_schedules_are_refused():
    with pytest.raises(UserError, match="name 'slow': expected one of hard"):
        AlignmentSchedule("slow", LINEAR)
    with pytest.raises(UserError, match=r"tau 0: expected a time in \(0, 1\]"):
        AlignmentSchedule("hard", LINEAR, tau=0)
    for steepness in (0.0, -20.0, float("inf"), float("nan")):  # constant, rising with time, NaN at tau
        with pytest.raises(UserError, match=f"steepness {steepness}: expected a finite number above 0"):
            AlignmentSchedule("sigmoid", LINEAR, steepness=steepness)


@pytest.mark.parametrize("path", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("name, mean, deviation", [("lognormal", -1.2, 1.2), ("logit_normal", 0.0, 1.0)])
def test_log_noise_levels_are_normal(name, mean, deviation, path, stream):
    """Mean and variance of ln(sigma/alpha) over 20,000 draws: z < 4, the fixture's seed."""
    count = 20_000
    at = path.coefficients(draw_times(name, path, count, stream).double())
    levels = torch.log(at.sigma / at.alpha)
    assert abs(levels.mean() - mean) / (deviation / count**0.5) < 4
    assert abs(levels.var() / deviation**2 - 1) / (2 / count) ** 0.5 < 4


def test_uniform_times(stream):
    """Mean of 20,000 draws: z < 4, the fixture's seed."""
    times = draw_times("uniform", LINEAR, 20_000, stream)
    assert times.min() >= 0 and times.max() < 1
    assert abs(times.mean() - 0.5) / (20_000 * 12) ** -0.5 < 4


def test_a_row_has_its_own_times():
    several = draw_times("lognormal", LINEAR, 3, RowGenerators.for_keys(1, positions=[4, 5, 6]))
    alone = draw_times("lognormal", LINEAR, 1, RowGenerators.for_keys(1, positions=[5]))
    assert several[1] == alone[0]


def test_unknown_distribution(stream):
    with pytest.raises(UserError, match="weighting 'beta': expected one of uniform, lognormal"):
        draw_times("beta", LINEAR, 2, stream)


def test_a_schedule_takes_a_path_not_its_name():
    assert AlignmentSchedule("snr").path is LINEAR
    with pytest.raises(UserError, match="path 'cosine': expected an Interpolant"):
        AlignmentSchedule("snr", "cosine")
