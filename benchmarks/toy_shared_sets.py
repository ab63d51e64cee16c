"""One set of references per batch or one per sample: the noise of single targets, and of their mean over a batch.

    python benchmarks/toy_shared_sets.py [--batches 1000]

The mixture is the published one in 10 dimensions. Errors are the squared differences of target and exact velocity, per
dimension.
"""

import math
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

from stablevm.interpolant import LINEAR
from stablevm.posterior import posterior
from stablevm.support import rng
from stablevm.toy.config import ToyConfig
from stablevm.toy.training import mixture_of


@dataclass(frozen=True)
class Options:
    """Compare CFM, STF and StableVM with shared sets, and sets drawn for each sample (where both are the same)."""

    batches: int = 1000
    batch_size: int = 64
    references: int = 256
    times: tuple[float, ...] = (0.2, 0.5, 0.9)
    seed: int = 0


def anchored(options: Options, method: str, stream: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
    """Anchors, their other references and a mask for one batch."""
    mixture, rows, count = mixture_of(ToyConfig(), options.seed), options.batch_size, options.references
    if method == "CFM":
        return mixture.sample(rows, stream), torch.empty(0, mixture.dimension), None
    if method == "a set per sample":
        sets = mixture.sample(rows * count, stream).reshape(rows, count, -1)
        return sets[:, 0], sets[:, 1:], None
    shared = mixture.sample(count, stream)
    chosen = torch.arange(rows) if method == "STF" else torch.randint(count, (rows,), generator=stream)
    return shared[chosen], shared, chosen[:, None] != torch.arange(count)


def noise_of(options: Options, method: str, time: float) -> tuple[float, float, float]:
    """E |error|^2 / d of a target; E |batch mean of errors|^2 / d times the batch size, and its standard error."""
    mixture, single, mean = mixture_of(ToyConfig(), options.seed), [], []
    for batch in range(options.batches):
        stream = rng.generator(options.seed, method, f"{time:.3f}", batch)
        x0, references, keep = anchored(options, method, stream)
        noise, t = torch.randn(x0.shape, generator=stream), torch.full((len(x0),), time)
        offset = posterior(LINEAR, x0, noise, t, references, keep=keep).offset
        target = LINEAR.velocity(x0, noise, t) + LINEAR.offset_gain(t, x0) * offset
        error = target - mixture.field(LINEAR, LINEAR.interpolate(x0, noise, t), time)
        single.append(error.square().mean().item())
        mean.append(error.mean(0).square().mean().item() * len(x0))
    values = torch.tensor(mean, dtype=torch.float64)
    return sum(single) / len(single), values.mean().item(), values.std().item() / math.sqrt(len(mean))


def main(options: Options) -> None:
    print(f"{options.references} references, batch {options.batch_size}, {options.batches} batches\n")
    print("| t | method | one target | batch mean x batch size |\n| --- | --- | --- | --- |")
    for time in options.times:
        for method in ("CFM", "STF", "StableVM", "a set per sample"):
            single, mean, error = noise_of(options, method, time)
            print(f"| {time:g} | {method} | {single:.4f} | {mean:.4f} ± {error:.4f} |")


if __name__ == "__main__":
    main(tyro.cli(Options))
