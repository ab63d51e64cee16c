"""MeanFlow (Geng et al., 2025): targets for the mean velocity over an interval, for images in one or a few steps.

The mean velocity of the flow from time r to t is `u(x_t, r, t) = (1 / (t - r)) int_r^t v(x_s, s) ds`, so one step leads
from noise to data: `x_0 = x_1 - u(x_1, 0, 1)`. Differentiating `(t - r) u` by t along the flow gives the identity

    u = v - (t - r) du/dt,   du/dt = v . du/dx_t + du/dt at fixed x_t and r        (their equation 6),

whose right side, with the network in place of u and no gradient, is the target (equations 9 and 10). It is linear in v,
so any unbiased v at the same x_t leaves its mean as it is: one with less variance, such as StableVM's, makes it less
noisy. `Draw.target` is that v.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stablevm.draw import Draw
from stablevm.support.errors import UserError, arg
from stablevm.support.precision import without_autocast
from stablevm.support.ranges import BELOW_1, NOT_NEGATIVE, TIME
from stablevm.support.rng import to_device

MeanVelocity = Callable[..., Tensor]  # network(x (B, ...), t (B,), labels (B,), r=(B,)) to u (B, ...)
ERROR_FLOOR = 1e-3  # c of the adaptive weight (their section 4.3)


@dataclass(frozen=True, kw_only=True)
class MeanFlow:
    """The target and the loss of MeanFlow, for draws whose settings have an `instant_share` below 1.

    power: p of the adaptive weight `1 / (|error|^2 + c)^p`, 0 or more; 0 weighs all samples alike. The published 1 lets
    samples with small errors count most, and StableVM's are small near the noise: 0.5 was better with its velocities.
    omega, kappa: guidance inside the target (their appendix), for samples with a label and with t in [guidance_low,
    guidance_high]: v becomes `omega v + kappa u(x_t, t, t | label) + (1 - omega - kappa) u(x_t, t, t |
    no label)`. The network then makes guided samples without a second evaluation; the effective guidance scale is
    `omega / (1 - kappa)`, and 1 without guidance. It needs null_class, the label of samples without one.
    UserError for a number out of its range, and for guidance without null_class.
    """

    power: float = 1.0
    omega: float = 1.0
    kappa: float = 0.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    null_class: int | None = None

    def __post_init__(self) -> None:
        NOT_NEGATIVE.check("power", self.power)
        NOT_NEGATIVE.check("omega", self.omega)
        BELOW_1.check("kappa", self.kappa)
        TIME.check("guidance_low", self.guidance_low)
        TIME.check("guidance_high", self.guidance_high)
        if self.is_guided and self.null_class is None:
            raise UserError(
                f"{arg('omega')} {self.omega:g}: guidance needs null_class, the label of samples without one"
            )

    @property
    def is_guided(self) -> bool:
        """Whether the target holds guidance."""
        return (self.omega, self.kappa) != (1.0, 0.0)

    @torch.no_grad()
    def target(self, network: MeanVelocity, draw: Draw) -> Tensor:
        """The target (B, *shape) of the mean velocity, float32 and without gradient.

        network: called as network(x_t, t, labels, r=r), in float32 whatever autocast says, because half precision
        can't resolve the derivative. The derivative is one forward-mode product (`torch.func.jvp`), with the plain
        attention kernel, as the fused ones have no forward derivative. Samples whose interval is a single time need
        none: their target is v. UserError for a draw without intervals.
        """
        if draw.r is None or draw.host_r is None:
            raise UserError("the draw has no intervals: give its ObjectiveSettings an instant_share below 1")
        velocity = draw.target.float()
        with without_autocast(draw.t.device), sdpa_kernel(SDPBackend.MATH):
            if self.is_guided:
                velocity = self._guided(network, draw, velocity)
            rows = to_device((draw.host_r < draw.host_t).nonzero().squeeze(1), draw.t.device)
            if not len(rows):
                return velocity
            v, t, r, labels = velocity[rows], draw.t[rows], draw.r[rows], draw.labels[rows]
            slope = total_derivative(lambda *at: network(at[0], at[1], labels, r=at[2]), draw.x_t[rows], t, r, v)
        length = (t - r).view(-1, *[1] * (v.ndim - 1))
        return velocity.index_copy(0, rows, v - length * slope.float())

    def _guided(self, network: MeanVelocity, draw: Draw, velocity: Tensor) -> Tensor:
        """The velocity with guidance by the network's own velocities at t."""
        assert self.null_class is not None
        inside = (self.guidance_low <= draw.t) & (draw.t <= self.guidance_high) & (draw.labels != self.null_class)
        without = network(draw.x_t, draw.t, torch.full_like(draw.labels, self.null_class), r=draw.t)
        guided = self.omega * velocity + (1 - self.omega - self.kappa) * without.float()
        if self.kappa:
            guided = guided + self.kappa * network(draw.x_t, draw.t, draw.labels, r=draw.t).float()
        return torch.where(inside.view(-1, *[1] * (velocity.ndim - 1)), guided, velocity)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The weighted squared error of each sample: (B,), float32, for a prediction and a target (B, ...).

        It is the squared error, summed over values, times its adaptive weight, through which no gradient flows.
        UserError where their shapes differ.
        """
        if prediction.shape != target.shape:
            raise UserError(
                f"the prediction is {tuple(prediction.shape)}, the target {tuple(target.shape)}: expected the same"
            )
        squared = (prediction.float() - target.float()).square().flatten(1).sum(1)
        return squared / (squared.detach() + ERROR_FLOOR) ** self.power


def total_derivative(
    mean_velocity: Callable[[Tensor, Tensor, Tensor], Tensor], x_t: Tensor, t: Tensor, r: Tensor, velocity: Tensor
) -> Tensor:
    """The derivative of u(x_t, t, r) by t along a flow with `velocity` (B, ...): `v . du/dx_t + du/dt`, (B, ...).

    mean_velocity: a function of x_t (B, ...), t (B,) and r (B,).
    """
    at, along = (x_t, t, r), (velocity.to(x_t), torch.ones_like(t), torch.zeros_like(r))
    slope: Tensor = torch.func.jvp(mean_velocity, at, along)[1]
    return slope
