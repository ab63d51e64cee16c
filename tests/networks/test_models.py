"""Networks: SiT against an independent derivation, its names, sizes and first values; the projectors; SmallNet."""

import math
import re

import pytest
import torch
from torch import nn

from stablevm.networks.sit import SiT
from stablevm.networks.sit_config import MODEL_NAMES, SiTConfig, sit_config
from stablevm.networks.small_net import SmallNet
from stablevm.support.errors import UserError

LINEAR = ("weight", "bias")
NAMES = {
    "pos_embed",
    "y_embedder.embedding_table.weight",
    *(f"x_embedder.proj.{p}" for p in LINEAR),
    *(f"t_embedder.mlp.{n}.{p}" for n in (0, 2) for p in LINEAR),
    *(f"blocks.N.{layer}.{p}" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2") for p in LINEAR),
    *(f"blocks.N.adaLN_modulation.1.{p}" for p in LINEAR),
    *(f"final_layer.{layer}.{p}" for layer in ("linear", "adaLN_modulation.1") for p in LINEAR),
}
MLP_NAMES = {f"projectors.N.{n}.{p}" for n in (0, 2, 4) for p in LINEAR}
CONV_NAMES = {f"projectors.N.projection_layer.{p}" for p in LINEAR}
QK_NAMES = {f"blocks.N.attn.{which}_norm.{p}" for which in "qk" for p in LINEAR}


def tiny(**options) -> SiTConfig:
    values = {
        "name": "tiny",
        "input_size": 8,
        "in_channels": 3,
        "patch_size": 2,
        "depth": 3,
        "hidden_size": 32,
        "num_heads": 4,
        "num_classes": 5,
        "mlp_ratio": 3.0,
        "time_scale": 7.0,
        "encoder_depth": 2,
        "projector_hidden": 24,
    }
    return SiTConfig(**{**values, **options})


def random_sit(config: SiTConfig) -> SiT:
    """Every parameter but the positions random, adaLN too, so that no path is hidden by a zero."""
    model, generator = SiT(config), torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


def inputs(config: SiTConfig, batch: int = 4, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(2)
    shape = (batch, config.in_channels, config.input_size, config.input_size)
    x = torch.randn(shape, generator=generator, dtype=dtype)
    t = torch.rand(batch, generator=generator, dtype=dtype)
    return x, t, torch.randint(0, config.num_classes + 1, (batch,), generator=generator)


def patterns(model: nn.Module) -> set[str]:
    return {re.sub(r"^(blocks|projectors)\.\d+\.", r"\1.N.", name) for name in model.state_dict()}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, NAMES),
        ({"qk_norm": True}, NAMES | QK_NAMES),
        ({"projector_dims": (16, 12)}, NAMES | MLP_NAMES),
        ({"projector_dims": (16,), "projector_kind": "conv"}, NAMES | CONV_NAMES),
    ],
)
def test_names_of_published_checkpoints(options, expected):
    assert patterns(SiT(tiny(**options))) == expected


# Parameters without projector, counted from table 1 of SiT (Ma et al., 2024): 33, 130, 458 and 675 million.
@pytest.mark.parametrize(
    ("name", "millions"), [("SiT-S/2", 33), ("SiT-B/2", 130.5), ("SiT-L/2", 458), ("SiT-XL/2", 675)]
)
def test_parameter_counts(name, millions):
    with torch.device("meta"):
        model = SiT(sit_config(name, input_size=32, in_channels=4, num_classes=1000))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, abs=0.5e6)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_size_is_made_on_meta(name):
    with torch.device("meta"):
        model = SiT(
            sit_config(name, input_size=32, in_channels=4, num_classes=10, projector_dims=(16,), encoder_depth=2)
        )
    assert all(tensor.is_meta for tensor in model.state_dict().values())


@pytest.mark.parametrize("name", ["SiT-XXS/1", "SiT-XXS/2", "SiT-XS/2", "SiT-XS/4", "SiT-S/2"])
def test_sizes_run(name):
    config = sit_config(name, input_size=8, in_channels=1, num_classes=10, projector_dims=(6, 5), encoder_depth=2)
    x, t, y = inputs(config, batch=2)
    prediction, tokens = SiT(config)(x, t, y, features=True)
    assert prediction.shape == x.shape
    assert [tuple(z.shape) for z in tokens] == [(2, config.grid_size**2, dim) for dim in (6, 5)]


# --- the network once more, in plain tensor operations ---


def layer_norm(x, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sincos_positions(side, dim):
    """Position (row, column): sines and cosines of the column, then of the row."""
    rows = []
    for row in range(side):
        for column in range(side):
            values = []
            for coordinate in (column, row):
                angles = [coordinate / 10000 ** (k / (dim // 4)) for k in range(dim // 4)]
                values += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            rows.append(values)
    return torch.tensor(rows, dtype=torch.float64)


def attention(x, w, config):
    hidden = config.hidden_size
    width = hidden // config.num_heads
    query, key, value = (x @ w["attn.qkv.weight"].T + w["attn.qkv.bias"]).split(hidden, dim=-1)
    heads = []
    for head in range(config.num_heads):
        q, k, v = (part[..., head * width : (head + 1) * width] for part in (query, key, value))
        if config.qk_norm:
            q = layer_norm(q, 1e-5) * w["attn.q_norm.weight"] + w["attn.q_norm.bias"]
            k = layer_norm(k, 1e-5) * w["attn.k_norm.weight"] + w["attn.k_norm.bias"]
        scores = (q @ k.transpose(1, 2) / math.sqrt(width)).exp()
        heads.append(scores / scores.sum(-1, keepdim=True) @ v)
    return torch.cat(heads, -1) @ w["attn.proj.weight"].T + w["attn.proj.bias"]


def block(x, condition, w, config):
    silu = condition * condition.sigmoid()
    modulation = silu @ w["adaLN_modulation.1.weight"].T + w["adaLN_modulation.1.bias"]
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation[:, None].split(config.hidden_size, dim=-1)
    x = x + gate_a * attention(layer_norm(x, 1e-6) * (1 + scale_a) + shift_a, w, config)
    inner = (layer_norm(x, 1e-6) * (1 + scale_m) + shift_m) @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
    return x + gate_m * (gelu_tanh(inner) @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"])


def derived(model: SiT, x, t, y):
    config, w = model.config, model.state_dict()
    p, side = config.patch_size, config.grid_size
    cells = [(row, column) for row in range(side) for column in range(side)]
    cut = [x[:, :, r * p : (r + 1) * p, c * p : (c + 1) * p].flatten(1) for r, c in cells]
    tokens = torch.stack(cut, 1) @ w["x_embedder.proj.weight"].flatten(1).T + w["x_embedder.proj.bias"]
    tokens = tokens + sincos_positions(side, config.hidden_size)

    waves = [10000 ** (-k / 128) * config.time_scale * t for k in range(128)]
    wave = torch.stack([a.cos() for a in waves] + [a.sin() for a in waves], 1)
    inner = wave @ w["t_embedder.mlp.0.weight"].T + w["t_embedder.mlp.0.bias"]
    condition = (inner * inner.sigmoid()) @ w["t_embedder.mlp.2.weight"].T + w["t_embedder.mlp.2.bias"]
    condition = condition + w["y_embedder.embedding_table.weight"][y]

    for number in range(config.depth):
        prefix = f"blocks.{number}."
        tokens = block(tokens, condition, {k[len(prefix) :]: v for k, v in w.items() if k.startswith(prefix)}, config)

    silu = condition * condition.sigmoid()
    modulation = silu @ w["final_layer.adaLN_modulation.1.weight"].T + w["final_layer.adaLN_modulation.1.bias"]
    shift, scale = modulation[:, None].split(config.hidden_size, dim=-1)
    tokens = layer_norm(tokens, 1e-6) * (1 + scale) + shift
    patches = tokens @ w["final_layer.linear.weight"].T + w["final_layer.linear.bias"]
    image = torch.zeros_like(x)
    for index, (r, c) in enumerate(cells):
        pixels = patches[:, index].reshape(-1, p, p, config.in_channels)
        image[:, :, r * p : (r + 1) * p, c * p : (c + 1) * p] = pixels.permute(0, 3, 1, 2)
    return image


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"fused_attn": False}, {"patch_size": 4, "num_heads": 2}])
def test_matches_an_independent_derivation(options):
    config = tiny(**options)
    model = random_sit(config).double()
    with torch.no_grad():  # the state holds float32 values of the positions; the derivation has them in float64
        model.pos_embed.copy_(sincos_positions(config.grid_size, config.hidden_size))
        x, t, y = inputs(config, dtype=torch.float64)
        t = t.float().double()
        actual, expected = model(x, t, y), derived(model, x, t, y)
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=2e-6)  # the waves of t are float32


def test_position_embedding():
    model = SiT(tiny())
    torch.testing.assert_close(model.pos_embed[0].double(), sincos_positions(4, 32), rtol=0, atol=1e-7)
    assert not model.pos_embed.requires_grad


# --- first values ---


def test_starts_at_zero_output_and_with_small_embeddings():
    config = tiny(hidden_size=64, projector_dims=(16,))
    model = SiT(config)
    assert torch.equal(model(*inputs(config)), torch.zeros(4, 3, 8, 8))
    zero = re.compile(r"adaLN_modulation|final_layer|bias$")
    for name, value in model.state_dict().items():
        assert (value.abs().max() == 0) == bool(zero.search(name)), name
    for name in ("y_embedder.embedding_table", "t_embedder.mlp.0", "t_embedder.mlp.2"):
        weight = model.get_parameter(f"{name}.weight").detach()
        assert weight.std() == pytest.approx(0.02, rel=0.15)
    for name in ("x_embedder.proj", "blocks.1.attn.qkv", "blocks.2.mlp.fc2", "projectors.0.2"):
        matrix = model.get_parameter(f"{name}.weight").detach().flatten(1)
        bound = math.sqrt(6 / sum(matrix.shape))
        assert matrix.abs().max() <= bound
        assert matrix.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize("network", [lambda generator: SiT(tiny(), generator), SmallNet])
def test_first_values_follow_from_the_generator_alone(network):
    before = torch.get_rng_state()
    seeded = [network(torch.Generator().manual_seed(seed)).state_dict() for seed in (0, 0, 1)]
    default = network(None).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    for key, value in seeded[0].items():
        assert torch.equal(value, seeded[1][key])
        assert torch.equal(value, default[key])
    assert any(not torch.equal(value, seeded[2][key]) for key, value in seeded[0].items())


def test_projectors_leave_the_other_first_values_alone():
    plain, aligned = SiT(tiny()).state_dict(), SiT(tiny(projector_dims=(16,))).state_dict()
    assert all(torch.equal(value, aligned[key]) for key, value in plain.items())


# --- labels, time, attention ---


def test_null_class_has_its_own_row():
    config = tiny()
    model = random_sit(config)
    x, t, _ = inputs(config)
    null = torch.full((4,), config.null_class)
    assert model.y_embedder.embedding_table.weight.shape[0] == config.num_classes + 1
    assert not torch.allclose(model(x, t, null), model(x, t, null - 1))


def test_time_is_embedded_in_float32_under_autocast():
    embedder = random_sit(tiny()).t_embedder
    t = torch.tensor([0.5, 0.5005])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = embedder(t)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, embedder(t))


def test_time_scale_multiplies_time():
    config = tiny()
    x, t, y = inputs(config)
    scaled, plain = random_sit(config), random_sit(tiny(time_scale=1.0))
    assert torch.equal(scaled(x, t, y), plain(x, 7 * t, y))
    assert not torch.allclose(scaled(x, t, y), plain(x, t, y))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_fused_attention_agrees_with_unfused(qk_norm):
    config = tiny(qk_norm=qk_norm)
    fused, unfused = random_sit(config), random_sit(tiny(qk_norm=qk_norm, fused_attn=False))
    assert [b.attn.fused_attn for m in (fused, unfused) for b in m.blocks] == [True] * 3 + [False] * 3
    torch.testing.assert_close(fused(*inputs(config)), unfused(*inputs(config)), rtol=1e-5, atol=1e-5)


def test_qk_norm_makes_attention_blind_to_the_scale_of_queries():
    x = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))
    changes = []
    for qk_norm in (False, True):
        attn = random_sit(tiny(qk_norm=qk_norm)).blocks[0].attn
        before = attn(x)
        with torch.no_grad():
            attn.qkv.weight[:32] *= 3
            attn.qkv.bias[:32] *= 3
        changes.append(float((attn(x) - before).detach().abs().max()))
    assert changes[0] > 1e-2
    assert changes[1] < 1e-4


# --- projectors ---


def test_projectors_run_only_when_asked_for():
    def refuse(*_):
        raise AssertionError("projector ran")

    config = tiny(projector_dims=(16,))
    model = SiT(config)
    model.projectors[0].register_forward_hook(refuse)
    model(*inputs(config))
    with pytest.raises(AssertionError, match="projector ran"):
        model(*inputs(config), features=True)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_features_are_read_after_the_encoder_depth(kind):
    config = tiny(projector_dims=(16, 12), projector_kind=kind)
    model = random_sit(config)
    seen = []
    model.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output))
    prediction, features = model(*inputs(config), features=True)
    assert torch.equal(prediction, model(*inputs(config)))
    for projector, tokens in zip(model.projectors, features, strict=True):
        assert torch.equal(tokens, projector(seen[0]))


def test_features_without_projectors_are_an_empty_list():
    config = tiny()
    assert SiT(config)(*inputs(config), features=True)[1] == []


@pytest.mark.parametrize(("kind", "reached"), [("mlp", {6}), ("conv", {1, 2, 3, 5, 6, 7, 9, 10, 11})])
def test_only_the_convolution_sees_neighbours(kind, reached):
    projector = random_sit(tiny(projector_dims=(5,), projector_kind=kind)).projectors[0]
    tokens = torch.zeros(1, 16, 32)
    touched = tokens.clone()
    touched[0, 6] = 1  # row 1, column 2
    changed = (projector(touched) != projector(tokens)).any(-1)[0]
    assert projector(tokens).shape == (1, 16, 5)
    assert set(changed.nonzero().flatten().tolist()) == reached


def test_unknown_projector_kind():
    with pytest.raises(UserError, match="projector_kind linear, expected one of mlp, conv"):
        tiny(projector_dims=(16,), projector_kind="linear")


# --- SmallNet ---


def test_small_net_shapes():
    net = SmallNet()
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert net(images).shape == (3, 10)
    assert net.features(images).shape == (3, 64)
    assert net.patches(images).shape == (3, 16, 64)
    assert torch.equal(net.eval()(images), net.head(net.features(images)))


def test_digits_patches_are_row_major():
    net = SmallNet().eval()
    blank = torch.full((1, 1, 8, 8), -1.0)
    dotted = blank.clone()
    dotted[0, 0, 0, 7] = 1  # top right
    changed = (net.patches(dotted) - net.patches(blank)).abs().sum(-1).view(4, 4)
    assert changed[0, 3] > 0
    assert changed[3].max() == 0
    assert changed[:, 0].max() == 0
