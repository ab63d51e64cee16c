"""Pixels to latents and back: the identity, and a tiny diffusers AutoencoderKL."""

import json
import sys

import pytest
import torch
from tiny_vae import save_tiny_vae

from stablevm import autoencoder
from stablevm.autoencoder import LatentSpec, latent_spec_of, load_autoencoder, unit_to_pixels
from stablevm.errors import UserError


@pytest.fixture(scope="session")
def tiny_kl(tmp_path_factory):
    return save_tiny_vae(tmp_path_factory.mktemp("kl"), widths=(8, 16), scaling_factor=0.5, shift_factor=0.25)


def copy_of(folder, target):
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def images(side, count=2):
    return torch.randint(256, (count, 3, side, side), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def test_identity_returns_every_pixel_level():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)
    for channels in (1, 3):
        model = load_autoencoder(LatentSpec((channels, 16, 16), 1.0, 0.0, "identity"))
        mean, deviation = model.encode(levels).chunk(2, dim=1)
        assert mean.shape == (1, channels, 16, 16) and mean.dtype == torch.float32
        assert not deviation.any()
        assert torch.equal(model.decode(mean), levels)


def test_identity_takes_the_first_channel_for_grey_and_undoes_scale_and_shift():
    pixels = images(4)
    latent = LatentSpec((1, 4, 4), scale=2.0, shift=0.5, autoencoder="identity")
    model = load_autoencoder(latent)
    latents = latent.normalize(model.encode(pixels)[:, :1])
    decoded = model.decode(latents)
    assert decoded.dtype == torch.uint8
    assert torch.equal(decoded, pixels[:, :1].expand(-1, 3, -1, -1))


def test_identity_refuses_latents_that_are_no_pixels():
    with pytest.raises(UserError, match=r"4 channels.*mse"):
        load_autoencoder(LatentSpec((4, 32, 32), 0.18215, 0.0, "mse"), name="identity")


def test_kl_moments_and_decoding_are_those_of_diffusers(tiny_kl):
    latent = latent_spec_of(str(tiny_kl), 16)
    assert latent == LatentSpec((4, 8, 8), scale=0.5, shift=0.25, autoencoder=str(tiny_kl))
    model = load_autoencoder(latent)
    pixels = images(16)
    moments = model.encode(pixels)
    posterior = model.model.encode(pixels.float() / 127.5 - 1).latent_dist
    assert moments.shape == (2, 8, 8, 8) and moments.dtype == torch.float32 and not moments.requires_grad
    mean, deviation = moments.chunk(2, dim=1)
    assert torch.equal(mean, posterior.mean)
    torch.testing.assert_close(deviation, (0.5 * posterior.logvar).exp())
    decoded = model.decode((mean - 0.25) * 0.5)
    reference = unit_to_pixels(model.model.decode(mean).sample)
    assert decoded.shape == (2, 3, 16, 16) and decoded.dtype == torch.uint8
    assert (decoded.int() - reference.int()).abs().max() <= 1


def test_kl_is_frozen_and_float32_whatever_the_file_holds(tiny_kl, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copy_of(tiny_kl, tmp_path / "half")
    weights = folder / "diffusion_pytorch_model.safetensors"
    save_file({name: value.half() for name, value in load_file(weights).items()}, weights)
    model = load_autoencoder(latent_spec_of(str(folder), 16)).model
    assert not model.training
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in model.parameters())


def test_old_configuration_without_scale_gets_the_published_one(tiny_kl, tmp_path):
    folder = copy_of(tiny_kl, tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    del config["scaling_factor"], config["shift_factor"]
    (folder / "config.json").write_text(json.dumps(config))
    latent = latent_spec_of(str(folder), 16)
    assert (latent.scale, latent.shift) == (0.18215, 0.0)


def test_short_names_stand_for_the_fine_tuned_decoders(monkeypatch):
    asked = []

    class Asked:
        @classmethod
        def load_config(cls, source):
            asked.append(source)
            raise OSError("offline.\nA second line of advice.")

    monkeypatch.setattr(autoencoder, "_autoencoder_kl", lambda source: Asked)
    for name in ("mse", "ema"):
        with pytest.raises(UserError, match=r"offline\); give") as error:
            latent_spec_of(name, 256)
        assert "\n" not in str(error.value)
    assert asked == ["stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-ema"]


def test_every_failed_load_is_one_clear_line(tiny_kl, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    latent = latent_spec_of(str(tiny_kl), 16)
    cut = copy_of(tiny_kl, tmp_path / "cut") / "diffusion_pytorch_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:1000])
    lacking = copy_of(tiny_kl, tmp_path / "lacking") / "diffusion_pytorch_model.safetensors"
    weights = load_file(lacking)
    del weights["decoder.conv_in.weight"]
    save_file(weights, lacking)
    (tmp_path / "empty").mkdir()
    for folder, cause in (
        (tmp_path / "empty", "config.json"),
        (cut.parent, "can't be loaded"),
        (lacking.parent, "lack 1 tensors, the first decoder.conv_in.weight"),
    ):
        with pytest.raises(UserError, match=cause) as error:
            load_autoencoder(latent, name=str(folder))
        assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_missing_diffusers_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"pip install 'stablevm\[vae\]'"):
        latent_spec_of("mse", 256)


def test_mismatch_names_both_sides(tiny_kl):
    with pytest.raises(UserError, match=r"\(4, 0.5, 0.25\).*\(4, 0.18215, 0.0\).*mse"):
        load_autoencoder(LatentSpec((4, 8, 8), 0.18215, 0.0, "mse"), name=str(tiny_kl))


def test_resolution_must_suit_the_autoencoder(tiny_kl):
    with pytest.raises(UserError, match=r"--resolution 17.*multiple of 2"):
        latent_spec_of(str(tiny_kl), 17)
    assert latent_spec_of("identity", 8).shape == (3, 8, 8)


def test_loading_leaves_the_global_generator_alone(tiny_kl):
    before = torch.get_rng_state()
    load_autoencoder(latent_spec_of(str(tiny_kl), 16))
    assert torch.equal(before, torch.get_rng_state())
