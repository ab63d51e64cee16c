"""StableVM in a plain PyTorch loop, compared with flow matching, on two moons.

    python examples/two_moons.py

It plots two_moons.png: how noise flows into each moon, and the training loss with both kinds of targets. The remaining
loss is mostly the variance of the targets; the optimal network is the same for both.
"""

import torch
from matplotlib.figure import Figure
from sklearn.datasets import make_moons
from torch import nn

from stablevm import ClassBank, FlowMatching, StableVM, squared_error


class Network(nn.Module):
    """Predicts the velocity at (x, t), given the moon."""

    def __init__(self, width=128):
        super().__init__()
        self.moon = nn.Embedding(2, 8)
        self.layers = nn.Sequential(
            nn.Linear(2 + 1 + 8, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, x, t, labels):
        return self.layers(torch.cat([x, t[:, None], self.moon(labels)], dim=1))


def train(objective, points, moons, steps):
    torch.manual_seed(0)  # both networks begin with the same weights, which torch draws from its global state
    network, stream, losses = Network(), torch.Generator().manual_seed(0), []
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(steps):
        rows = torch.randint(len(points), (256,), generator=stream)
        draw = objective.draw(points[rows], moons[rows], stream, ids=rows)
        loss = squared_error(network(draw.x_t, draw.t, draw.labels), draw.target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return network, torch.tensor(losses)


@torch.no_grad()
def flow(network, moons, steps=50):
    """From noise (t = 1) to data (t = 0) by Euler steps of dx/dt = v: states (steps + 1, B, 2)."""
    states = [torch.randn(len(moons), 2, generator=torch.Generator().manual_seed(1))]
    for step in range(steps):
        t = torch.full((len(moons),), 1 - step / steps)
        states.append(states[-1] - network(states[-1], t, moons) / steps)
    return torch.stack(states)


def main(steps=1500, picture="two_moons.png"):
    points, moons = map(torch.tensor, make_moons(4000, noise=0.05, random_state=0))
    _, cfm = train(FlowMatching(), points.float(), moons, steps)
    network, stablevm = train(StableVM(ClassBank(2, 256, shape=(2,))), points.float(), moons, steps)
    figure = Figure((11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    states, moons = flow(network, moons[:400]), moons[:400]
    for moon, colour in enumerate(("#0072B2", "#D55E00")):
        mine = states[:, moons == moon].numpy()
        left.plot(mine[:, :60, 0], mine[:, :60, 1], color=colour, alpha=0.25, linewidth=0.8)
        left.scatter(*mine[-1].T, s=6, color=colour, zorder=2)
    left.set(title="From noise to the moons", xlabel="x", ylabel="y", aspect="equal")
    tenth = steps // 10
    right.plot(cfm.unfold(0, tenth, 1).mean(1), color="#616e7c", label="flow matching")
    right.plot(stablevm.unfold(0, tenth, 1).mean(1), color="#009E73", label="StableVM")
    right.set(title="Training loss (moving average)", xlabel="step", ylabel="squared error per value", ylim=(0, None))
    right.legend()
    figure.savefig(picture, dpi=100)
    print(f"last tenth: CFM {cfm[-tenth:].mean():.3f}, StableVM {stablevm[-tenth:].mean():.3f}; see {picture}")
    return cfm, stablevm


if __name__ == "__main__":
    main()
