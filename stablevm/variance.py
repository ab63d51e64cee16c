"""The variance of the targets of CFM and StableVM about the exact velocity, as a function of time."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stablevm.interpolant import Interpolant, align
from stablevm.posterior import Posterior, posterior, posterior_over_blocks
from stablevm.support.moved import renamed
from stablevm.support.rng import rand, randn

BAND = (0.15, 0.85)  # quantiles over samples, as published
# Below the split point the mean effective sample size is less than this: x_t still tells which sample it came from.
SPLIT_ESS = 2.0
OPEN_SHARE = 0.5  # of the data's variance is unexplained by x_t at tau, where w(tau) = 1/2 for sigmoid and snr
LOST_SHARE = 0.02  # of what references remove, which training without them at early times may lose
PASS_ROWS = 100  # anchors that share one pass over a class's data, each at all times


@dataclass(frozen=True)
class VarianceCurve:
    """The variance of the targets at each time, per dimension, and the mean effective sample size of StableVM.

    cfm, stablevm: the squared error of the target about the exact velocity, per dimension, averaged over samples; each
    band holds its 15 % and 85 % quantiles. ess: the mean effective sample size. All lists have one entry per time `t`.
    """

    t: list[float]
    cfm: list[float]
    stablevm: list[float]
    cfm_band: list[tuple[float, float]]
    stablevm_band: list[tuple[float, float]]
    ess: list[float]
    references: int  # per sample, including the anchor; the mean over classes where small ones have fewer

    @classmethod
    def of(cls, times: Tensor, references: int, samples: Iterable[tuple[Tensor, Tensor, Tensor]]) -> "VarianceCurve":
        """Make the curve at times (T,) by averaging samples: for each time, the squared errors per dimension of CFM and
        of StableVM and the effective sample sizes, (rows,) each. references: their number, including the anchor.
        """
        cfm, stablevm, ess = zip(*samples, strict=True)
        return cls(
            times.tolist(),
            [values.double().mean().item() for values in cfm],
            [values.double().mean().item() for values in stablevm],
            [_band(values) for values in cfm],
            [_band(values) for values in stablevm],
            [values.double().mean().item() for values in ess],
            references,
        )

    def of_noise(self, path: Interpolant) -> "VarianceCurve":
        """The curve for targets that are the noise (-sigma times the score), converted from this one for velocities.

        At a given x_t the noise is affine in the velocity, `noise = (alpha v - alpha' x_t) / wronskian`, so each
        squared error is multiplied by `(alpha / wronskian)^2`, which is `(1 - t)^2` on the linear path.
        """
        c = path.coefficients(torch.tensor(self.t, dtype=torch.float64))
        factors = (c.alpha / c.wronskian).square().tolist()

        def scaled(values: list[float]) -> list[float]:
            return [factor * value for factor, value in zip(factors, values, strict=True)]

        def scaled_band(band: list[tuple[float, float]]) -> list[tuple[float, float]]:
            return [(factor * low, factor * high) for factor, (low, high) in zip(factors, band, strict=True)]

        return dataclasses.replace(
            self,
            cfm=scaled(self.cfm),
            stablevm=scaled(self.stablevm),
            cfm_band=scaled_band(self.cfm_band),
            stablevm_band=scaled_band(self.stablevm_band),
        )

    def split_point(self) -> float:
        """The split point xi: the largest time up to which the mean effective sample size stays below 2, or 0."""
        below = itertools.takewhile(lambda point: point[1] < SPLIT_ESS, zip(self.t, self.ess, strict=True))
        return max((time for time, _ in below), default=0.0)

    def removed_share(self, times: Tensor) -> float:
        """The share of CFM's variance at training times (N,) that averaging takes away, in [0, 1].

        A mean over an effective number of n references has about 1 / n of the variance of one. So the share is told
        without the error of StableVM's target, which is 0 where all of the data are references.
        """
        removed, total = self._removed(times)
        return float(removed.sum() / total.sum()) if total.sum() > 0 else 0.0

    def active_share(self, times: Tensor) -> float:
        """The share of training times (N,) at which the mean effective sample size is 2 or more.

        At the others a sample is nearly its own only reference.
        """
        return float((_interpolated(times.double(), self.t, self.ess) >= SPLIT_ESS).double().mean())

    def references_start(self, times: Tensor) -> float:
        """The latest time below which references take away nearly nothing at training times (N,); 1 if at no time.

        With targets of one sample below it, training loses at most 2 % of what references remove. It is 0 or a time of
        the curve.
        """
        removed, _ = self._removed(times)
        if not removed.sum() > 0:
            return 1.0
        lost = [float(removed[times < start].sum() / removed.sum()) for start in self.t]
        return max((start for start, share in zip(self.t, lost, strict=True) if share <= LOST_SHARE), default=0.0)

    def _removed(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """What averaging removes of the variance at each time (N,), and this variance, by lines between times."""
        gains = [variance * (1 - 1 / size) for variance, size in zip(self.cfm, self.ess, strict=True)]
        removed, total = (_interpolated(times.double(), self.t, values) for values in (gains, self.cfm))
        return removed, total

    def recommended_tau(self, path: Interpolant) -> float:
        """The time at which x_t leaves half of the data's variance unexplained; the curve must end at t = 1.

        `V_CFM = gain^2 E[tr Cov(x0 | x_t)] / d`, so the curve divided by gain^2, relative to its value at t = 1, is the
        unexplained share. It is 0 at t = 0 and interpolated linearly between the curve's times. path: that of the
        curve.
        """
        assert self.t[-1] == 1
        gain = path.offset_gain(torch.tensor(self.t, dtype=torch.float64), torch.tensor(self.t)).tolist()
        left = [variance / g**2 for variance, g in zip(self.cfm, gain, strict=True)]
        points = [(0.0, 0.0), *((t, value / left[-1]) for t, value in zip(self.t, left, strict=True))]
        for (t0, share0), (t1, share1) in itertools.pairwise(points):
            if share1 >= OPEN_SHARE:
                return t0 + (t1 - t0) * (OPEN_SHARE - share0) / (share1 - share0)
        raise AssertionError("the share at t = 1 is 1")


def _interpolated(x: Tensor, places: Sequence[float], values: Sequence[float]) -> Tensor:
    """The values (N,) at x (N,), float64, on lines from (0, 0) through `values` at `places`; constant after them."""
    grid = torch.tensor([0.0, *places], dtype=torch.float64)
    heights = torch.tensor([0.0, *values], dtype=torch.float64)
    right = torch.searchsorted(grid, x).clamp(1, len(grid) - 1)
    share = ((x - grid[right - 1]) / (grid[right] - grid[right - 1])).clamp(0, 1)
    return heights[right - 1] + share * (heights[right] - heights[right - 1])


@renamed(stream="generator")
def variance_curve(
    path: Interpolant,
    latents: Tensor,
    labels: Tensor,
    times: Tensor,
    *,
    references: int,
    rows: int,
    generator: torch.Generator,
    references_from: float = 0.0,
) -> VarianceCurve:
    """Measure `V(t) = E |target - v(x_t)|^2 / d` on `path`, for latents (N, *shape), labels (N,) and times (T,).

    v is the exact velocity of the class's empirical distribution, computed with the whole class as references
    (docs/theory.md). At each time `rows` anchors are drawn from the data. For StableVM each has `references - 1` other
    samples of its class as references (fewer where the class is smaller); below the time `references_from` its target
    is that of CFM.

    latents: as training sees them, that is, sampled if the autoencoder gives a mean and a deviation for each image.
    generator: a CPU generator, the source of anchors, noise and references.
    """
    members = [(labels == label).nonzero().squeeze(1) for label in range(int(labels.max()) + 1)]

    def samples_at(time: float) -> tuple[Tensor, Tensor, Tensor]:
        anchors = torch.randint(len(latents), (rows,), generator=generator)
        noise = randn((rows, *latents.shape[1:]), generator)
        parts = []
        for label in labels[anchors].unique().tolist():
            mine = (labels[anchors] == label).nonzero().squeeze(1)
            group, others = members[label], anchors[mine][:, None] != members[label]
            x0, eps, t = latents[anchors[mine]], noise[mine], torch.full((len(mine),), time, dtype=torch.float32)
            exact = posterior(path, x0, eps, t, latents[group], keep=others)
            few = posterior(path, x0, eps, t, latents[group], keep=_choose(others, references - 1, generator))
            parts.append(_errors(path, t, exact.offset, few, references_from))
        first, second, third = zip(*parts, strict=True)
        return torch.cat(first), torch.cat(second), torch.cat(third)

    weighed = torch.tensor([min(references, len(group)) for group in members])  # of each class
    return VarianceCurve.of(times, _rounded_mean(weighed[labels]), [samples_at(time) for time in times.tolist()])


def streamed_variance_curve(
    path: Interpolant,
    blocks: Callable[[], Iterator[Tensor]],
    count: int,
    times: Tensor,
    *,
    references: int,
    rows: int,
    generator: torch.Generator,
    references_from: float = 0.0,
) -> VarianceCurve:
    """Like `variance_curve`, without labels, for data of any size: `blocks()` reads all `count` samples in order, in
    blocks (n, *shape).

    In memory are one block, `references` samples, and `rows` samples for each time; the data is read twice. All times
    use the same anchors and the same references.
    """
    errors = _streamed_errors(path, blocks, count, times, references, rows, generator, references_from)
    return VarianceCurve.of(times, references, zip(*errors, strict=True))


def class_variance_curve(
    path: Interpolant,
    classes: Sequence[tuple[int, Callable[[], Iterator[Tensor]]]],
    times: Tensor,
    *,
    references: int,
    rows: int,
    generator: torch.Generator,
    references_from: float = 0.0,
    progress: Callable[[int], None] = lambda rows: None,
) -> VarianceCurve:
    """Like `variance_curve`, for classes of any size: each is a pair of its number of samples and a function that reads
    them in blocks (n, *shape).

    Each class has `rows` anchors, in groups of PASS_ROWS with the same references. `progress` is called after each
    group with its number of anchors.
    """
    parts = []
    for count, blocks in classes:
        for start in range(0, rows, PASS_ROWS):
            together = min(PASS_ROWS, rows - start)
            parts.append(_streamed_errors(path, blocks, count, times, references, together, generator, references_from))
            progress(together)
    joined = [[torch.cat(at_time) for at_time in zip(*kind, strict=True)] for kind in zip(*parts, strict=True)]
    weighed = torch.tensor([min(references, count) for count, _ in classes])
    return VarianceCurve.of(times, _rounded_mean(weighed), zip(*joined, strict=True))


def _streamed_errors(
    path: Interpolant,
    blocks: Callable[[], Iterator[Tensor]],
    count: int,
    times: Tensor,
    references: int,
    rows: int,
    generator: torch.Generator,
    references_from: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Squared errors of CFM and of StableVM, and effective sample sizes: each a list over times of (rows,)."""
    anchors = torch.randint(count, (rows,), generator=generator)
    subset = torch.randperm(count, generator=generator)[: references - 1]
    x0, few = (_pick(blocks(), rows_) for rows_ in (anchors, subset))
    noise = randn((len(times), *x0.shape), generator)
    t = times.repeat_interleave(rows)
    every_x0, every_noise = x0.repeat(len(times), *[1] * (x0.ndim - 1)), noise.flatten(0, 1)
    own = anchors.repeat(len(times))[:, None]

    def with_masks() -> Iterator[tuple[Tensor, Tensor]]:
        start = 0
        for block in blocks():
            yield block, own != torch.arange(start, start + len(block))
            start += len(block)

    exact = posterior_over_blocks(path, every_x0, every_noise, t, with_masks())
    some = posterior(path, every_x0, every_noise, t, few, keep=own != subset)
    errors = _errors(path, t, exact.offset, some, references_from)
    cfm, stablevm, ess = (list(part.split(rows)) for part in errors)
    return cfm, stablevm, ess


def _errors(
    path: Interpolant, t: Tensor, exact: Tensor, few: Posterior, references_from: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared errors per dimension of CFM and StableVM, and the effective sample sizes: (rows,) each.

    Both targets differ from v by the gain times a difference of posterior means. Below `references_from` the target of
    StableVM is that of CFM.
    """
    gain, weighed = align(path.offset_gain(t, t), exact), t >= references_from
    offset, ess = torch.where(align(weighed, exact), few.offset, 0.0), torch.where(weighed, few.ess, 1.0)
    return (gain * exact).square().flatten(1).mean(1), (gain * (offset - exact)).square().flatten(1).mean(1), ess


def _rounded_mean(numbers: Tensor) -> int:
    return round(numbers.double().mean().item())


def _band(values: Tensor) -> tuple[float, float]:
    low, high = torch.quantile(values.double(), torch.tensor(BAND, dtype=torch.float64)).tolist()
    return low, high


def _choose(allowed: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """A mask of `count` random allowed columns in each row, or of all where fewer are allowed."""
    keys = rand(allowed.shape, generator).masked_fill(~allowed, -1.0)
    best = keys.topk(min(count, keys.shape[1]), dim=1).indices
    return torch.zeros_like(allowed).scatter_(1, best, True) & allowed


def _pick(blocks: Iterable[Tensor], rows: Tensor) -> Tensor:
    """The samples at positions `rows` of a data set that is read in blocks: (rows, *shape), float32."""
    found: Tensor | None = None
    start = 0
    for block in blocks:
        if found is None:
            found = torch.empty(len(rows), *block.shape[1:], dtype=torch.float32)
        here = (rows >= start) & (rows < start + len(block))
        found[here] = block[rows[here] - start].float()
        start += len(block)
    assert found is not None
    return found
