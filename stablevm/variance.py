"""How noisy the targets are: the variance of CFM's and StableVM's about the exact velocity of the data, over time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stablevm.interpolant import Interpolant, align
from stablevm.posterior import posterior


@dataclass(frozen=True)
class VarianceCurve:
    """Per time: variances per dimension of the targets, and StableVM's mean effective sample size."""

    t: list[float]
    cfm: list[float]
    stablevm: list[float]
    ess: list[float]
    references: int  # per sample, the anchor among them


def variance_curve(
    path: Interpolant,
    latents: Tensor,
    labels: Tensor,
    times: Tensor,
    *,
    references: int,
    rows: int,
    stream: torch.Generator,
) -> VarianceCurve:
    """`V(t) = E |target - v(x_t)|^2 / d` for latents (N, *shape) with labels (N,), at times (T,).

    v is the exact velocity of the class's empirical distribution: the whole class is its posterior (docs/theory.md).
    Each time uses `rows` anchors drawn from the data, each with `references - 1` others of its class (fewer where the
    class is smaller) for StableVM. Both differ from v by the gain times a difference of posterior means.
    """
    members = [(labels == label).nonzero().squeeze(1) for label in range(int(labels.max()) + 1)]
    points = []
    for time in times.tolist():
        anchors = torch.randint(len(latents), (rows,), generator=stream)
        noise = torch.randn(rows, *latents.shape[1:], generator=stream)
        t = torch.full((rows,), time)
        gain = path.offset_gain(t, noise)
        errors, sizes = [], []
        for label in labels[anchors].unique().tolist():
            mine = (labels[anchors] == label).nonzero().squeeze(1)
            group, itself = members[label], anchors[mine][:, None] == members[label]
            x0, eps = latents[anchors[mine]], noise[mine]
            exact = posterior(path, x0, eps, t[mine], latents[group], keep=~itself).offset
            few = posterior(path, x0, eps, t[mine], latents[group], keep=_choose(~itself, references - 1, stream))
            scale = align(gain[mine].flatten(), x0)
            errors.append(torch.stack([(scale * exact).square(), (scale * (few.offset - exact)).square()]).flatten(2))
            sizes.append(few.ess)
        cfm, stablevm = torch.cat(errors, dim=1).double().mean(dim=(1, 2)).tolist()
        points.append((time, cfm, stablevm, torch.cat(sizes).double().mean().item()))
    t_list, cfm_list, stablevm_list, ess_list = (list(column) for column in zip(*points, strict=True))
    return VarianceCurve(t_list, cfm_list, stablevm_list, ess_list, references)


def _choose(allowed: Tensor, count: int, stream: torch.Generator) -> Tensor:
    """A mask of at most `count` of each row's allowed columns, at random."""
    keys = torch.rand(allowed.shape, generator=stream).masked_fill(~allowed, -1.0)
    best = keys.topk(min(count, keys.shape[1]), dim=1).indices
    return torch.zeros_like(allowed).scatter_(1, best, True) & allowed
