"""StableVM for vectors as conditions, such as text embeddings: references are samples with the nearest conditions.

    python examples/vector_conditions.py

No two samples have the same condition, so there are no classes for a bank. Instead, the references are the k samples
with the nearest conditions. This is an approximation: the mean of the target becomes that of the neighbourhood, with a
bias that increases with k, while the variance decreases. Here p(x0 | c) is known, so both are measured. k = 1 is flow
matching, without bias. Long training averages out the variance but never the bias, so choose k well below the one with
the smallest sum (4 to 16 here). With more data neighbours are nearer, and k may be larger.
"""

import torch

from stablevm import LINEAR
from stablevm.posterior import posterior

CONDITION, DIMENSION, SPREAD = 3, 8, 0.5
MAP = torch.randn(CONDITION, DIMENSION, generator=torch.Generator().manual_seed(7))


def mean_of(conditions):
    """E[x0 | c], a smooth curved function; x0 is distributed around it by N(0, SPREAD^2) in each dimension."""
    return torch.sin(2 * conditions @ MAP)


def make_data(count, stream):
    """Conditions (n, 3), uniform in a cube, and samples (n, 8)."""
    conditions = torch.rand(count, CONDITION, generator=stream) * 2 - 1
    return conditions, mean_of(conditions) + SPREAD * torch.randn(count, DIMENSION, generator=stream)


def target(x0, condition, noise, t, others, other_conditions, k):
    """The target (B, d) for anchors x0 (B, d): itself and the k - 1 samples with the nearest conditions weighed.

    `others` must not hold the anchors: in training, leave out a row's own index.
    """
    nearest = torch.cdist(condition, other_conditions).topk(k - 1, largest=False).indices
    found = posterior(LINEAR, x0, noise, t, others[nearest])
    return LINEAR.velocity(x0, noise, t) + LINEAR.offset_gain(t, x0) * found.offset


def exact_posterior(x_t, condition, t):
    """Mean (B, d) and deviation of x0 given x_t and c: a Gaussian, as everything here is."""
    alpha, sigma = 1 - t, t
    gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
    centre = mean_of(condition)
    return centre + gain * (x_t - alpha * centre), (SPREAD**2 * (1 - gain * alpha)) ** 0.5


def measure(k, time, samples, points, repeats):
    """Squared bias and variance per dimension of the target at fixed (x_t, c), over anchors and data sets."""
    stream = torch.Generator().manual_seed(0)
    condition, x0 = make_data(points, stream)
    x_t = (1 - time) * x0 + time * torch.randn(x0.shape, generator=stream)
    mean, deviation = exact_posterior(x_t, condition, time)
    velocity, t = (x_t - mean) / time, torch.full((points,), time)
    errors = []
    for _ in range(repeats):
        anchor = mean + deviation * torch.randn(mean.shape, generator=stream)  # one that may have made x_t
        noise, (other_conditions, others) = (x_t - (1 - time) * anchor) / time, make_data(samples, stream)
        errors.append(target(anchor, condition, noise, t, others, other_conditions, k) - velocity)
    errors = torch.stack(errors)
    variance = errors.var(0).mean().item()
    return errors.mean(0).square().mean().item() - variance / repeats, variance


def main(samples=4000, points=100, repeats=40, sizes=(1, 4, 16, 64, 256, 1024), times=(0.3, 0.6, 0.9)):
    results = {(time, k): measure(k, time, samples, points, repeats) for time in times for k in sizes}
    print(f"{samples:,} samples     t     k   bias^2  variance      sum")
    for (time, k), (bias, variance) in results.items():
        print(f"{time:18} {k:5} {bias:8.4f} {variance:9.4f} {bias + variance:8.4f}")
    return results


if __name__ == "__main__":
    main()
