"""Each class of diffusers' autoencoders: a tiny one with random weights, saved, read, and compared with diffusers."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from stablevm.data.opening import open_dataset
from stablevm.networks.autoencoder import LatentSpec, downsampling, latent_spec_of, load_autoencoder, unit_to_pixels
from stablevm.networks.diffusers_autoencoders import FORMS
from stablevm.preparation.config import ConvertShardsConfig, EncodeShardsConfig
from stablevm.preparation.shards import convert, encode
from stablevm.sampling.provenance import decoding_notes
from stablevm.support.cards import card_of
from stablevm.support.errors import UserError

diffusers = pytest.importorskip("diffusers")
MEANS, DEVIATIONS = [0.5, -1.0, 0.0, 2.0], [0.5, 2.0, 1.0, 4.0]


def kl():
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=2,
    )  # fmt: skip


def dc():
    return diffusers.AutoencoderDC(
        latent_channels=4, encoder_block_out_channels=(4,) * 6, decoder_block_out_channels=(4,) * 6,
        encoder_layers_per_block=(1,) * 6, decoder_layers_per_block=(1,) * 6, encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6, scaling_factor=0.5,
    )  # fmt: skip


def rae(kind="dinov2"):
    pytest.importorskip("transformers")
    return diffusers.AutoencoderRAE(
        encoder_type=kind, encoder_hidden_size=64, encoder_patch_size=14, encoder_num_hidden_layers=1,
        encoder_input_size=28, patch_size=16, decoder_hidden_size=32, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=32, latents_mean=torch.full((64, 2, 2), 0.25),
        latents_std=torch.full((64, 2, 2), 2.0),
    )  # fmt: skip


def qwen():
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], latents_mean=MEANS,
        latents_std=DEVIATIONS,
    )  # fmt: skip


def flux2():
    model = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=2, sample_size=16,
    )  # fmt: skip
    model.bn.running_mean.copy_(torch.arange(16) / 8)
    model.bn.running_var.copy_(torch.arange(1, 17) / 4)
    return model


# What makes one; pixels per latent pixel; the latents of images of 32 pixels; scale and shift of the first channels.
KINDS = {
    "AutoencoderKL": (kl, 2, (4, 16, 16), 0.18215, 0.0),
    "AutoencoderDC": (dc, 32, (4, 1, 1), 0.5, 0.0),
    "AutoencoderRAE": (rae, 16, (64, 2, 2), 1.0, 0.0),
    "AutoencoderKLQwenImage": (qwen, 2, (4, 16, 16), (2.0, 0.5, 1.0, 0.25), tuple(MEANS)),
    "AutoencoderKLFlux2": (flux2, 4, (16, 8, 8), (0.25 + 1e-4) ** -0.5, 0.0),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders by the name of the class, written when they are first needed."""
    folders = {}

    def save(name):
        if name not in folders:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = KINDS[name][0]()
            folders[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(folders[name])
        return folders[name]

    return save


def images(side=32, count=2):
    return torch.randint(256, (count, 3, side, side), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def unit(pixels):
    return pixels.float() / 127.5 - 1


# What diffusers itself gives: the raw moments of images, and the images of raw latents.
DIRECT = {
    "AutoencoderKL": (
        lambda m, x: m.encode(unit(x)).latent_dist.parameters,
        lambda m, z: m.decode(z).sample,
    ),
    "AutoencoderDC": (lambda m, x: m.encode(unit(x)).latent, lambda m, z: m.decode(z).sample),
    "AutoencoderRAE": (lambda m, x: m.encode(x.float() / 255).latent, lambda m, z: m.decode(z).sample * 2 - 1),
    "AutoencoderKLQwenImage": (
        lambda m, x: m.encode(unit(x).unsqueeze(2)).latent_dist.parameters.squeeze(2),
        lambda m, z: m.decode(z.unsqueeze(2)).sample.squeeze(2),
    ),
    "AutoencoderKLFlux2": (
        lambda m, x: torch.cat([patches(part) for part in m.encode(unit(x)).latent_dist.parameters.chunk(2, 1)], 1),
        lambda m, z: m.decode(whole(z)).sample,
    ),
}  # fmt: skip


def patches(z):
    """Patches of 2 x 2 as channels, in the order of Flux 2's pipeline: channel, row, column."""
    rows, channels, height, width = z.shape
    cells = z.view(rows, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return cells.reshape(rows, 4 * channels, height // 2, width // 2)


def whole(z):
    rows, channels, height, width = z.shape
    cells = z.view(rows, channels // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
    return cells.reshape(rows, channels // 4, 2 * height, 2 * width)


def test_every_class_is_tested():
    assert KINDS.keys() == DIRECT.keys() == FORMS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_shapes_scale_and_record(name, saved):
    _, factor, shape, scale, shift = KINDS[name]
    latent = latent_spec_of(str(saved(name)), 32)
    assert (downsampling(str(saved(name))), latent.shape) == (factor, shape)
    first = [each[0] if isinstance(each, tuple) and name.endswith("Flux2") else each for each in
             (latent.scale, latent.shift)]  # fmt: skip
    assert first == [pytest.approx(scale), pytest.approx(shift)]
    assert latent.deterministic == (name in ("AutoencoderDC", "AutoencoderRAE"))
    assert card_of(LatentSpec, json.loads(json.dumps(latent.to_dict())), "again") == latent
    raw = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(latent.denormalize(latent.normalize(raw)), raw, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_moments_and_images_are_those_of_diffusers(name, saved):
    latent = latent_spec_of(str(saved(name)), 32)
    coder = load_autoencoder(latent)
    encode_directly, decode_directly = DIRECT[name]
    found = coder.encode(images())
    with torch.no_grad():
        expected = encode_directly(coder.model, images())
    assert found.shape == (2, *latent.moments_shape) and found.dtype == torch.float32
    mean, deviation = latent.split(found)
    torch.testing.assert_close(mean, expected[:, : latent.shape[0]])
    if not latent.deterministic:
        torch.testing.assert_close(deviation, (0.5 * expected[:, latent.shape[0] :].clamp(-30, 20)).exp())
    with torch.no_grad():
        straight = unit_to_pixels(decode_directly(coder.model, mean))
    decoded = coder.decode(latent.normalize(mean))
    assert decoded.shape == (2, 3, 32, 32) and decoded.dtype == torch.uint8
    assert (decoded.int() - straight.int()).abs().max() <= 1
    assert decoded.float().std() > 0, "the images are not all of one colour"


@pytest.mark.parametrize("kind", ["dinov2", "mae"])
def test_encoders_of_rae(kind, tmp_path):
    """SigLIP 2 can't be built by diffusers 0.42 with transformers 5."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rae(kind).save_pretrained(tmp_path)
    coder = load_autoencoder(latent_spec_of(str(tmp_path), 32))
    assert coder.encode(images()).shape == (2, 64, 2, 2) and coder.decode(torch.zeros(1, 64, 2, 2)).shape[-1] == 32


def test_rae_takes_images_of_one_size(saved):
    with pytest.raises(UserError, match=r"resolution 64: autoencoder .* takes images of 32 pixels"):
        latent_spec_of(str(saved("AutoencoderRAE")), 64)
    larger = replace(latent_spec_of(str(saved("AutoencoderRAE")), 32), shape=(64, 4, 4))
    with pytest.raises(UserError, match="decodes latents with a side of 2, but these have 4"):
        load_autoencoder(larger)


def test_dc_takes_multiples_of_32(saved):
    with pytest.raises(UserError, match=r"resolution 48: .* needs a multiple of 32"):
        latent_spec_of(str(saved("AutoencoderDC")), 48)
    assert latent_spec_of(str(saved("AutoencoderDC")), 96).shape == (4, 3, 3)


def test_latents_with_statistics_of_the_data_are_decoded_by_these(saved):
    folder = str(saved("AutoencoderKL"))
    measured = replace(latent_spec_of(folder, 32), scale=(2.0,) * 4, shift=(0.5,) * 4, measured=True)
    with pytest.raises(UserError, match=r"\(channels, scale, shift\)"):
        load_autoencoder(replace(measured, measured=False))
    raw = load_autoencoder(latent_spec_of(folder, 32)).encode(images())[:, :4]
    plain = load_autoencoder(latent_spec_of(folder, 32)).decode(raw * 0.18215)
    assert torch.equal(load_autoencoder(measured).decode((raw - 0.5) * 2), plain)


def test_a_note_where_statistics_of_the_data_hide_another_autoencoder(saved):
    """Measured scales fit any autoencoder of as many channels, and a name does not say what a folder holds."""
    folder = str(saved("AutoencoderKL"))
    latent = latent_spec_of(folder, 32)
    named = replace(latent, autoencoder="owner/name", fingerprint=None)
    assert decoding_notes(folder, latent) == decoding_notes(folder, replace(latent, measured=True)) == []
    assert decoding_notes(folder, named) == [], "the scales are compared on loading"
    (note,) = decoding_notes(folder, replace(named, measured=True))
    assert note.startswith(f"--vae {folder} can't be compared with the data's autoencoder, owner/name")
    assert decoding_notes("owner/name", replace(named, measured=True)) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"_class_name": "AutoencoderTiny"}, '"AutoencoderTiny" of diffusers, expected one of AutoencoderKL, '),
        ({"_class_name": 3}, "3 of diffusers, expected one of"),
        ({"latents_mean": [0.0] * 3}, "have 3 and 4 numbers, expected 4 each"),
    ],
    ids=str,
)
def test_configurations_that_are_refused(change, told, saved, tmp_path):
    for file in saved("AutoencoderKLQwenImage").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(UserError, match=told) as error:
        latent_spec_of(str(tmp_path), 32)
    assert "\n" not in str(error.value)


def test_a_class_that_diffusers_does_not_have_yet(saved, monkeypatch):
    monkeypatch.delattr(diffusers, "AutoencoderDC")
    monkeypatch.setattr(diffusers, "__getattr__", lambda name: None, raising=False)
    with pytest.raises(UserError, match="has no AutoencoderDC; install a newer one"):
        latent_spec_of(str(saved("AutoencoderDC")), 32)


def test_prepared_latents_of_a_deterministic_encoder_have_no_second_half(saved, tmp_path):
    """As the latents have no noise, every draw of a sample's latent is the same."""
    from PIL import Image

    for number, picture in enumerate(images(count=4)):
        (tmp_path / "source" / f"c{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"source/c{number % 2}/{number}.png")
    shards = ConvertShardsConfig(tmp_path / "source", tmp_path / "data", resolution="32x32", num_workers=0)
    assert convert(shards) == 0
    assert encode(EncodeShardsConfig(tmp_path / "data", str(saved("AutoencoderDC")), num_workers=0, flip=True)) == 0
    dataset = open_dataset(tmp_path / "data")
    moments = dataset.moments(range(4))
    assert dataset.latent.deterministic and moments.shape == dataset.moments_flip(range(4)).shape == (4, 4, 1, 1)
    drawn = [dataset.latent.from_moments(moments, torch.full((4, 4, 1, 1), noise)) for noise in (0.0, 9.0)]
    assert torch.equal(*drawn) and torch.equal(drawn[0], moments.float() * 0.5)


def test_pixel_shuffling_has_the_order_of_flux():
    z = torch.randn(1, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(F.pixel_unshuffle(z, 2), patches(z)) and torch.equal(whole(patches(z)), z)
