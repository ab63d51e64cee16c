"""JiT: its sizes and names, the bottleneck, and the tokens of the label among those of the patches."""

import re

import pytest
import torch
from torch import nn

from stablevm.networks.jit import JiT
from stablevm.networks.jit_config import MODEL_NAMES, jit_config
from stablevm.networks.joint_state import joined, parted
from stablevm.networks.lightning_dit import LightningDiT
from stablevm.networks.lightning_dit_config import lightning_dit_config
from stablevm.networks.transformer import modulate
from stablevm.support.errors import UserError

FACTS = {"input_size": 8, "in_channels": 3, "num_classes": 4}


def random_jit(**options):
    network, generator = JiT(jit_config("JiT-XXS/4", **FACTS, **options)), torch.Generator().manual_seed(1)
    for name, parameter in network.named_parameters():
        if name != "pos_embed":
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return network


def inputs():
    stream = torch.Generator().manual_seed(2)
    return torch.randn(3, 3, 8, 8, generator=stream), torch.rand(3, generator=stream), torch.tensor([0, 3, 4])


# Table 9 of Li and He (2025): 131, 459 and 953 million for patches of 16; 133, 462 and 956 for 32.
@pytest.mark.parametrize(
    ("name", "millions"), [("B/16", 131), ("L/16", 459), ("H/16", 953), ("B/32", 133), ("L/32", 462), ("H/32", 956)]
)
def test_parameter_counts(name, millions):
    side = 16 * int(name[2:])
    with torch.device("meta"):
        network = JiT(jit_config(f"JiT-{name}", input_size=side, in_channels=3, num_classes=1000))
    assert network.config.grid_size == 16
    assert sum(each.numel() for each in network.parameters()) == pytest.approx(millions * 1e6, abs=0.6e6)


def test_names_are_lightning_dits_with_the_published_ones_of_the_additions():
    network, plain = random_jit(), LightningDiT(lightning_dit_config("LightningDiT-XXS/2", **FACTS, qk_norm=True))
    ours, theirs = ({re.sub(r"\d+", "N", name) for name in each.state_dict()} for each in (network, plain))
    assert ours - theirs == {"x_embedder.projN.weight", "x_embedder.projN.bias", "in_context_posemb"}
    assert theirs - ours == {"x_embedder.proj.weight", "x_embedder.proj.bias"}
    assert network.in_context_posemb.requires_grad and network.in_context_posemb.shape == (1, 2, 64)


def test_a_patch_passes_the_bottleneck():
    network = random_jit()
    with torch.no_grad():
        tokens = network.x_embedder(torch.eye(48).view(48, 3, 4, 4).repeat(1, 1, 2, 2)) - network.x_embedder.proj2.bias
    assert tokens.shape == (48, 4, 64) and torch.linalg.matrix_rank(tokens[:, 0]) == network.config.bottleneck == 8
    assert torch.equal(tokens[:, 0], tokens[:, 3])
    x = inputs()[0]
    corner = x[:, :, :4, 4:].flatten(1) @ network.x_embedder.proj1.weight.flatten(1).T
    expected = corner @ network.x_embedder.proj2.weight.flatten(1).T + network.x_embedder.proj2.bias
    torch.testing.assert_close(network.x_embedder(x)[:, 1], expected)


@torch.no_grad()
def test_the_forward_pass_step_by_step():
    network = random_jit(projector_dims=(5,), encoder_depth=2)
    x, t, y = inputs()
    label = network.y_embedder(y)
    condition, tokens = network.t_embedder(t) + label, network.x_embedder(x) + network.pos_embed
    cosines, sines = network._context(x.device)
    tokens = network.blocks[0](tokens, condition, cosines, sines)
    tokens = torch.cat([label[:, None] + network.in_context_posemb, tokens], dim=1)
    still = torch.ones(2, 16), torch.zeros(2, 32)
    cosines, sines = torch.cat([still[0].repeat(1, 2), cosines]), torch.cat([still[1], sines])
    tokens = network.blocks[1](tokens, condition, cosines, sines)[:, 2:]
    shift, scale = network.final_layer.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
    patches = network.final_layer.linear(modulate(network.final_layer.norm_final(tokens), shift, scale))
    prediction, projected = network(x, t, y, features=True)
    torch.testing.assert_close(prediction[:, :, :4, 4:].permute(0, 2, 3, 1).flatten(1), patches[:, 1])
    torch.testing.assert_close(projected[0], network.projectors[0](tokens))


def test_tokens_for_alignment_are_those_of_patches_before_and_after_the_labels_come():
    for depth in (1, 2):
        for kind in ("mlp", "conv"):
            network = random_jit(projector_dims=(5,), encoder_depth=depth, projector_kind=kind)
            assert network(*inputs(), features=True)[1][0].shape == (3, 4, 5)


def test_with_a_class_token():
    network = random_jit(cls_token_dim=6, projector_dims=(5,), encoder_depth=2)
    x, t, y = inputs()
    states = joined(x, torch.ones(3, 6))
    prediction, tokens = network(states, t, y, features=True)
    assert prediction.shape == states.shape and tokens[0].shape == (3, 5, 5)
    changed = network(joined(x, torch.zeros(3, 6)), t, y)
    assert not torch.equal(parted(changed, x.shape[1:])[0], parted(prediction, x.shape[1:])[0])


def test_checkpointed_gradients_are_the_same():
    found = []
    for checkpointed in (False, True):
        network = random_jit()
        if checkpointed:
            network.checkpoint_activations()
        network(*inputs()).square().mean().backward()
        found.append([each.grad for each in network.parameters() if each.requires_grad])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_queries_and_keys_are_always_normalised():
    assert jit_config("JiT-XXS/4", **FACTS).qk_norm and jit_config("JiT-XXS/4", **FACTS, qk_norm=True).qk_norm


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"bottleneck": 0}, "bottleneck 0, expected 1 to"),
        ({"label_tokens": 2000}, "label_tokens 2000, expected 1 to 1,024"),
        ({"labels_from": 3}, "labels_from 3, expected 1 to 2"),
    ],
)
def test_values_that_can_not_be(options, told):
    with pytest.raises(UserError, match=told):
        jit_config("JiT-XXS/4", **FACTS, **options)
    with pytest.raises(UserError, match=rf"model JiT-S/16: expected one of {MODEL_NAMES[0]}"):
        jit_config("JiT-S/16", **FACTS)
