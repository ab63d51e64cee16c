"""StableVM for networks that predict the noise or the data instead of the velocity.

    python examples/noise_and_data.py

All predictions are affine in E[x0 | x_t], so a target can be converted like a prediction, and is still unbiased with a
small variance. Sampling converts the network's prediction back into a velocity.
"""

from itertools import pairwise

import torch
from torch import nn

from stablevm import LINEAR, ClassBank, FeatureStatistics, StableVM, frechet_distance, squared_error

# Where sampling starts. To get a velocity from noise one divides by alpha, which is 0 at t = 1, so that errors near it
# are amplified: starting at 0.99 the distance below is 0.68, at 0.95 it is 0.08. To get one from data one divides by
# sigma, which is 0 only at t = 0, where no step starts.
FIRST_TIME = {"velocity": 1.0, "noise": 0.95, "x0": 1.0}


def ring(count, stream):
    """Points (count, 2) near a circle of radius 2, in eight clusters."""
    angle = torch.randint(8, (count,), generator=stream) * (torch.pi / 4)
    centre = 2 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return centre + 0.15 * torch.randn(count, 2, generator=stream)


def make_network(width=128):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))


def train(kind, points, steps):
    """A network of (x_t, t) that predicts `kind`: velocity, noise or x0."""
    network, stream = make_network(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    objective = StableVM(ClassBank(1, 1024, shape=(2,)))
    for _ in range(steps):
        fresh = points[torch.randint(len(points), (256,), generator=stream)]
        draw = objective.draw(fresh, torch.zeros(256, dtype=torch.int64), stream)
        target = LINEAR.convert(draw.target, draw.x_t, draw.t, "velocity", kind)
        prediction = network(torch.cat([draw.x_t, draw.t[:, None]], dim=1))
        loss = squared_error(prediction, target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


@torch.no_grad()
def sample(network, kind, count, steps=100):
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(1))
    times = torch.linspace(FIRST_TIME[kind], 0, steps + 1)
    for t, t_next in pairwise(times):
        prediction = network(torch.cat([x, t.expand(count, 1)], dim=1))
        x = x + (t_next - t) * LINEAR.convert(prediction, x, t, kind, "velocity")
    return x


def main(steps=1000):
    stream = torch.Generator().manual_seed(0)
    points, unseen = ring(4000, stream), FeatureStatistics.from_features(ring(4000, stream))
    distances = {}
    for kind in ("velocity", "noise", "x0"):
        samples = sample(train(kind, points, steps), kind, 4000)
        distances[kind] = frechet_distance(unseen, FeatureStatistics.from_features(samples))
        print(f"predicts {kind:8}  Frechet distance of the samples {distances[kind]:.4f}")
    print(f"training data      {frechet_distance(unseen, FeatureStatistics.from_features(points)):.4f}")
    return distances


if __name__ == "__main__":
    main()
