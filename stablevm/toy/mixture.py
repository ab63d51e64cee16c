"""A mixture of Gaussians with diagonal covariances, and its exact posterior mean, velocity and score along a path."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stablevm.interpolant import Interpolant, Kind, align


@dataclass(frozen=True)
class GaussianMixture:
    """weights (K,) that sum to 1, means (K, d), variances (K, d); all of one dtype and device."""

    weights: Tensor
    means: Tensor
    variances: Tensor

    def sample(self, count: int, stream: torch.Generator) -> Tensor:
        """`count` independent samples (count, d)."""
        component = torch.multinomial(self.weights, count, replacement=True, generator=stream)
        noise = torch.randn(count, self.means.shape[1], generator=stream, dtype=self.means.dtype)
        return self.means[component] + self.variances[component].sqrt() * noise

    def posterior_mean(self, path: Interpolant, x_t: Tensor, t: Tensor) -> Tensor:
        """`E[x0 | x_t]` of x_t (B, d) at t (B,) or scalar, in closed form (docs/theory.md).

        Given component k, x_t is Gaussian with mean alpha mu_k and variance alpha^2 S_k + sigma^2. The result has the
        shape (B, d); memory is (B, K, d).
        """
        at = path.coefficients(align(t, x_t))
        alpha, sigma = at.alpha[..., None], at.sigma[..., None]
        variance = alpha.square() * self.variances + sigma.square()
        residual = x_t[:, None] - alpha * self.means
        log_density = -0.5 * (residual.square() / variance + variance.log() + math.log(2 * math.pi)).sum(-1)
        share = (self.weights.log() + log_density).softmax(-1)
        return (share[..., None] * (self.means + alpha * self.variances / variance * residual)).sum(1)

    def field(self, path: Interpolant, x_t: Tensor, t: Tensor, kind: Kind = "velocity") -> Tensor:
        """The exact velocity, score, noise or data prediction at x_t (B, d)."""
        return path.convert(self.posterior_mean(path, x_t, t), x_t, t, "x0", kind)
