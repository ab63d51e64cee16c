"""The variance of targets: never more with references, falling like 1/(n - 1), and the sums of the curve."""

import itertools
import math

import pytest
import torch

from stablevm.interpolant import COSINE, LINEAR
from stablevm.posterior import posterior
from stablevm.variance import VarianceCurve, class_variance_curve, streamed_variance_curve, variance_curve
from tests.helpers.mixtures import make_mixture

pytestmark = pytest.mark.statistical
DIMENSION, ROWS = 4, 4000
MIXTURE = make_mixture(4, DIMENSION, seed=3)


def squared_errors(references, time, stream):
    """|target - v|^2 for ROWS independent anchors, each with `references - 1` fresh others, and the same for CFM."""
    x0, noise = MIXTURE.sample(ROWS, stream), torch.randn(ROWS, DIMENSION, generator=stream)
    others = MIXTURE.sample(ROWS * (references - 1), stream).reshape(ROWS, references - 1, DIMENSION)
    t = torch.full((ROWS,), time)
    x_t = LINEAR.interpolate(x0, noise, t)
    plain = LINEAR.velocity(x0, noise, t)
    target = plain + LINEAR.offset_gain(t, x0) * posterior(LINEAR, x0, noise, t, others).offset
    exact = MIXTURE.field(LINEAR, x_t, time)
    return (target - exact).square().sum(1).double(), (plain - exact).square().sum(1).double()


def z_of(difference):
    return (difference.mean() / (difference.std() / len(difference) ** 0.5)).item()


@pytest.mark.parametrize("time", [0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_references_never_add_variance(time, stream):
    """The paired difference V_CFM - V_refs is never below -4 standard errors, and above 4 from t = 0.5 on."""
    with_references, plain = squared_errors(16, time, stream)
    assert z_of(plain - with_references) > (4 if time >= 0.5 else -4)


def test_variance_falls_like_one_over_n_minus_one(stream):
    """(n - 1) V(n) at t = 0.9 for n = 8 .. 64 agrees between neighbours within z = 4 (the fixture's seed)."""
    scaled = [squared_errors(n, 0.9, stream)[0] * (n - 1) for n in (8, 16, 32, 64)]
    for fewer, more in itertools.pairwise(scaled):
        error = (fewer.var() / ROWS + more.var() / ROWS).sqrt()
        assert abs(fewer.mean() - more.mean()) / error < 4


def test_plain_variance_at_the_prior_is_that_of_the_data(stream):
    """V_CFM(1) = tr Cov(x0) on the linear path: relative 5 % at 4,000 samples (the fixture's seed)."""
    _, plain = squared_errors(2, 1.0, stream)
    assert plain.mean().item() == pytest.approx(MIXTURE.sample(50_000, stream).var(dim=0).sum().item(), rel=0.05)


def test_curve_against_brute_force():
    """With all of a class as references the variance is 0; with one it is CFM's; and CFM's is the brute-force value."""
    stream = torch.Generator().manual_seed(4)
    latents, labels = torch.randn(30, 2, 2, generator=stream), torch.arange(30) % 3
    times = torch.tensor([0.3, 0.8])

    def curve(references):
        same = torch.Generator().manual_seed(5)
        return variance_curve(LINEAR, latents, labels, times, references=references, rows=500, generator=same)

    whole, single = curve(10), curve(1)
    assert whole.stablevm == pytest.approx([0, 0], abs=1e-9) and whole.references == 10
    assert single.stablevm == pytest.approx(single.cfm, rel=1e-5) and single.ess == pytest.approx([1, 1])
    assert whole.cfm == pytest.approx(brute_force(latents, labels, times), rel=0.25)


@pytest.mark.parametrize("block", [7, 30])
def test_streamed_curve_against_brute_force(block):
    """As above, of one class read in blocks; the block's size changes nothing but rounding."""
    stream = torch.Generator().manual_seed(4)
    latents, times = torch.randn(30, 2, 2, generator=stream), torch.tensor([0.3, 0.8])

    def curve(references, block=block):
        same = torch.Generator().manual_seed(5)
        return streamed_variance_curve(
            LINEAR, lambda: iter(latents.split(block)), 30, times, references=references, rows=500, generator=same
        )

    whole, single = curve(31), curve(1)
    assert whole.stablevm == pytest.approx([0, 0], abs=1e-9)
    assert single.stablevm == pytest.approx(single.cfm, rel=1e-5) and single.ess == pytest.approx([1, 1])
    assert whole.cfm == pytest.approx(brute_force(latents, torch.zeros(30), times), rel=0.25)
    assert curve(9).stablevm == pytest.approx(curve(9, block=11).stablevm, rel=1e-4)


def test_curve_over_classes_against_brute_force():
    """As above, each class read in blocks of its own: only that class's samples are references."""
    stream = torch.Generator().manual_seed(4)
    latents, labels = torch.randn(30, 2, 2, generator=stream), torch.arange(30) % 3
    times, heard = torch.tensor([0.3, 0.8]), []
    classes = [(10, lambda c=c: iter(latents[labels == c].split(4))) for c in range(3)]

    def curve(references, rows=170):
        same = torch.Generator().manual_seed(5)
        return class_variance_curve(
            LINEAR, classes, times, references=references, rows=rows, generator=same, progress=heard.append
        )

    whole, single, more = curve(11), curve(1), curve(99)
    assert whole.stablevm == more.stablevm == pytest.approx([0, 0], abs=1e-9)
    assert single.stablevm == pytest.approx(single.cfm, rel=1e-5) and single.ess == pytest.approx([1, 1])
    assert whole.cfm == pytest.approx(brute_force(latents, labels, times), rel=0.25)
    assert sum(heard) == 3 * 3 * 170 and max(heard) == 100


@pytest.mark.parametrize(
    "path, ratio", [(LINEAR, lambda t: t / (1 - t)), (COSINE, lambda t: math.tan(math.pi * t / 2))]
)
@pytest.mark.parametrize("deviation", [0.25, 1.0, 3.0])
def test_tau_of_gaussian_data(path, ratio, deviation):
    """Of data N(0, s^2), x_t leaves s^2 sigma^2 / (alpha^2 s^2 + sigma^2) open: half of s^2 where sigma / alpha = s."""
    t = torch.linspace(0, 1, 201, dtype=torch.float64)[1:]
    c = path.coefficients(t)
    left = deviation**2 * c.sigma**2 / (c.alpha**2 * deviation**2 + c.sigma**2)
    cfm, flat, band = (path.offset_gain(t, t) ** 2 * left).tolist(), [1.0] * 200, [(0.0, 0.0)] * 200
    tau = VarianceCurve(t.tolist(), cfm, flat, band, band, flat, 8).recommended_tau(path)
    assert ratio(tau) == pytest.approx(deviation, rel=2e-3)


@pytest.mark.parametrize(
    "ess, split", [([1, 1.9, 2, 5], 0.4), ([1, 1, 1, 1], 0.8), ([3, 1, 1, 1], 0), ([1, 2, 1, 3], 0.2)]
)
def test_split_point_ends_the_first_stretch_of_single_references(ess, split):
    times = [0.2, 0.4, 0.6, 0.8]
    flat, band = [0.0] * 4, [(0.0, 0.0)] * 4
    assert VarianceCurve(times, flat, flat, band, band, ess, 8).split_point() == split


def brute_force(latents, labels, times):
    """E |CFM target - v|^2 / d over 2,000 draws, by weights written down plainly (another stream, seed 6)."""
    stream, found = torch.Generator().manual_seed(6), []
    for t in times.tolist():
        total = 0.0
        for _ in range(2000):
            anchor = int(torch.randint(30, (), generator=stream))
            x0, noise = latents[anchor].flatten(), torch.randn(4, generator=stream)
            group = latents[labels == labels[anchor]].flatten(1)
            x_t = (1 - t) * x0 + t * noise
            weights = (-(x_t - (1 - t) * group).square().sum(1) / (2 * t**2)).softmax(0)
            mean = weights @ group
            total += ((noise - x0) - ((x_t - (1 - t) * mean) / t - mean)).square().mean().item() / 2000
        found.append(total)
    return found
