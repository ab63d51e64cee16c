"""Images in one step: MeanFlow on the velocities of flow matching and of StableVM, on two moons.

    python examples/one_step.py

It plots one_step.png: where one step leads noise with both, and the squared errors of training.
"""

from itertools import pairwise

import torch
from matplotlib.figure import Figure
from sklearn.datasets import make_moons
from torch import nn

from stablevm import ClassBank, FlowMatching, MeanFlow, ObjectiveSettings, StableVM

# Half of the intervals are single times, as in flow matching; at the others the network learns mean velocities.
SETTINGS = ObjectiveSettings(weighting="logit_normal", instant_share=0.5)


class Network(nn.Module):
    """Predicts the mean velocity between the times r and t at x, given the moon."""

    def __init__(self, width=128):
        super().__init__()
        self.moon = nn.Embedding(2, 8)
        widths = [2 + 2 + 8, width, width, width, 2]
        parts = [part for pair in pairwise(widths) for part in (nn.Linear(*pair), nn.SiLU())]
        self.layers = nn.Sequential(*parts[:-1])

    def forward(self, x, t, labels, *, r):
        return self.layers(torch.cat([x, t[:, None], (t - r)[:, None], self.moon(labels)], dim=1))


def train(objective, points, moons, steps):
    torch.manual_seed(0)
    network, stream, errors = Network(), torch.Generator().manual_seed(0), []
    # The published power, 1, favours samples of small errors, and StableVM's are tiny near the noise: 0.5 is better.
    meanflow, optimizer = MeanFlow(power=0.5), torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(steps):
        rows = torch.randint(len(points), (256,), generator=stream)
        draw = objective.draw(points[rows], moons[rows], stream, ids=rows)
        target = meanflow.target(network, draw)
        prediction = network(draw.x_t, draw.t, draw.labels, r=draw.r)
        optimizer.zero_grad()
        meanflow.loss(prediction, target).mean().backward()
        optimizer.step()
        errors.append((prediction.detach() - target).square().mean().item())
    return network, torch.tensor(errors)


def one_step(network, moons):
    """Points (B, 2), from noise by one step of the mean velocity between the times 0 and 1."""
    noise = torch.randn(len(moons), 2, generator=torch.Generator().manual_seed(1))
    return (noise - network(noise, torch.ones(len(moons)), moons, r=torch.zeros(len(moons)))).detach()


def main(steps=3000, picture="one_step.png"):
    points, moons = map(torch.tensor, make_moons(4000, noise=0.05, random_state=0))
    stablevm = StableVM(ClassBank(2, 2000, (2,)), SETTINGS, anchors="batch")
    objectives = {"flow matching": FlowMatching(SETTINGS), "StableVM": stablevm}
    found = {name: train(each, points.float(), moons, steps) for name, each in objectives.items()}
    figure, tenth = Figure((13, 4.5), layout="constrained"), steps // 10
    *panels, last = figure.subplots(1, 3)
    for panel, (name, (network, errors)), colour in zip(panels, found.items(), ("#616e7c", "#009E73"), strict=True):
        panel.scatter(*points[:800].T, s=4, color="#c8cdd3", label="data")
        panel.scatter(*one_step(network, moons[:800]).T, s=4, color=colour, label="one step")
        panel.set(title=f"MeanFlow, velocities of {name}", xlabel="x", ylabel="y", xlim=(-1.5, 2.5), ylim=(-1, 1.5))
        panel.legend()
        last.plot(errors.unfold(0, tenth, 1).mean(1), color=colour, label=name)
    last.set(title="Training error (moving average)", xlabel="step", ylabel="squared error per value", ylim=(0, None))
    last.legend()
    figure.savefig(picture, dpi=100)
    return {name: errors for name, (_, errors) in found.items()}


if __name__ == "__main__":
    main()
