"""StableVM for unconditional data, which has one class.

    python examples/unconditional.py

There are two ways. A bank with one class provides references from earlier batches too; or the batch itself is the set
of references (Stable Target Field), which needs no bank.
"""

import torch
from sklearn.datasets import make_swiss_roll
from torch import nn

from stablevm import ClassBank, FlowMatching, StableTargetField, StableVM, squared_error


def load_points():
    """A swiss roll seen from the side: points (4000, 2) with a standard deviation near 1."""
    points, _ = make_swiss_roll(4000, noise=0.2, random_state=0)
    return torch.tensor(points[:, [0, 2]]).float() / 7


def drawer(method):
    """A function (points (B, 2), rows (B,), stream) -> Draw; rows tells which points come again."""
    if method == "StableVM":
        objective = StableVM(ClassBank(1, 1024, shape=(2,)))
        return lambda points, rows, stream: objective.draw(points, torch.zeros_like(rows), stream, ids=rows)
    if method == "STF":
        return lambda points, rows, stream: StableTargetField().draw(points, None, stream)
    return lambda points, rows, stream: FlowMatching().draw(points, torch.zeros_like(rows), stream)


def train(method, points, steps):
    """Train, and return the mean loss and effective number of references over the last tenth of the steps."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))
    optimizer, stream = torch.optim.Adam(network.parameters(), lr=2e-3), torch.Generator().manual_seed(0)
    draw_from, measured = drawer(method), []
    for _ in range(steps):
        rows = torch.randint(len(points), (256,), generator=stream)
        draw = draw_from(points[rows], rows, stream)
        velocity = network(torch.cat([draw.x_t, draw.t[:, None]], dim=1))  # no label: there is one class
        loss = squared_error(velocity, draw.target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        measured.append([loss.item(), draw.ess.mean().item()])
    return torch.tensor(measured[-max(1, steps // 10) :]).mean(0).tolist()


def main(steps=600):
    points, results = load_points(), {}
    for method in ("CFM", "STF", "StableVM"):
        loss, references = results[method] = train(method, points, steps)
        print(f"{method:8}  loss {loss:.3f}, a target averages over {references:.0f} samples")
    return results


if __name__ == "__main__":
    main()
