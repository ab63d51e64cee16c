"""Distributions of training times (uniform, EDM's log-normal noise levels, SD3's logit-normal) and their shift."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stablevm.choices import TimeName
from stablevm.interpolant import Interpolant
from stablevm.support.errors import UserError, arg
from stablevm.support.moved import renamed
from stablevm.support.ranges import check_word
from stablevm.support.rng import AnyGenerator, rand, randn

# ln(sigma/alpha) ~ N(mean, std^2): EDM (Karras et al., 2022, table 1) and SD3 (Esser et al., 2024, section 3.1).
LOG_RATIO_MOMENTS = {"lognormal": (-1.2, 1.2), "logit_normal": (0.0, 1.0)}
# Values of a latent of Stable Diffusion at 256 x 256 pixels, whose times are not shifted (RAE: Zheng et al., 2025).
UNSHIFTED_DIMENSION = 4 * 32 * 32


def automatic_shift(shape: Sequence[int]) -> float:
    """The factor by which times of latents of `shape` are shifted: `sqrt(dimension / 4096)` (RAE, 2025; SD3, 2024).

    The more values a latent has, the more noise it takes to hide it.
    """
    return math.sqrt(math.prod(shape) / UNSHIFTED_DIMENSION)


@renamed(stream="generator")
def draw_times(
    name: TimeName,
    path: Interpolant,
    rows: int,
    generator: AnyGenerator,
    *,
    shift: float = 1.0,
    mean: float | None = None,
    deviation: float | None = None,
) -> Tensor:
    """Draw `rows` training times in [0, 1]: a tensor (rows,), float32 on the CPU.

    name: "uniform" is U[0, 1). "lognormal" draws EDM's noise levels, ln(sigma/alpha) ~ N(-1.2, 1.2^2), and
    "logit_normal" draws ln(sigma/alpha) ~ N(0, 1), which on the linear path is SD3's logit-normal distribution of t;
    `path` turns these ratios into times. generator: the source of random numbers, one for all rows or one for each.
    shift: a factor of the drawn times' sigma / alpha, as in `Interpolant.shift`. mean, deviation: of ln(sigma/alpha),
    in place of those of the name; none with "uniform".

    Raises UserError for any other name, and for a mean or deviation of uniform times.
    """
    check_word("weighting", name, TimeName)
    if name == "uniform":
        if mean is not None or deviation is not None:
            raise UserError(f"{arg('weighting_mean')}, {arg('weighting_std')}: expected none with weighting uniform")
        return path.shift(rand((rows,), generator), shift)
    own = LOG_RATIO_MOMENTS[name]
    mean, deviation = own[0] if mean is None else mean, own[1] if deviation is None else deviation
    return path.time_at_ratio(shift * torch.exp(mean + deviation * randn((rows,), generator)))
