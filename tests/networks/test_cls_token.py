"""Networks with a class token (REG): one more token in, one more vector out, and nothing else changes."""

import pytest
import torch
from torch import nn

from stablevm.draw import ObjectiveSettings
from stablevm.networks.joint_state import joined, parted
from stablevm.networks.network_config import NetworkConfig
from stablevm.networks.registry import build_network, network_config
from stablevm.networks.snapshot import ModelCard
from stablevm.sampling.guidance import sample_latents
from stablevm.solvers.settings import SamplerSettings
from stablevm.support.errors import UserError
from stablevm.support.rng import RowGenerators, randn
from tests.helpers.checkpoints import tiny_card

MODELS = ("SiT-XXS/2", "LightningDiT-XXS/2")


def built(model, *, cls_token_dim=6, **options):
    config = network_config(
        model, input_size=8, in_channels=3, num_classes=4, cls_token_dim=cls_token_dim, encoder_depth=1, **options
    )
    network, generator = build_network(config), torch.Generator().manual_seed(1)
    for name, parameter in network.named_parameters():
        if name != "pos_embed":
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return network


def inputs(batch=3, dim=6):
    stream = torch.Generator().manual_seed(2)
    latents, tokens = torch.randn(batch, 3, 8, 8, generator=stream), torch.randn(batch, dim, generator=stream)
    return joined(latents, tokens), torch.rand(batch, generator=stream), torch.arange(batch)


def test_states_are_joined_and_parted():
    latents, vectors = torch.arange(96.0).view(2, 3, 4, 4), -torch.arange(10.0).view(2, 5)
    states = joined(latents, vectors)
    assert states.shape == (2, 53)
    for found, given in zip(parted(states, (3, 4, 4)), (latents, vectors), strict=True):
        assert torch.equal(found, given)


@pytest.mark.parametrize("model", MODELS)
def test_names_are_those_of_published_checkpoints_and_all_else_starts_the_same(model):
    network = built(model)
    plain = built(model, cls_token_dim=0)
    extra = {"cls_projectors2.weight", "cls_projectors2.bias", "wg_norm.weight", "wg_norm.bias"}
    extra |= {"final_layer.linear_cls.weight", "final_layer.linear_cls.bias"}
    assert network.state_dict().keys() - plain.state_dict().keys() == extra
    assert network.pos_embed.shape == (1, 17, 64) and not network.pos_embed[:, 0].any()
    assert torch.equal(network.pos_embed[:, 1:], plain.pos_embed)
    config = network.config
    first = [build_network(each).state_dict() for each in (config, plain.config)]
    assert all(torch.equal(first[0][name], value) for name, value in first[1].items() if name != "pos_embed")
    assert not first[0]["final_layer.linear_cls.weight"].any() and first[0]["cls_projectors2.weight"].any()


@pytest.mark.parametrize("model", MODELS)
def test_image_and_token_see_each_other(model):
    network = built(model, projector_dims=(5,))
    x, t, y = inputs()
    prediction, tokens = network(x, t, y, features=True)
    assert prediction.shape == x.shape and tokens[0].shape == (3, 17, 5)
    image, token = parted(prediction, (3, 8, 8))
    moved = x.clone()
    moved[:, -6:] += 1
    image_after, token_after = parted(network(moved, t, y), (3, 8, 8))
    assert (image_after - image).abs().gt(0).float().mean() > 0.9 and not torch.equal(token, token_after)
    moved = x.clone()
    moved[:, :5] += 1
    assert not torch.equal(parted(network(moved, t, y), (3, 8, 8))[1], token)


def test_a_convolution_reads_the_grid_without_the_token():
    network = built("SiT-XXS/2", projector_dims=(5,), projector_kind="conv")
    _, tokens = network(*inputs(), features=True)
    assert tokens[0].shape == (3, 16, 5)


def test_rotary_attention_does_not_turn_the_token():
    network = built("LightningDiT-XXS/2")
    cosines, sines = network._context(torch.device("cpu"))
    assert len(cosines) == 17 and (cosines[0] == 1).all() and not sines[0].any() and sines[2].any()


@pytest.mark.parametrize("model", MODELS)
def test_one_width_of_float_and_half(model):
    network = built(model)
    x, t, y = inputs()
    expected = network(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(x, t, y)
    assert (found - expected).abs().max() < 0.15 * expected.std()


def test_other_kinds_of_networks_refuse_it():
    class Plain(NetworkConfig):
        kind = "plain"

    with pytest.raises(UserError, match="cls_token: a network of kind plain does not support it"):
        Plain(name="x", input_size=8, in_channels=1, num_classes=2, depth=1, cls_token_dim=4)
    with pytest.raises(UserError, match="cls_token_dim -1, expected 0 to"):
        network_config("SiT-XXS/2", input_size=8, in_channels=1, num_classes=2, cls_token_dim=-1)


class Coupled(nn.Module):
    """A velocity of the image that is the token's mean, and of the token that is minus itself."""

    def forward(self, x, t, y):
        latents, tokens = parted(x, (3, 4, 4))
        return joined(tokens.mean(1)[:, None, None, None].expand_as(latents), -tokens)


def test_the_solver_moves_both_and_the_token_is_dropped():
    """Euler's method by hand, with the noise of both from the image's generator."""
    plain = tiny_card()
    model = network_config("SiT-XXS/2", input_size=4, in_channels=3, num_classes=2, cls_token_dim=6)
    latent = type(plain.latent)((3, 4, 4), 1.0, 0.0, "identity")
    card = ModelCard(model, latent, "linear", "v", ("a", "b"), step=0)
    labels, settings = torch.tensor([0, 1]), SamplerSettings(mode="ode", num_steps=5)
    seen = []
    streams = [RowGenerators.for_keys("x", 0, positions=range(2)) for _ in range(2)]
    found, evaluations = sample_latents(
        Coupled(), card, labels, streams[0], settings, "cpu", lambda *given: seen.append(given)
    )
    x = randn((2, 54), streams[1], "cpu").double()
    for _ in range(5):
        x = x - 0.2 * Coupled()(x.float(), None, None).double()
    torch.testing.assert_close(found, x[:, :48].float().view(2, 3, 4, 4))
    assert evaluations == 5 and {state.shape for state, _, _ in seen} == {(2, 3, 4, 4)}
    assert ObjectiveSettings().prediction == card.prediction
