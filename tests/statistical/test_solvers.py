"""Solvers against closed-form solutions: orders of convergence of the ODE, marginals of ODE and SDE."""

import pytest
import torch

from stablevm.interpolant import INTERPOLANTS
from stablevm.sampling.solvers import euler, euler_maruyama, heun, ode_times, sde_times
from stablevm.toy.mixture import GaussianMixture

PATHS = pytest.mark.parametrize("path", INTERPOLANTS.values(), ids=INTERPOLANTS.keys())
MEAN = torch.tensor([0.7, -0.4], dtype=torch.float64)
VARIANCE = torch.tensor([0.3, 2.5], dtype=torch.float64)
SEED = 7


def gaussian_velocity(path):
    """The velocity of data from N(MEAN, VARIANCE), with no division by sigma: smooth on all of [0, 1]."""

    def velocity(x, t):
        at = path.coefficients(t)
        whitened = (x - at.alpha * MEAN) / (at.alpha**2 * VARIANCE + at.sigma**2)
        posterior_mean = MEAN + at.alpha * VARIANCE * whitened
        return at.d_alpha * posterior_mean + at.d_sigma * at.sigma * whitened

    return velocity


@PATHS
@pytest.mark.parametrize("solver, order", [(euler, 1), (heun, 2)])
def test_order_of_convergence(path, solver, order):
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None].expand(-1, 2)
    solution = MEAN + VARIANCE.sqrt() * start  # x_t keeps its quantile as its Gaussian contracts
    steps = torch.tensor([40, 80, 160, 320], dtype=torch.float64)
    errors = torch.stack(
        [(solver(gaussian_velocity(path), start, ode_times(int(n))) - solution).abs().max() for n in steps]
    )
    slopes = -(errors.log()[1:] - errors.log()[:-1]) / steps.log().diff()
    assert slopes.sub(order).abs().max() < 0.12, slopes
    assert errors[-1] < (2e-2, 1e-4)[order - 1]


@pytest.mark.parametrize("solver, expected", [(euler, 7), (heun, 13)])
def test_evaluations_and_times(solver, expected):
    asked = []

    def velocity(x, t):
        asked.append(float(t))
        return x

    solver(velocity, torch.ones(1, 1, dtype=torch.float64), ode_times(7))
    assert len(asked) == expected
    assert asked[0] == 1 and min(asked) == pytest.approx(1 / 7), "t = 0, where data predictions are singular"


def test_sde_grid_is_the_published_one():
    times = sde_times(250, 0.04)
    assert len(times) == 251 and times.dtype == torch.float64
    assert (times[0], times[-1]) == (1, 0) and times[-2] == pytest.approx(0.04)
    assert torch.allclose(times[:-1].diff(), torch.tensor(-0.96 / 249, dtype=torch.float64))


MIXTURE = GaussianMixture(
    weights=torch.tensor([0.3, 0.7], dtype=torch.float64),
    means=torch.tensor([[-1.0, 0.5], [1.0, 0.0]], dtype=torch.float64),
    variances=torch.tensor([[0.2, 0.8], [0.4, 0.3]], dtype=torch.float64),
)
COUNT = 10_000
SDE_TIMES = sde_times(400, 0.01)  # finer than published: 250 steps to 0.04 cost one standard error of the variance
LEVELS = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)


def mixture_z_scores(x):
    """Mean, variance, correlation and quantiles of samples (COUNT, 2) against the mixture's, in standard errors."""
    mean = (MIXTURE.weights[:, None] * MIXTURE.means).sum(0)
    centred = MIXTURE.means - mean
    variance = (MIXTURE.weights[:, None] * (MIXTURE.variances + centred**2)).sum(0)
    covariance = (MIXTURE.weights * centred.prod(1)).sum()
    residual = x - mean
    product = residual.prod(1)
    scale = COUNT**0.5
    scores = [
        residual.mean(0) / variance.sqrt() * scale,
        (residual.square().mean(0) - variance) / residual.square().std(0) * scale,
        ((product.mean() - covariance) / product.std() * scale)[None],
    ]
    normal = torch.distributions.Normal(MIXTURE.means, MIXTURE.variances.sqrt())
    for level in LEVELS:
        below = (MIXTURE.weights[:, None] * normal.cdf(x.quantile(level, dim=0))).sum(0)
        scores.append((below - level) / (level * (1 - level)).sqrt() * scale)
    return torch.cat(scores)


def mixture_samples(path, mode, diffusion_scale=1.0):
    stream = torch.Generator().manual_seed(SEED)

    def noise():
        return torch.randn(COUNT, 2, generator=stream, dtype=torch.float64)

    def velocity(x, t):
        return MIXTURE.field(path, x, t)

    if mode == "ode":
        return heun(velocity, noise(), ode_times(100))
    return euler_maruyama(velocity, noise(), SDE_TIMES, path, noise, diffusion_scale)


@PATHS
@pytest.mark.parametrize("mode, diffusion_scale", [("ode", 1.0), ("sde", 1.0), ("sde", 2.0)])
def test_marginals_are_those_of_the_data(path, mode, diffusion_scale):
    z = mixture_z_scores(mixture_samples(path, mode, diffusion_scale))
    assert z.abs().max() < 4, z  # 15 scores: beyond 4 in 0.1 % of the seeds, and SEED is fixed


@PATHS
def test_marginals_reject_a_wrong_drift(path):
    """The same test sees the commonest mistake: noise without the score term that pays for it."""
    stream = torch.Generator().manual_seed(SEED)
    x = torch.randn(COUNT, 2, generator=stream, dtype=torch.float64)
    for t, t_next in SDE_TIMES.unfold(0, 2, 1):
        w = path.coefficients(t).sigma
        x = x + (t_next - t) * MIXTURE.field(path, x, t)
        x = x + (w * (t - t_next)).sqrt() * torch.randn(COUNT, 2, generator=stream, dtype=torch.float64)
    assert mixture_z_scores(x).abs().max() > 10


@PATHS
def test_sde_without_diffusion_is_euler(path):
    start = torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(4, 2)
    times = sde_times(20, 0.04)
    got = euler_maruyama(gaussian_velocity(path), start, times, path, lambda: torch.ones_like(start), 0.0)
    assert torch.allclose(got, euler(gaussian_velocity(path), start, times), rtol=0, atol=1e-14)
