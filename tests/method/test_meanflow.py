"""MeanFlow: the exact mean velocity is its fixed point with either velocity, and StableVM's makes it less noisy."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from stablevm.bank import ClassBank
from stablevm.draw import ObjectiveSettings
from stablevm.interpolant import LINEAR
from stablevm.meanflow import ERROR_FLOOR, MeanFlow
from stablevm.networks.registry import build_network, network_config
from stablevm.objective import FlowMatching, StableVM
from stablevm.solvers.integration import integrate
from stablevm.solvers.settings import SamplerSettings
from stablevm.support.errors import UserError
from stablevm.toy.mixture import GaussianMixture

SETTINGS = ObjectiveSettings(instant_share=0.25, label_dropout=0.3, null_class=2)
QUADRATURE_STEPS = 24


class Wavy(nn.Module):
    """A small smooth function of x, t, r and the label, in float64."""

    def __init__(self, size):
        super().__init__()
        stream = torch.Generator().manual_seed(3)
        self.first = nn.Parameter(torch.randn(size + 2, 16, generator=stream, dtype=torch.float64))
        self.last = nn.Parameter(torch.randn(16, size, generator=stream, dtype=torch.float64) / 4)
        self.labels = nn.Parameter(torch.randn(3, 16, generator=stream, dtype=torch.float64))

    def forward(self, x, t, labels, *, r):
        inputs = torch.cat([x.double().flatten(1), t[:, None].double(), r[:, None].double()], dim=1)
        return (torch.tanh(inputs @ self.first + self.labels[labels]) @ self.last).view(x.shape)


def drawn(settings=SETTINGS, rows=24):
    stream = torch.Generator().manual_seed(5)
    latents, labels = torch.randn(rows, 1, 2, 2, generator=stream), torch.arange(rows) % 2
    return FlowMatching(settings).draw(latents, labels, stream)


def derived(network, draw, omega=1.0, kappa=0.0):
    """The target by central differences along (v, 1, 0), in float64, written from the paper."""
    v, t, r = draw.target.double(), draw.t.double(), draw.r.double()
    if (omega, kappa) != (1.0, 0.0):
        without = network(draw.x_t, t, torch.full_like(draw.labels, 2), r=t)
        guided = omega * v + kappa * network(draw.x_t, t, draw.labels, r=t) + (1 - omega - kappa) * without
        v = torch.where((draw.labels != 2).view(-1, 1, 1, 1), guided, v)
    h, x = 1e-5, draw.x_t.double()
    ahead, behind = (network(x + s * v, t + s, draw.labels, r=r) for s in (h, -h))
    return v - (t - r).view(-1, 1, 1, 1) * (ahead - behind) / (2 * h)


@pytest.mark.parametrize(("omega", "kappa"), [(1.0, 0.0), (2.0, 0.0), (0.6, 0.7)])
def test_targets_agree_with_differences(omega, kappa):
    network, draw = Wavy(4), drawn()
    assert 0 < (draw.r < draw.t).sum() < len(draw.t) and (draw.labels == 2).any()
    target = MeanFlow(omega=omega, kappa=kappa, null_class=2).target(network, draw)
    assert target.dtype == torch.float32 and not target.requires_grad
    torch.testing.assert_close(target.double(), derived(network, draw, omega, kappa), rtol=1e-5, atol=1e-5)


def test_guidance_stays_in_its_interval():
    network, draw = Wavy(4), drawn()
    plain = MeanFlow().target(network, draw)
    guided = MeanFlow(omega=3.0, null_class=2, guidance_low=0.5).target(network, draw)
    changed = (plain != guided).flatten(1).any(1)
    assert torch.equal(changed, (draw.t >= 0.5) & (draw.labels != 2)) and changed.any()


def test_single_times_are_flow_matching():
    draw = drawn()
    target, instant = MeanFlow().target(Wavy(4), draw), draw.r == draw.t
    assert torch.equal(target[instant], draw.target[instant]) and not torch.equal(target, draw.target)
    alone = drawn(replace(SETTINGS, instant_share=0.999999))
    assert torch.equal(MeanFlow().target(Wavy(4), alone), alone.target)


def test_starts_come_before_and_shares_are_as_asked():
    """Of 20,000 intervals, seed 5, |z| < 4."""
    draw = drawn(rows=20_000)
    assert (draw.r <= draw.t).all() and torch.equal(draw.host_r, draw.r)
    share = (draw.r == draw.t).double().mean()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 20_000) ** 0.5
    # The later of two uniform times has mean 2/3 and variance 1/18.
    assert abs(draw.t.double().mean() - 2 / 3) < 4 * (1 / 18 / 20_000) ** 0.5


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_weights_are_constants(power):
    stream = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 4, generator=stream).requires_grad_(), torch.randn(2, 3, 4, generator=stream)
    MeanFlow(power=power).loss(prediction, target).sum().backward()
    squared = (prediction.detach() - target).square().sum((1, 2))
    expected = 2 * (prediction.detach() - target) / (squared + ERROR_FLOOR).pow(power)[:, None, None]
    torch.testing.assert_close(prediction.grad, expected)


@pytest.mark.parametrize("name", ["SiT-XXS/2", "LightningDiT-XXS/2"])
@pytest.mark.parametrize("autocast", [False, True])
def test_networks_have_the_derivative_whatever_autocast_says(name, autocast):
    config = network_config(name, input_size=4, in_channels=1, num_classes=2, intervals=True)
    network = build_network(config)
    with torch.no_grad():
        stream = torch.Generator().manual_seed(1)
        for parameter in network.parameters():  # the output layer and the modulations begin at zero
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=stream))
    settings, draw = SETTINGS, drawn_for(network)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        target = MeanFlow().target(network, draw)
    assert settings.instant_share < 1
    wide = network.double()
    with torch.no_grad():
        expected = derived(lambda x, t, labels, r: wide(x.double(), t.double(), labels, r=r.double()), draw)
    # The embedding of times is float32 in any network, so differences over 2e-5 have few digits.
    torch.testing.assert_close(target.double(), expected, rtol=0.05, atol=0.05)


def drawn_for(network):
    stream = torch.Generator().manual_seed(7)
    latents = torch.randn(6, 1, 4, 4, generator=stream)
    return FlowMatching(SETTINGS).draw(latents, torch.arange(6) % 2, stream)


def test_an_instant_of_a_network_is_its_velocity():
    network = build_network(network_config("SiT-XXS/2", input_size=4, in_channels=1, num_classes=2, intervals=True))
    with torch.no_grad():
        network.final_layer.linear.weight.fill_(0.1)
    x, t, y = torch.ones(2, 1, 4, 4), torch.tensor([0.3, 0.9]), torch.tensor([0, 1])
    assert torch.equal(network(x, t, y), network(x, t, y, r=t))
    assert network.config.time_scale == 10, "a scale of 1000 would make the derivative by t explode"


def mixture():
    stream = torch.Generator().manual_seed(9)
    means = torch.randn(4, 2, generator=stream, dtype=torch.float64)
    return GaussianMixture(torch.full((4,), 0.25, dtype=torch.float64), means, torch.full((4, 2), 0.05).double())


def posterior_mean(exact, x, t):
    """`E[x0 | x_t]` at times t (B,), one for each row."""
    spread = (1 - t).square()[:, None, None] * exact.variances + t.square()[:, None, None]
    apart = x[:, None] - (1 - t)[:, None, None] * exact.means
    share = (-0.5 * (apart.square() / spread + spread.log()).sum(-1)).softmax(-1)
    gain = (1 - t)[:, None, None] * exact.variances / spread
    return (share[..., None] * (exact.means + gain * apart)).sum(1)


def exact_mean_velocity(exact):
    """`(x_t - x_r) / (t - r)`, with x_r at the end of the exact flow from x_t, by Runge and Kutta's fourth order."""

    def velocity(x, t):
        return (x - posterior_mean(exact, x, t)) / t[:, None]

    def u(x, t, labels, *, r):
        start, x = x.double(), x.double()
        t, r = t.double(), r.double()
        step = (r - t) / QUADRATURE_STEPS
        h = step[:, None]
        for number in range(QUADRATURE_STEPS):
            now = t + number * step
            one = velocity(x, now)
            two = velocity(x + h / 2 * one, now + step / 2)
            three = velocity(x + h / 2 * two, now + step / 2)
            four = velocity(x + h * three, now + step)
            x = x + h / 6 * (one + 2 * two + 2 * three + four)
        return (start - x) / (t - r)[:, None]

    return u


def intervals(objective, exact, rows, seed):
    """A draw whose intervals are [t / 2, t], which keeps the quadrature away from both ends."""
    stream = torch.Generator().manual_seed(seed)
    draw = objective.draw(exact.sample(rows, stream).float(), torch.zeros(rows, dtype=torch.int64), stream)
    return replace(draw, r=draw.t / 2, host_r=draw.host_t / 2)


@pytest.mark.statistical
def test_the_exact_mean_velocity_is_a_fixed_point_and_stablevm_is_less_noisy():
    """For 20,000 samples, seed 1, and 8 test functions: |z| < 4 for the mean of (u - target) times each."""
    exact, settings, rows = mixture(), ObjectiveSettings(instant_share=0.0), 20_000
    u, spread = exact_mean_velocity(exact), {}
    bank = ClassBank(1, 256, (2,))
    bank.insert(exact.sample(256, torch.Generator().manual_seed(2)).float(), torch.zeros(256, dtype=torch.int64))
    fresh = {"cfm": FlowMatching(settings), "stablevm": StableVM(bank, settings, anchors="batch")}
    for name, objective in fresh.items():
        draw = independent(objective, exact, rows) if name == "stablevm" else intervals(objective, exact, rows, 1)
        error = u(draw.x_t, draw.t, draw.labels, r=draw.r) - MeanFlow().target(u, draw).double()
        x = draw.x_t.double()
        tests = [torch.ones_like(x), x, x.square(), torch.stack([draw.t.double()] * 2, 1)]
        for test in tests:
            for axis in (0, 1):
                found = error[:, axis] * test[:, axis]
                assert abs(found.mean()) < 4 * found.std() / rows**0.5, (name, axis)
        spread[name] = float(error.square().mean())
    assert spread["stablevm"] < 0.5 * spread["cfm"], spread


def independent(objective, exact, rows):
    """Draws of 100 batches, each with a bank of its own, so that their errors are independent."""
    parts = []
    for number in range(rows // 20):
        stream = torch.Generator().manual_seed(1000 + number)
        bank = ClassBank(1, 256, (2,))
        bank.insert(exact.sample(256, stream).float(), torch.zeros(256, dtype=torch.int64))
        mine = StableVM(bank, objective.settings, anchors="batch")
        parts.append(intervals(mine, exact, 20, 5000 + number))
    joined = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("x_t", "t", "labels", "target", "x0", "noise", "ids", "ess", "host_t", "r", "host_r")
    }
    return replace(parts[0], **joined)


def test_exact_mean_velocities_lead_to_the_end_in_any_number_of_steps():
    exact = mixture()
    u = exact_mean_velocity(exact)
    noise = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = []

    def mean_velocity(x, t, r):
        times.append((float(t), float(r)))
        return u(x, t.expand(len(x)), None, r=r.clamp(min=1e-4).expand(len(x)))

    ends = [
        integrate(mean_velocity, noise.clone, LINEAR, SamplerSettings(mode="meanflow", num_steps=steps))
        for steps in (1, 2, 4)
    ]
    assert times[0] == (1.0, 0.0) and times[1:3] == [(1.0, 0.5), (0.5, 0.0)]
    for end in ends[1:]:
        assert (end - ends[0]).abs().median() < 0.01


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"power": -1.0}, "power -1.0: expected 0 or more"),
        ({"kappa": 1.0}, r"kappa 1.0: expected a number in \[0, 1\)"),
        ({"omega": 2.0}, "guidance needs null_class"),
    ],
)
def test_impossible_settings_are_refused(options, told):
    with pytest.raises(UserError, match=told):
        MeanFlow(**options)


def test_draws_without_intervals_and_other_shapes_are_refused():
    with pytest.raises(UserError, match="instant_share below 1"):
        MeanFlow().target(Wavy(4), drawn(ObjectiveSettings()))
    with pytest.raises(UserError, match="expected the same"):
        MeanFlow().loss(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(UserError, match=r"instant_share 1\.5: expected a probability"):
        ObjectiveSettings(instant_share=1.5)
