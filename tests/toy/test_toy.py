"""The toy study: exact fields, draws that depend on the seed alone, methods, results, options."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

from stablevm.interpolant import COSINE, INTERPOLANTS, LINEAR
from stablevm.posterior import posterior
from stablevm.support import rng
from stablevm.support.errors import UserError
from stablevm.toy import training
from stablevm.toy.config import METHODS, ToyConfig
from stablevm.toy.experiment import CURVE_TIMES, cifar10_files, in_field
from stablevm.toy.mixture import GaussianMixture, mixture_curve, published_mixture
from stablevm.toy.network import _dropout_factors, make_network
from stablevm.toy.results import result_path
from stablevm.toy.training import Draws, EvaluationPoints, mixture_of, to_field
from stablevm.variance import VarianceCurve
from tests.helpers.mixtures import make_mixture

SMALL = ToyConfig(batch_size=16, references=64, components=5, dimension=3, eval_samples=50, variance_samples=20)


@pytest.mark.parametrize("path", INTERPOLANTS.values(), ids=INTERPOLANTS.keys())
@pytest.mark.parametrize("time", [0.05, 0.4, 0.9])
def test_closed_form_against_quadrature(path, time):
    """E[x0 | x_t] in one dimension by Riemann sums over x0 on a fine grid."""
    mixture = make_mixture(4, 1, seed=1, dtype=torch.float64)
    x_t = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)[:, None]
    grid = torch.linspace(-3, 3, 60_001, dtype=torch.float64)
    variances = mixture.variances[:, 0]
    gaussians = torch.exp(-((grid[:, None] - mixture.means[:, 0]) ** 2) / (2 * variances)) / variances.sqrt()
    at = path.coefficients(torch.tensor(time, dtype=torch.float64))
    likelihood = torch.exp(-((x_t - at.alpha * grid) ** 2) / (2 * at.sigma**2))
    weight = (gaussians @ mixture.weights) * likelihood
    expected = (weight @ grid) / weight.sum(1)
    torch.testing.assert_close(mixture.posterior_mean(path, x_t, time)[:, 0], expected, rtol=1e-6, atol=1e-8)


def test_closed_form_against_a_huge_reference_set(stream):
    """400,000 references at t = 0.6 in two dimensions: within 4 standard errors (the fixture's seed)."""
    mixture, rows, count = make_mixture(4, 2, seed=2), 8, 400_000
    x0, noise = mixture.sample(rows, stream), torch.randn(rows, 2, generator=stream)
    t = torch.full((rows,), 0.6)
    found = posterior(LINEAR, x0, noise, t, mixture.sample(count, stream))
    exact = mixture.posterior_mean(LINEAR, LINEAR.interpolate(x0, noise, t), 0.6)
    error = (x0 - found.offset - exact).abs()
    spread = mixture.sample(5000, stream).std(0)
    assert (error < 4 * spread / found.ess[:, None].sqrt()).all()


@pytest.mark.parametrize("path", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_score_and_velocity_agree_through_the_conversion(path, stream):
    mixture = make_mixture(5, 3, seed=3, dtype=torch.float64)
    x_t = torch.randn(20, 3, generator=stream, dtype=torch.float64).requires_grad_()
    time = torch.tensor(0.4, dtype=torch.float64)
    at = path.coefficients(time)
    variance = at.alpha**2 * mixture.variances + at.sigma**2
    log_parts = -0.5 * ((x_t[:, None] - at.alpha * mixture.means) ** 2 / variance + variance.log()).sum(-1)
    log_density = (mixture.weights.log() + log_parts).logsumexp(-1)
    score = torch.autograd.grad(log_density.sum(), x_t)[0]
    x_t = x_t.detach()
    torch.testing.assert_close(mixture.field(path, x_t, time, "score"), score)
    velocity = mixture.field(path, x_t, time)
    torch.testing.assert_close(path.convert(velocity, x_t, time, "velocity", "score"), score)
    if path is LINEAR:
        config = replace(SMALL, vector_field="score")
        torch.testing.assert_close(to_field(config, velocity, x_t, time.expand(20)), at.sigma * score)


def test_published_mixture(stream):
    mixture = published_mixture(100, 10, stream)
    assert mixture.means.shape == (100, 10) and mixture.means.abs().max() <= 1
    assert mixture.variances.min() >= 0.01 and mixture.variances.max() <= 0.1
    assert mixture.weights.sum().item() == pytest.approx(1) and mixture.weights.max() / mixture.weights.min() <= 10


def test_mixture_samples_have_its_moments(stream):
    """Mean and variance per dimension of 50,000 samples: z < 4 for the mean (fixture's seed), 5 % for the variance."""
    mixture, count = make_mixture(3, 2, seed=4), 50_000
    samples = mixture.sample(count, stream)
    mean = mixture.weights @ mixture.means
    variance = mixture.weights @ (mixture.variances + mixture.means**2) - mean**2
    assert ((samples.mean(0) - mean).abs() / (variance / count).sqrt()).max() < 4
    torch.testing.assert_close(samples.var(0), variance, rtol=0.05, atol=0)


def test_streamed_references_equal_plain_ones(monkeypatch):
    """Sets of several blocks, several updates: the same draws to 1e-6."""
    monkeypatch.setattr(training, "BLOCK", 24)
    mixture = mixture_of(SMALL, 0)
    plain, streamed = (iter(Draws(method, SMALL, mixture, 0)) for method in ("stable_vm", "stable_vm_efficient"))
    for one, other in itertools.islice(zip(plain, streamed, strict=True), 5):
        for name in ("x_t", "t", "target", "ess"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-6, atol=1e-6)


def test_a_million_references_in_bounded_memory():
    config = replace(SMALL, references=1_000_000, batch_size=4)
    draw = next(iter(Draws("stable_vm_efficient", config, mixture_of(config, 0), 0)))
    exact = torch.stack(
        [mixture_of(config, 0).field(LINEAR, x[None], t.item())[0] for x, t in zip(draw.x_t, draw.t, strict=True)]
    )
    error = (draw.target - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.max() < 0.3 and draw.ess.max() > 1000


def test_everything_depends_on_the_seed_alone():
    def facts(seed):
        mixture = mixture_of(SMALL, seed)
        return (
            mixture.means,
            EvaluationPoints.of(SMALL, mixture, seed).exact,
            next(iter(Draws("stf", SMALL, mixture, seed))).x_t,
        )

    for one, again, other in zip(facts(0), facts(0), facts(1), strict=True):
        assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize("method", METHODS)
def test_methods_draw_what_they_should(method):
    draw = next(iter(Draws(method, SMALL, mixture_of(SMALL, 0), 0)))
    assert draw.x_t.shape == (16, 3)
    assert (draw.ess.max() == 1) == (method == "cfm")


def test_divergence_is_zero_for_the_exact_field():
    points = EvaluationPoints.of(SMALL, mixture_of(SMALL, 0), 0)

    class Exact(torch.nn.Module):
        def forward(self, x, t):
            return points.exact

    assert points.divergence(Exact()) == [0.0] * len(SMALL.eval_times)
    assert torch.equal(points.t.unique(), torch.tensor(SMALL.eval_times))


def test_curves_of_mixtures():
    mixture, sizes = mixture_of(SMALL, 0), {"references": SMALL.references, "rows": SMALL.variance_samples}
    curve = mixture_curve(mixture, CURVE_TIMES, **sizes, seed=SMALL.seed)
    assert len(curve.t) == len(CURVE_TIMES) == len(curve.ess) and curve.references == 64
    assert curve.cfm[-1] > 5 * curve.stablevm[-1], "at the prior StableVM's variance is far below"
    assert all(low <= high for low, high in curve.cfm_band + curve.stablevm_band)
    assert 1 <= curve.ess[0] < curve.ess[-1] == pytest.approx(64) and 0 <= curve.split_point() < 1


def test_the_published_network_by_its_formula():
    """14,634 parameters, and the output re-derived in float64 with modulations that are not zero."""
    network = make_network(ToyConfig(), rng.generator(0, "network")).double()
    assert sum(parameter.numel() for parameter in network.parameters()) == 14_634
    stream = torch.Generator().manual_seed(1)
    for modulation in network.modulations:
        assert not modulation.weight.any() and not modulation.bias.any(), "it begins as a plain network"
        modulation.weight.data.copy_(torch.randn(modulation.weight.shape, generator=stream))
    x, t = torch.randn(5, 10, generator=stream).double(), torch.rand(5, generator=stream).double()
    angles = 2 * math.pi * t[:, None] * torch.tensor([1000 ** (-i / 16) for i in range(16)]).double()
    time = torch.cat([angles.sin(), angles.cos()], 1)
    h = torch.cat([x, time], 1) @ network.enter.weight.T + network.enter.bias
    for norm, modulation, layer in zip(network.norms, network.modulations, network.layers, strict=True):
        scale, shift = (time @ modulation.weight.T + modulation.bias).split(32, 1)
        h = (h - h.mean(1, keepdim=True)) / (h.var(1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        h = (h * (1 + scale) + shift) @ layer.weight.T + layer.bias
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    expected = h @ network.leave.weight.T + network.leave.bias
    torch.testing.assert_close(network(x, t), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["adaptive", "perceptron"])
def test_dropout_is_drawn_from_its_own_stream(name):
    """The same stream drops the same values, none is dropped without one, and the global stream stays."""
    network = make_network(replace(ToyConfig(), network=name), rng.generator(0, "network"))
    x, t = torch.randn(1, 10, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3])
    before = torch.random.get_rng_state()
    one, again = (network(x, t, rng.generator(0, "dropout")) for _ in range(2))
    assert torch.equal(one, again) and not torch.equal(one, network(x, t))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_dropout_keeps_the_mean():
    """Of 100,000 ones a share of 0.1 is dropped (z < 4, seed 0), and the others are scaled up by 1 / 0.9."""
    dropped = _dropout_factors((4, 250, 100), 0.1, rng.generator(0, "dropout"))
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.9])
    assert abs((dropped == 0).float().mean().item() - 0.1) < 4 * (0.09 / 100_000) ** 0.5


def test_the_score_has_variance_curves_of_its_own():
    """Errors of sigma times the score, computed from converted targets, are the velocity's times (1 - t)^2."""
    mixture, stream = mixture_of(SMALL, 0), torch.Generator().manual_seed(0)
    x0, noise, t = mixture.sample(40, stream), torch.randn(40, 3, generator=stream), torch.full((40,), 0.3)
    x_t = LINEAR.interpolate(x0, noise, t)
    exact, target = mixture.field(LINEAR, x_t, 0.3).float(), LINEAR.velocity(x0, noise, t)
    score = replace(SMALL, vector_field="score")
    errors = [
        (to_field(config, target, x_t, t) - to_field(config, exact, x_t, t)).square().mean().item()
        for config in (SMALL, score)
    ]
    assert errors[1] == pytest.approx(0.7**2 * errors[0], rel=1e-5)
    curve = VarianceCurve([0.3, 1.0], errors[:1] * 2, [1.0] * 2, [(0.5, 2.0)] * 2, [(0.5, 2.0)] * 2, [1.0] * 2, 64)
    found = in_field(score, curve)
    assert found.cfm[0] == pytest.approx(errors[1], rel=1e-5) and found.cfm[1] == pytest.approx(0, abs=1e-12)
    assert found.stablevm[0] == pytest.approx(0.49) and found.cfm_band[0] == pytest.approx((0.245, 0.98))
    assert in_field(SMALL, curve) is curve and found.ess == curve.ess


def test_results_have_names_of_their_own():
    paths = {
        result_path(config, method, seed)
        for method in METHODS
        for seed in (0, 1)
        for config in (SMALL, replace(SMALL, vector_field="score"), replace(SMALL, width=64))
    }
    assert len(paths) == 4 * 2 * 3
    assert result_path(SMALL, "cfm", 0) == result_path(replace(SMALL, seeds=9, no_plot_variance=True), "cfm", 0)


def test_methods_are_parsed():
    assert ToyConfig(exp=("stf,cfm",)).methods == ("cfm", "stf")
    assert ToyConfig(exp=("all",)).methods == METHODS
    with pytest.raises(UserError, match="--exp gan: expected cfm, stf"):
        ToyConfig(exp=("gan",)).validate()
    with pytest.raises(UserError, match=r"--eval-times .*: expected times in \(0, 1\]"):
        ToyConfig(eval_times=(0.0,)).validate()
    with pytest.raises(UserError, match="--references 10: expected at least --batch-size 256 for stf"):
        ToyConfig(exp=("all",), references=10).validate()
    ToyConfig(exp=("stable_vm",), references=10).validate()
    assert json.dumps(ToyConfig().result_settings())


def test_cifar10_is_not_unpickled(tmp_path):
    with pytest.raises(UserError, match=r"no file data_batch_1.bin.*Python version is a pickle"):
        cifar10_files(tmp_path)
    for number in range(1, 6):
        (tmp_path / f"data_batch_{number}.bin").write_bytes(b"\0" * 3073 * 2)
    assert len(cifar10_files(tmp_path)) == 5
    (tmp_path / "data_batch_3.bin").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=r"data_batch_3.bin is not a multiple of 3073 bytes"):
        cifar10_files(tmp_path)


def test_one_gaussian_by_hand():
    mixture = GaussianMixture(torch.ones(1), torch.zeros(1, 1), torch.full((1, 1), 4.0))
    t = 0.25
    gain = 0.75 * 4 / (0.75**2 * 4 + t**2)
    assert mixture.posterior_mean(LINEAR, torch.tensor([[2.0]]), t).item() == pytest.approx(2 * gain)
    assert not math.isnan(mixture.field(LINEAR, torch.tensor([[2.0]]), 1.0).item())
