"""`stablevm data statistics`: the mean and deviation of each channel of the latents, measured and recorded."""

import math
import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stablevm.data.dataset import PreparedDataset, check_finite
from stablevm.data.opening import open_dataset
from stablevm.preparation.config import StatisticsConfig
from stablevm.support.bars import progress_bar
from stablevm.support.errors import UserError
from stablevm.support.locks import owned

ROWS_AT_A_TIME = 256


def statistics(config: StatisticsConfig) -> int:
    """Print the statistics and, unless told otherwise, record them with the data; returns the exit status.

    From then on latents are `(raw - mean) / deviation`, channel by channel. Training, encoding and sampling follow.
    """
    config.validate()
    dataset = open_dataset(config.data_dir)
    with owned(dataset.folder):
        means, deviations = measured(dataset, show=sys.stderr.isatty())
        before = dataset.raw_latent
        scale, shift = tuple((1 / deviations).tolist()), tuple(means.tolist())
        latent = replace(before, scale=scale, shift=shift, measured=True)
        for name, values in (("mean", means), ("deviation", deviations)):
            print(f"{name} of each channel: {', '.join(f'{value:.4f}' for value in values.tolist())}")
        if config.record:
            dataset.record(latent)
    done = "recorded" if config.record else "not recorded (--no-record)"
    print(f"{dataset.folder}: {len(dataset):,} latents of {len(means)} channels; {done}")
    if config.record and latent != before:
        print("runs that began earlier can't be resumed on this data, because they normalised latents differently")
    return 0


def measured(dataset: PreparedDataset, *, show: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) float64 of each channel of the raw latents, over all rows, places and, where the
    autoencoder gives a deviation, draws. One pass; UserError for a channel that is constant.
    """
    latent, moments = dataset.raw_latent, _Moments.zero(dataset.raw_latent.shape[0])
    for start in progress_bar(range(0, len(dataset), ROWS_AT_A_TIME), desc="latents", unit="batch", show=show):
        rows = range(start, min(start + ROWS_AT_A_TIME, len(dataset)))
        values = dataset.moments(rows)
        check_finite(dataset, rows, values)
        moments = moments.with_more(*latent.split(values))
    variances = moments.squares / moments.count
    if not bool((variances > 0).all()):
        channel = int((variances <= 0).nonzero()[0])
        raise UserError(f"{dataset.folder}: channel {channel} of its latents is constant, so it has no scale")
    return moments.mean, variances.sqrt()


@dataclass(frozen=True)
class _Moments:
    """Of the values seen so far: their number in each channel, their mean, and the sum of squares about it.

    Parts are joined as by Chan et al. (1983), so that no digits are lost where the mean is large.
    """

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def zero(cls, channels: int) -> "_Moments":
        return cls(0, torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64))

    def with_more(self, means: Tensor, deviations: Tensor | None) -> "_Moments":
        """These moments joined with those of further latents, given by means and deviations (n, C, h, w)."""
        values = means.double()
        count = math.prod(values.shape) // values.shape[1]
        mean = values.mean((0, 2, 3))
        squares = (values - mean.view(-1, 1, 1)).square().sum((0, 2, 3))
        if deviations is not None:
            squares = squares + deviations.double().square().sum((0, 2, 3))
        total, apart = self.count + count, mean - self.mean
        return _Moments(
            total,
            self.mean + apart * (count / total),
            self.squares + squares + apart.square() * (self.count * count / total),
        )
