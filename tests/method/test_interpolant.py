"""Paths and conversions."""

import itertools
import math

import pytest
import torch

from stablevm.interpolant import COSINE, INTERPOLANTS, LINEAR, get_interpolant
from stablevm.support.errors import UserError

PATHS = pytest.mark.parametrize("path", INTERPOLANTS.values(), ids=INTERPOLANTS.keys())


def batch(stream, t, dtype=torch.float64):
    shape = (len(t), 2, 3)
    x0, noise = (torch.randn(shape, generator=stream, dtype=dtype) for _ in range(2))
    return x0, noise


@PATHS
def test_derivatives_match_finite_differences(path):
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    h = 1e-6
    ahead, behind, here = path.coefficients(t + h), path.coefficients(t - h), path.coefficients(t)
    torch.testing.assert_close((ahead.alpha - behind.alpha) / (2 * h), here.d_alpha, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close((ahead.sigma - behind.sigma) / (2 * h), here.d_sigma, rtol=1e-7, atol=1e-8)


@PATHS
def test_ends_are_data_and_noise(path, stream):
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    x0, noise = batch(stream, t)
    x_t = path.interpolate(x0, noise, t)
    torch.testing.assert_close(x_t[0], x0[0])
    torch.testing.assert_close(x_t[1], noise[1])


def test_wronskians():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(LINEAR.coefficients(t).wronskian, torch.ones_like(t))
    torch.testing.assert_close(COSINE.coefficients(t).wronskian, torch.full_like(t, math.pi / 2))


@PATHS
def test_snr_is_that_of_the_state(path):
    t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    signal, noise = (
        path.interpolate(torch.ones(4), torch.zeros(4), t),
        path.interpolate(torch.zeros(4), torch.ones(4), t),
    )
    torch.testing.assert_close(path.snr(t), signal.square() / noise.square())
    assert path.snr(t)[0] == torch.inf and path.snr(t)[-1].item() == pytest.approx(0, abs=1e-30)


@PATHS
def test_the_error_of_predicted_data_is_weighed_as_that_of_the_velocity(path, stream):
    t = torch.tensor([0.05, 0.3, 0.7, 1.0], dtype=torch.float64)
    x0, noise = batch(stream, t)
    x_t, predicted = path.interpolate(x0, noise, t), x0 + 0.1 * noise
    velocity = path.convert(predicted, x_t, t, "x0", "velocity")
    weights = path.velocity_weight(t)
    expected = (velocity - path.velocity(x0, noise, t)).square().sum((1, 2))
    torch.testing.assert_close((predicted - x0).square().sum((1, 2)) * weights, expected)
    early = path.velocity_weight(torch.tensor([0.0, 0.02], dtype=torch.float64))  # below 0.05, and counted as that
    torch.testing.assert_close(early, weights[0].expand(2))
    assert path.velocity_weight(t, least_time=0.5)[0] == path.velocity_weight(torch.tensor(0.5, dtype=torch.float64))


@PATHS
@pytest.mark.parametrize("pair", list(itertools.permutations(("velocity", "x0", "noise", "score"), 2)))
def test_every_conversion(path, pair, stream):
    t = torch.tensor([0.05, 0.3, 0.7, 0.95], dtype=torch.float64)
    x0, noise = batch(stream, t)
    x_t = path.interpolate(x0, noise, t)
    sigma = path.coefficients(t, x0).sigma
    values = {"velocity": path.velocity(x0, noise, t), "x0": x0, "noise": noise, "score": -noise / sigma}
    source, target = pair
    torch.testing.assert_close(path.convert(values[source], x_t, t, source, target), values[target])


@PATHS
def test_velocity_converts_at_both_ends(path, stream):
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    x0, noise = batch(stream, t)
    x_t, velocity = path.interpolate(x0, noise, t), path.velocity(x0, noise, t)
    torch.testing.assert_close(path.convert(velocity, x_t, t, "velocity", "x0"), x0)
    torch.testing.assert_close(path.convert(velocity, x_t, t, "velocity", "noise"), noise)


@PATHS
def test_time_at_ratio_inverts_the_noise_level(path):
    t = torch.linspace(0.01, 0.99, 30, dtype=torch.float64)
    at = path.coefficients(t)
    torch.testing.assert_close(path.time_at_ratio(at.sigma / at.alpha), t)


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="path 'parabola': expected one of linear, cosine"):
        get_interpolant("parabola")
    with pytest.raises(ValueError, match="drift"):
        LINEAR.convert(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1), "drift", "x0")
