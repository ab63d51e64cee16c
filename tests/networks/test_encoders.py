"""Frozen encoders, with a ViT of random weights in a file: no network is used."""

import functools

import huggingface_hub
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from stablevm.networks import encoders
from stablevm.networks.encoders import SHORT_NAMES, TimmEncoder, TimmEncoderSpec, load_encoder
from stablevm.networks.small_net import SmallNet
from stablevm.support.errors import UserError

VIT = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"  # 192 wide, class token, mean and std 0.5
GRID = 4


@pytest.fixture(scope="module")
def state():
    """Random parameters of the ViT at its own size of 14 x 14 tokens, classifier included."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        shapes = timm.create_model(VIT).state_dict()
    return {name: 0.1 * torch.randn(value.shape, generator=generator) for name, value in shapes.items()}


@pytest.fixture(scope="module")
def weights(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "vit.safetensors"
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def encoder(weights):
    return load(weights)


@pytest.fixture(scope="module")
def images():
    return torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def load(weights, name=VIT, **options):
    return load_encoder(name, **{"grid_size": GRID, "weights": weights, "device": "cpu", **options})


# --- tokens ---


def test_tokens_are_timms_without_the_class_token(encoder, weights, images):
    with torch.random.fork_rng(devices=[]):
        overlay = {"file": str(weights), "custom_load": False}
        network = timm.create_model(VIT, pretrained=True, pretrained_cfg_overlay=overlay, img_size=64).eval()
    pixels = F.interpolate(images / 255, size=(64, 64), mode="bicubic")
    with torch.no_grad():
        expected = network.forward_features((pixels - 0.5) / 0.5)
    tokens = encoder(images)
    assert expected.shape == (2, 1 + GRID**2, 192)
    assert (tokens.shape, tokens.dtype) == ((2, GRID**2, 192), torch.float32)
    assert (encoder.dim, encoder.grid_size) == (192, GRID)
    torch.testing.assert_close(tokens, expected[:, 1:], rtol=1e-5, atol=1e-5)


REPA_INPUTS = {  # pixels per side that REPA's `preprocess_raw_image` and encoders have for images of 256 and 512
    "dinov2-vit-b": (224, 448), "dinov2reg-vit-s": (224, 448), "clip-vit-L": (224, None), "jepa-vit-h": (224, None),
    "mae-vit-l": (256, None), "mocov3-vit-b": (256, None), "dinov1-vit-b": (256, None),
}  # fmt: skip


@pytest.mark.parametrize("name", REPA_INPUTS)
def test_images_get_the_published_size(name):
    patch = int(SHORT_NAMES[name].timm_name.split("patch")[1][:2])
    for image_side, expected in zip((256, 512), REPA_INPUTS[name], strict=True):
        assert expected in (None, patch * image_side // 16)  # a network of 16 x 16 tokens for 256 pixels, as SiT-XL/2


@pytest.mark.parametrize(("antialias", "side"), [(False, 64), (False, 90), (True, 90)])
def test_images_are_resized_by_the_published_rule(weights, antialias, side):
    """From the nearest 4 x 4 pixels, as REPA does; antialiasing is an option. An image of the right size stays."""
    encoder = load(weights, antialias=antialias)
    images = torch.randint(256, (1, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    seen = []
    encoder.network.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    encoder(images)
    expected = F.interpolate(images / 255, size=(64, 64), mode="bicubic", antialias=antialias)
    torch.testing.assert_close(seen[0], (expected - 0.5) / 0.5)
    if side == 64:
        torch.testing.assert_close(seen[0], (images / 255 - 0.5) / 0.5)


def test_pixels_are_normalised_by_the_models_own_statistics(weights):
    clip = timm.get_pretrained_cfg(SHORT_NAMES["clip-vit-L"].timm_name)
    network = load(weights).network
    network.pretrained_cfg = clip.to_dict()
    encoder = TimmEncoder(network, torch.float32)
    seen = []
    encoder.network.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    encoder(torch.tensor([255, 0, 51], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 64, 64))
    expected = [(value - mean) / std for value, mean, std in zip((1, 0, 0.2), clip.mean, clip.std, strict=True)]
    torch.testing.assert_close(seen[0].mean((0, 2, 3)), torch.tensor(expected))


def test_tokens_are_row_major(weights):
    encoder = load(weights)
    encoder.network.blocks = nn.Identity()  # each token then sees its own patch alone
    blank = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    dotted = blank.clone()
    dotted[..., 16:32, 32:48] = 255  # row 1, column 2
    changed = (encoder(dotted) != encoder(blank)).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [1 * GRID + 2]


def test_half_precision_is_explicit(encoder, weights, images):
    exact = encoder(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoder(images), exact)
    half = load(weights, dtype=torch.bfloat16)(images)
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().mean() < 0.05 * exact.std()


def test_tokens_before_the_final_norm(encoder, weights, images, monkeypatch):
    monkeypatch.setitem(SHORT_NAMES, "raw", TimmEncoderSpec(VIT, final_norm=False))
    raw = load(weights, "raw")(images)
    norm = encoder.network.norm
    assert not torch.allclose(raw, encoder(images))
    torch.testing.assert_close(norm(raw), encoder(images))


# --- frozen ---


def test_stays_frozen(weights, images):
    encoder = load(weights)
    owner = nn.ModuleList([encoder])
    owner.train()
    assert encoder.train() is encoder
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder.requires_grad_(True)(images).requires_grad


# --- weights files ---


def test_torch_file(encoder, state, images, tmp_path):
    torch.save({"model": state, "epoch": 3}, tmp_path / "vit.pth")
    assert torch.equal(load(tmp_path / "vit.pth")(images), encoder(images))


def test_moco_checkpoint(encoder, state, images, tmp_path):
    both = {f"module.{which}_encoder.{name}": value * (which == "base") for which in ("momentum", "base")
            for name, value in state.items()}  # fmt: skip
    torch.save({"state_dict": both, "arch": "vit"}, tmp_path / "moco.pth.tar")
    assert torch.equal(load(tmp_path / "moco.pth.tar")(images), encoder(images))


def test_small_moco_has_twelve_heads(images, tmp_path):
    """The number of heads shows in no weight: against timm's own network of MoCo v3's shape."""
    generator = torch.Generator().manual_seed(5)
    with torch.random.fork_rng(devices=[]):
        shape = {"img_size": 64, "embed_dim": 384, "depth": 12, "num_classes": 0}
        moco, other = (VisionTransformer(num_heads=heads, **shape).eval() for heads in (12, 6))
    state = {name: 0.1 * torch.randn(value.shape, generator=generator) for name, value in moco.state_dict().items()}
    torch.save({"state_dict": {f"module.base_encoder.{k}": v for k, v in state.items()}}, tmp_path / "moco.pth.tar")
    encoder = load(tmp_path / "moco.pth.tar", "mocov3-vit-s")
    pixels = F.interpolate(images / 255, size=(64, 64), mode="bicubic")
    mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    inputs = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    for network, agrees in ((moco, True), (other, False)):
        network.load_state_dict(state)
        with torch.no_grad():
            expected = network.forward_features(inputs)[:, 1:]
        assert torch.allclose(encoder(images), expected, rtol=1e-3, atol=1e-3) == agrees


def test_misspelt_moco_layers():
    name = "module.base_encoder.blocks.{}"
    assert encoders._moco_name(name.format("13.norm13.weight")) == "blocks.13.norm1.weight"
    assert encoders._moco_name(name.format("14.mlp.fc14.bias")) == "blocks.14.mlp.fc2.bias"
    assert encoders._moco_name(name.format("13.norm1.weight")) == "blocks.13.norm1.weight"


def test_weights_of_another_network(state, tmp_path):
    partial = {name: value for name, value in state.items() if "blocks.11" not in name}
    save_file(partial, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"weights .*part.safetensors: not the weights of vit_tiny"):
        load(tmp_path / "part.safetensors")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("content", [b"", b"hello", bytes(range(256))])
def test_unreadable_file(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"weights .*{name}: not safetensors nor a torch file"):
        load(tmp_path / name)


def test_file_without_names(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(UserError, match=r"list.pth: expected named tensors, found list"):
        load(tmp_path / "list.pth")


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"none.safetensors: no such file"):
        load(tmp_path / "none.safetensors")


def test_download_gives_the_same_as_the_file(encoder, weights, images, monkeypatch):
    overlay = {"file": str(weights), "custom_load": False}
    local = functools.partial(timm.create_model, pretrained_cfg_overlay=overlay)
    monkeypatch.setattr(timm, "create_model", local)  # timm then takes the file for its download
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    torch.testing.assert_close(load(None)(images), encoder(images))


# --- names ---


@pytest.mark.parametrize("name", ["nonsense", "vit_tiny_patch16_224.nonsense"])
def test_unknown_name_lists_the_short_ones(name):
    known = "digits, extractor, masked, dinov2-vit-s.*jepa-vit-h"
    with pytest.raises(UserError, match=f"encoder {name}: expected one of {known}"):
        load(None, name)


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "xcit_nano_12_p8_224"])
def test_networks_without_patch_tokens(name, weights):
    with pytest.raises(UserError, match=f"encoder {name}: not a plain vision transformer"):
        load(weights, name)


def test_offline_download_asks_for_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"vit_tiny.* can't be downloaded .*give a file as weights") as caught:
        load(None)
    assert "\n" not in str(caught.value)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, silent_hub):
    made = timm.create_model

    def untrained(*names, pretrained, **options):
        assert not pretrained, "asks again and again"
        return made(*names, **options)

    monkeypatch.setattr(timm, "create_model", untrained)
    with pytest.raises(UserError, match=r"vit_tiny.*the hub does not answer: .*give a file as weights"):
        load(None)


@pytest.mark.parametrize("name", ["mocov3-vit-s", "mocov3-vit-b", "vit_base_patch16_xp_224"])
def test_weights_that_no_server_has(name):
    with pytest.raises(UserError, match=f"encoder {name}: its weights can't be downloaded"):
        load(None, name)


# Width, patch size, tokens before the patches: from the papers.
PUBLISHED = {
    **{f"dinov2-vit-{s}": (width, 14, 1) for s, width in zip("sblg", (384, 768, 1024, 1536), strict=True)},
    **{f"dinov2reg-vit-{s}": (width, 14, 5) for s, width in zip("sblg", (384, 768, 1024, 1536), strict=True)},
    "dinov1-vit-b": (768, 16, 1),
    "mocov3-vit-s": (384, 16, 1),
    "mocov3-vit-b": (768, 16, 1),
    "mocov3-vit-l": (1024, 16, 1),
    "mae-vit-l": (1024, 16, 1),
    "clip-vit-L": (1024, 14, 1),
    "jepa-vit-h": (1280, 14, 0),
}


def test_short_names_are_what_they_say():
    assert set(SHORT_NAMES) >= set(PUBLISHED)
    for name, facts in PUBLISHED.items():
        spec = SHORT_NAMES[name]
        with torch.device("meta"):
            network = timm.create_model(spec.timm_name)
        assert (network.num_features, network.patch_embed.patch_size[0], network.num_prefix_tokens) == facts
        assert isinstance(network.norm, nn.LayerNorm)
        statistics = (0.481, 0.458, 0.408) if name == "clip-vit-L" else (0.485, 0.456, 0.406)
        assert network.pretrained_cfg["mean"] == pytest.approx(statistics, abs=1e-3)
        assert timm.get_pretrained_cfg(spec.timm_name).has_weights


# --- digits ---


@pytest.fixture
def digits(tmp_path):
    """A SmallNet whose batch statistics matter, and its file."""
    net = SmallNet().eval()
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.fill_(0.3)
    save_file(net.state_dict(), tmp_path / "digits.safetensors")
    return net, tmp_path / "digits.safetensors"


def test_digits_tokens_are_the_patches_of_the_first_channel(digits):
    net, path = digits
    encoder = load(path, "digits")
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens = encoder.train()(images)
    assert (encoder.dim, encoder.grid_size) == (64, 4)
    torch.testing.assert_close(tokens, net.patches(images[:, :1] / 127.5 - 1))
    assert not tokens.requires_grad
    assert load(path, "digits", dtype=torch.bfloat16)(images).dtype == torch.float32


def test_digits_errors(digits, weights):
    _, path = digits
    with pytest.raises(UserError, match="gives 4 x 4 tokens, the model has 8 x 8"):
        load(path, "digits", grid_size=8)
    with pytest.raises(UserError, match=r"give a file \(\.safetensors\) as weights"):
        load(None, "digits")
    with pytest.raises(UserError, match="not the weights of digits"):
        load(weights, "digits")
    with pytest.raises(UserError, match="images have 16 x 16 pixels, this encoder takes 8 x 8"):
        load(path, "digits")(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_the_network_of_an_extractor_is_known_by_its_weights(digits, weights):
    net, path = digits
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(load(path, "extractor")(images), net.patches(images[:, :1] / 127.5 - 1))
    with pytest.raises(UserError, match="not the weights of a network that stablevm extractor trains"):
        load(weights, "extractor")
    with pytest.raises(UserError, match="give a file"):
        load(None, "extractor")


@pytest.mark.parametrize("name", ["vit_small_r26_s32_224", "vit_tiny_r_s16_p8_224", "vit_base_mci_224"])
def test_hybrids_are_refused_before_weights_are_looked_for(name, tmp_path):
    pytest.importorskip("timm")
    for weights in (None, tmp_path / "absent.pth"):
        with pytest.raises(UserError, match=f"encoder {name}: (not a plain|its weights can't)") as error:
            load_encoder(name, grid_size=16, weights=weights, device="cpu")
        assert "\n" not in str(error.value)
