"""The moving average of the weights, against its formula in float64."""

import copy

import pytest
import torch
from torch import nn

from stablevm.training.weights import MovingAverage


def random_layer(stream):
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=stream))
    return layer


@pytest.fixture
def layers(stream):
    """A network before training, and after each of 40 steps; default initialisation needs the global state."""
    with torch.random.fork_rng():
        return [random_layer(stream) for _ in range(41)]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.8, 0.9999])
def test_follows_the_formula(layers, decay):
    first, *steps = layers
    average = MovingAverage(first, decay)
    expected = first.weight.detach().double()
    for n, layer in enumerate(steps):
        d = min(decay, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * layer.weight.detach().double()
        average.update(layer, n)
        assert torch.allclose(average.model.weight.double(), expected, rtol=1e-5, atol=1e-6), n
        if decay == 0:
            assert torch.equal(average.model.weight, layer.weight)


def test_without_warm_up_the_decay_is_the_same_from_the_first_step_on(layers):
    average = MovingAverage(layers[0], 0.999, warm_up=False)
    average.update(layers[1], 0)
    expected = 0.999 * layers[0].weight.detach().double() + 0.001 * layers[1].weight.detach().double()
    assert torch.allclose(average.model.weight.double(), expected, rtol=1e-6, atol=1e-8)


def test_the_warmup_ends_where_the_decay_is_reached(layers):
    """(1 + n) / (10 + n) = 0.8 at n = 35."""
    average = MovingAverage(nn.ParameterList([torch.zeros(1)]), 0.8)
    shares = []
    for n in range(40):
        average.model[0].data.zero_()
        average.update(nn.ParameterList([torch.ones(1)]), n)
        shares.append(average.model[0].item())
    assert shares[0] == pytest.approx(0.9, rel=1e-6) and shares[34] == pytest.approx(1 - 35 / 44, rel=1e-5)
    assert shares[35:] == pytest.approx([0.2] * 5, rel=1e-6)


def test_it_is_another_network_that_does_not_learn(layers):
    model = layers[0].train()
    before = copy.deepcopy(model.state_dict())
    average = MovingAverage(model, 0.5)
    average.update(layers[1], 0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not average.model.training and model.training
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_loaded_weights_are_the_ones_that_follow(layers):
    """A restored run loads into the average's network; the next update starts from there."""
    average = MovingAverage(layers[0], 0.5)
    average.model.load_state_dict(layers[1].state_dict())
    average.update(layers[2], 100)
    assert torch.allclose(average.model.bias, (layers[1].bias + layers[2].bias) / 2)
