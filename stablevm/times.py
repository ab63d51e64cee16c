"""How training times are drawn."""

from typing import Literal, get_args

import torch
from torch import Tensor

from stablevm.interpolant import Interpolant
from stablevm.support.errors import UserError, arg
from stablevm.support.moved import renamed
from stablevm.support.rng import AnyGenerator, rand, randn

TimeName = Literal["uniform", "lognormal", "logit_normal"]

# ln(sigma/alpha) ~ N(mean, std^2): EDM (Karras et al., 2022, table 1) and SD3 (Esser et al., 2024, section 3.1).
LOG_RATIO_MOMENTS = {"lognormal": (-1.2, 1.2), "logit_normal": (0.0, 1.0)}


@renamed(stream="generator")
def draw_times(name: TimeName, path: Interpolant, rows: int, generator: AnyGenerator) -> Tensor:
    """Training times (B,) in [0, 1], float32 on the CPU.

    uniform: U[0, 1). lognormal: EDM's noise levels, ln(sigma/alpha) ~ N(-1.2, 1.2^2). logit_normal: N(0, 1) instead,
    which on the linear path is the logit-normal distribution of SD3. Both become times through the path in use.
    """
    if name == "uniform":
        return rand((rows,), generator)
    if name not in LOG_RATIO_MOMENTS:
        raise UserError(f"{arg('weighting')} {name!r}: expected one of {', '.join(get_args(TimeName))}")
    mean, deviation = LOG_RATIO_MOMENTS[name]
    return path.time_at_ratio(torch.exp(mean + deviation * randn((rows,), generator)))
