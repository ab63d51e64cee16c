"""Gaussian mixtures with diagonal covariances: the exact posterior mean and fields, and the variance of targets."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stablevm.interpolant import LINEAR, Interpolant, Kind
from stablevm.posterior import posterior
from stablevm.support import rng
from stablevm.support.precision import full_precision
from stablevm.variance import VarianceCurve


@dataclass(frozen=True)
class GaussianMixture:
    """A Gaussian mixture: weights (K,) that sum to 1, means (K, d) and variances (K, d), of one dtype and device."""

    weights: Tensor
    means: Tensor
    variances: Tensor

    @property
    def dimension(self) -> int:
        return self.means.shape[1]

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw independent samples (count, d)."""
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.dimension, generator=generator, dtype=self.means.dtype)
        # index_select is several times faster than indexing with a tensor.
        deviation = self.variances.sqrt().index_select(0, component)
        return torch.addcmul(self.means.index_select(0, component), deviation, noise)

    def posterior_mean(self, path: Interpolant, x_t: Tensor, t: float | Tensor) -> Tensor:
        """The posterior mean `E[x0 | x_t]` in closed form, (B, d) float64, at x_t (B, d) and one time t in [0, 1]:

            sum_k r_k [mu_k + alpha S_k (alpha^2 S_k + sigma^2)^-1 (x_t - alpha mu_k)],

        where r_k are the responsibilities, as x_t given component k is Gaussian with mean alpha mu_k and variance
        alpha^2 S_k + sigma^2. Squares are expanded, so that matrix products do the work in memory of (B, K), not
        (B, K, d).
        """
        at = path.coefficients(torch.as_tensor(t, dtype=torch.float64))
        x, means, spread = x_t.double(), self.means.double(), self.variances.double()
        variance = at.alpha.square() * spread + at.sigma.square()
        centre = at.alpha * means
        with full_precision(x.device):
            square = x.square() @ (1 / variance).T - 2 * x @ (centre / variance).T + (centre.square() / variance).sum(1)
            log_density = -0.5 * (square + (variance.log() + math.log(2 * math.pi)).sum(1))
            share = (self.weights.double().log() + log_density).softmax(-1)
            gain = at.alpha * spread / variance
            return share @ (means - gain * centre) + x * (share @ gain)

    def field(self, path: Interpolant, x_t: Tensor, t: float | Tensor, kind: Kind = "velocity") -> Tensor:
        """The exact velocity, score, noise or data prediction at x_t (B, d), in float64."""
        time = torch.as_tensor(t, dtype=torch.float64)
        return path.convert(self.posterior_mean(path, x_t, t), x_t.double(), time, "x0", kind)

    def sliced_distance(self, samples: Tensor, directions: Tensor) -> float:
        """The sliced Wasserstein-1 distance of samples (n, d) to the mixture, in float64.

        It is the mean over unit vectors `directions` (m, d) of the area between the distribution function of the
        samples along the vector and the exact one. It is 0 for infinitely many samples of the mixture, and of the
        order of deviation / sqrt(n) for n.
        """
        directions = directions.double()
        means = self.means.double() @ directions.T
        deviations = (self.variances.double() @ directions.T.square()).sqrt()
        weights = self.weights.double()[:, None]
        total = 0.0
        for values, mean, deviation in zip((samples.double() @ directions.T).T, means.T, deviations.T, strict=True):
            reach = torch.cat([values, mean - _TAIL * deviation, mean + _TAIL * deviation])
            grid = torch.linspace(float(reach.min()), float(reach.max()), _GRID_POINTS, dtype=torch.float64)
            exact = (weights * torch.special.ndtr((grid - mean[:, None]) / deviation[:, None])).sum(0)
            empirical = torch.searchsorted(values.sort().values, grid, right=True) / len(values)
            total += float(torch.trapezoid((empirical - exact).abs(), grid))
        return total / len(directions)


_TAIL, _GRID_POINTS = 5.0, 1001  # deviations beyond the outermost mean; the grid is far finer than a component


def published_mixture(components: int, dimension: int, generator: torch.Generator) -> GaussianMixture:
    """The mixture of the published study: means U(-1, 1), variances U(0.01, 0.1), weights U(0.1, 1) normalised."""
    means = torch.rand(components, dimension, generator=generator) * 2 - 1
    variances = torch.rand(components, dimension, generator=generator) * 0.09 + 0.01
    weights = torch.rand(components, generator=generator) * 0.9 + 0.1
    return GaussianMixture(weights / weights.sum(), means, variances)


def mixture_curve(mixture: GaussianMixture, times: Tensor, *, references: int, rows: int, seed: int) -> VarianceCurve:
    """The variance of targets about the closed-form velocity at times (T,), on the linear path.

    Each time has `rows` samples, which share a set of references of their own.
    """

    def samples_at(time: float) -> tuple[Tensor, Tensor, Tensor]:
        generator = rng.generator(seed, "variance", mixture.dimension, f"{time:.6f}")
        x0, others = mixture.sample(rows, generator), mixture.sample(references - 1, generator)
        noise, t = torch.randn(x0.shape, generator=generator), torch.full((rows,), time)
        found = posterior(LINEAR, x0, noise, t, others)
        exact = mixture.field(LINEAR, LINEAR.interpolate(x0, noise, t), time)
        plain = LINEAR.velocity(x0, noise, t)
        target = plain + LINEAR.offset_gain(t, x0) * found.offset
        return (plain - exact).square().mean(1), (target - exact).square().mean(1), found.ess

    return VarianceCurve.of(times, references, [samples_at(time) for time in times.tolist()])
