"""LightningDiT against an independent derivation, its names, sizes, features and first values."""

import re

import pytest
import torch

from stablevm.networks.lightning_dit import LightningDiT, rotary_angles, rotated
from stablevm.networks.lightning_dit_config import MODEL_NAMES, LightningDiTConfig, lightning_dit_config
from stablevm.networks.registry import build_network, network_config
from stablevm.networks.sit_config import sit_config
from stablevm.support.errors import UserError
from tests.helpers import published as sit
from tests.helpers import published_lightning_dit as pub


def tiny(**options):
    values = {"input_size": pub.SIDE, "in_channels": pub.CHANNELS, "num_classes": pub.CLASSES, "time_scale": 1.0}
    return lightning_dit_config(options.pop("name", "LightningDiT-XXS/1"), **{**values, **options})


def pair(dtype=torch.float64, **options):
    """Our network and the independent one, with the same random weights, gains of the normalisations too."""
    names = {"qk_norm": options.get("qk_norm", False), "patch": options.get("patch", 1)}
    other = sit.built(pub.PublishedLightningDiT, tables=False, **names).to(dtype)
    config = tiny(
        name=f"LightningDiT-XXS/{names['patch']}",
        qk_norm=names["qk_norm"],
        fused_attn=options.get("fused_attn", True),
        **options.get("more", {}),
    )
    model = LightningDiT(config).to(dtype)
    model.load_state_dict({**model.state_dict(), **other.state_dict()})
    return model, other


def inputs(dtype=torch.float64):
    stream = torch.Generator().manual_seed(3)
    x = torch.randn(4, pub.CHANNELS, pub.SIDE, pub.SIDE, generator=stream, dtype=dtype)
    return x, torch.rand(4, generator=stream).to(dtype), torch.tensor([0, 2, 4, pub.CLASSES])


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"fused_attn": False}, {"patch": 2}], ids=str)
def test_matches_an_independent_derivation(options):
    """Waves of the time, rotations and normalisations are float32 in ours."""
    model, other = pair(**options)
    found, expected = model(*inputs()), other(*inputs())
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_names_are_those_of_published_checkpoints():
    for options in ({}, {"qk_norm": True}):
        model, other = pair(**options)
        assert list(model.state_dict()) == list(model.state_dict() | other.state_dict())
        assert model.state_dict().keys() == other.state_dict().keys()


# Parameters counted by hand from the widths: (4 + 6) h^2 in attention and adaLN, 3 * 8/3 h^2 in SwiGLU, for each block.
@pytest.mark.parametrize(("name", "millions"), [("B/1", 131), ("L/1", 459), ("XL/1", 676)])
def test_parameter_counts(name, millions):
    with torch.device("meta"):
        config = lightning_dit_config(f"LightningDiT-{name}", input_size=16, in_channels=32, num_classes=1000)
        model = LightningDiT(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, abs=1e6)


def test_sizes_are_listed_and_others_refused():
    assert {f"LightningDiT-{size}/{patch}" for size in ("B", "L", "XL") for patch in (1, 2)} <= set(MODEL_NAMES)
    config = network_config("LightningDiT-B/2", input_size=16, in_channels=32, num_classes=10)
    assert (config.kind, config.depth, config.hidden_size, config.grid_size) == ("lightning_dit", 12, 768, 8)
    with pytest.raises(UserError, match=r"LightningDiT-B/4: expected one of .*SiT-XL/1.*LightningDiT-XL/1"):
        network_config("LightningDiT-B/4", input_size=16, in_channels=32, num_classes=10)
    with pytest.raises(UserError, match="a patch of 2 does not divide the latent of 5 x 5"):
        network_config("LightningDiT-B/2", input_size=5, in_channels=32, num_classes=10)
    with pytest.raises(UserError, match="heads whose width is a multiple of 4"):
        LightningDiTConfig(name="x", input_size=4, in_channels=1, num_classes=2, depth=1, hidden_size=12, num_heads=2,
                           patch_size=1)  # fmt: skip


@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
def test_sit_has_patches_of_one_latent_pixel(size):
    config = sit_config(f"SiT-{size}/1", input_size=16, in_channels=32, num_classes=10)
    assert config.grid_size == 16 and config.patch_size == 1


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_features_are_read_after_the_encoder_depth(kind):
    more = {"projector_dims": (12, 7), "projector_kind": kind, "encoder_depth": 1}
    model, other = pair(torch.float32, more=more)
    prediction, features = model(*inputs(torch.float32), features=True)
    torch.testing.assert_close(prediction, other(*inputs(torch.float32)), rtol=1e-4, atol=1e-4)
    for projector, tokens in zip(model.projectors, features, strict=True):
        torch.testing.assert_close(tokens, projector(other.seen[0]), rtol=1e-4, atol=1e-4)


def test_starts_at_zero_output_with_unit_gains():
    model = build_network(tiny(qk_norm=True))
    assert torch.equal(model(*inputs(torch.float32)), torch.zeros(4, pub.CHANNELS, pub.SIDE, pub.SIDE))
    gains = {name: value for name, value in model.named_parameters() if re.search(r"norm\w*\.weight$", name)}
    assert len(gains) == 4 * pub.DEPTH + 1 and all(bool((gain == 1).all()) for gain in gains.values())
    again = build_network(tiny(qk_norm=True), torch.Generator().manual_seed(0)).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_products_of_rotated_vectors_depend_on_the_difference_of_positions():
    stream = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 8, generator=stream)
    angles = rotary_angles(4, 8, torch.device("cpu"))
    q, k = (rotated(each.expand(16, 8), angles.cos(), angles.sin()).view(4, 4, 8) for each in (q, k))
    torch.testing.assert_close(q[0, 1] @ k[1, 3], q[2, 0] @ k[3, 2])
    assert not torch.isclose(q[0, 1] @ k[1, 3], q[0, 1] @ k[3, 1]), "rows and columns are told apart"
    torch.testing.assert_close(q.norm(dim=-1), q[0, 0].norm().expand(4, 4))


def test_half_precision_changes_little():
    model, _ = pair(torch.float32, qk_norm=True)
    expected = model(*inputs(torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(*inputs(torch.float32))
    assert (found - expected).abs().max() < 0.1 * expected.std()
