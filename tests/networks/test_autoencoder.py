"""Pixels to latents and back: the identity, and a tiny diffusers AutoencoderKL."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stablevm.networks import diffusers_autoencoders
from stablevm.networks.autoencoder import (
    LatentSpec,
    fingerprint,
    full_name,
    is_folder,
    latent_spec_of,
    load_autoencoder,
    unit_to_pixels,
)
from stablevm.support.cards import card_of
from stablevm.support.errors import UserError
from tests.helpers.tiny_vae import save_tiny_vae


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


def test_grey_returns_every_level_and_takes_the_lightness_of_colours():
    latent = latent_spec_of("grey", 16)
    assert latent.shape == latent.moments_shape == (1, 16, 16)
    model = load_autoencoder(latent)
    levels = torch.arange(256).to(torch.uint8).view(1, 1, 16, 16).expand(-1, 3, -1, -1)
    assert torch.equal(model.decode(latent.means(model.encode(levels).half())), levels)
    red_green_blue = torch.eye(3).mul(255).to(torch.uint8).view(3, 3, 1, 1)
    assert model.decode(model.encode(red_green_blue))[:, 0].flatten().tolist() == [76, 150, 29]
    with pytest.raises(UserError, match="latents of 4 channels are not grey pixels"):
        load_autoencoder(LatentSpec((4, 32, 32), 0.18215, 0.0, "mse"), name="grey")


def test_identity_refuses_latents_that_are_no_pixels():
    with pytest.raises(UserError, match=r"4 channels.*mse"):
        load_autoencoder(LatentSpec((4, 32, 32), 0.18215, 0.0, "mse"), name="identity")


def test_kl_moments_and_decoding_are_those_of_diffusers(tiny_kl):
    latent = latent_spec_of(str(tiny_kl), 16)
    assert latent == LatentSpec((4, 8, 8), scale=0.5, shift=0.25, autoencoder=str(tiny_kl))
    assert latent.fingerprint == fingerprint(str(tiny_kl)) is not None
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

    monkeypatch.setattr(diffusers_autoencoders, "_class", lambda source, name: Asked)
    monkeypatch.setattr(diffusers_autoencoders, "check_reachable", lambda repository, file: None)
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
        (tmp_path / "nowhere", "no such folder; if it was moved, give it as autoencoder"),
        (lacking.parent, "1 tensors are missing from its weights, the first decoder.conv_in.weight"),
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
    with pytest.raises(UserError, match=r"resolution 17.*multiple of 2"):
        latent_spec_of(str(tiny_kl), 17)
    assert latent_spec_of("identity", 8).shape == (3, 8, 8)


def test_loading_leaves_the_global_generator_alone(tiny_kl):
    before = torch.get_rng_state()
    load_autoencoder(latent_spec_of(str(tiny_kl), 16))
    assert torch.equal(before, torch.get_rng_state())


# Folders are known by their content


def test_a_folder_is_recorded_resolved_and_known_however_it_is_spelled(tiny_kl, tmp_path, monkeypatch):
    folder = copy_of(tiny_kl, tmp_path / "vae")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    spellings = ["vae", "vae/", "./vae", "../" + tmp_path.name + "/vae", str(folder), "link"]
    assert {latent_spec_of(name, 16).autoencoder for name in spellings} == {str(folder.resolve())}
    recorded = latent_spec_of("vae", 16)
    assert all(recorded.is_by(name) for name in [*spellings, str(tiny_kl)])
    monkeypatch.chdir("/")
    assert type(load_autoencoder(recorded)).__name__ == "DiffusersAutoencoder"


def test_a_folder_keeps_its_identity_where_it_moves_and_loses_it_with_its_content(tiny_kl, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copy_of(tiny_kl, tmp_path / "vae")
    recorded = latent_spec_of(str(folder), 16)
    moved = folder.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"vae: no such folder; if it was moved, give it as autoencoder"):
        load_autoencoder(recorded)
    assert recorded.is_by(str(moved)) and recorded == latent_spec_of(str(moved), 16)
    assert load_autoencoder(recorded, name=str(moved)).latent == recorded
    weights = load_file(moved / "diffusion_pytorch_model.safetensors")
    weights["encoder.conv_in.bias"][0] += 1
    save_file(weights, moved / "diffusion_pytorch_model.safetensors")
    moved.rename(folder)
    assert not recorded.is_by(str(folder)) and recorded != latent_spec_of(str(folder), 16)
    with pytest.raises(UserError, match=r"have changed since the data was encoded; give the folder .* as autoencoder"):
        load_autoencoder(recorded)


def test_who_wrote_the_configuration_is_no_difference_and_a_value_is(tiny_kl, tmp_path):
    folder = copy_of(tiny_kl, tmp_path / "vae")
    before, path = fingerprint(str(folder)), folder / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "_diffusers_version": "0.1", "_name_or_path": "x"}))
    assert fingerprint(str(folder)) == before
    path.write_text(json.dumps({**values, "scaling_factor": 0.75}))
    assert fingerprint(str(folder)) != before
    path.write_text("[1]")
    with pytest.raises(UserError, match=r"its config\.json is damaged"):
        fingerprint(str(folder))


def test_what_older_files_record_is_read_as_before(tiny_kl, tmp_path, monkeypatch):
    copy_of(tiny_kl, tmp_path / "vae")
    monkeypatch.chdir(tmp_path)
    old = {"shape": [4, 8, 8], "scale": 0.5, "shift": 0.25, "autoencoder": "vae"}
    spec = card_of(LatentSpec, old, "old")
    assert spec == latent_spec_of("vae", 16) and spec.autoencoder_id == "vae"
    assert load_autoencoder(spec).latent is spec
    monkeypatch.chdir("/")
    with pytest.raises(UserError, match=r"autoencoder vae: no such folder; .* as autoencoder"):
        load_autoencoder(spec)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mse", False), ("identity", False), ("stabilityai/sd-vae-ft-mse", False), ("org/model.v1", False),
        ("vae", True), ("./org/model", True), ("../model", True), ("/org/model", True), ("a/b/c", True), ("vae/", True),
        ("~/vae", True), ("models/typo", True),
    ],
)  # fmt: skip
def test_only_what_a_hub_can_have_is_looked_up_there(name, folder, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_folder(name) == folder
    if folder:
        monkeypatch.setattr(diffusers_autoencoders, "_class", lambda source, name: pytest.fail("asks diffusers"))
        with pytest.raises(UserError, match="no such folder"):
            fingerprint(name)
        assert Path(full_name(name)).is_absolute() and "~" not in full_name(name)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, silent_hub):
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setattr(diffusers.AutoencoderKL, "load_config", lambda *_: pytest.fail("asks again and again"))
    with pytest.raises(UserError, match=r"the hub does not answer: .*refused.*\); give .* as autoencoder") as error:
        latent_spec_of("nobody/nothing", 16)
    assert "\n" not in str(error.value)


# Channel by channel


def test_latents_mean_and_std_of_each_channel_count_as_in_diffusers(tmp_path):
    means, deviations = [0.5, -1.0, 0.0, 2.0], [0.5, 2.0, 1.0, 4.0]
    folder = save_tiny_vae(
        tmp_path / "vae", widths=(8, 16), scaling_factor=0.5, latents_mean=means, latents_std=deviations
    )
    latent = latent_spec_of(str(folder), 16)
    assert (latent.shift, latent.scale) == (tuple(means), (1.0, 0.25, 0.5, 0.125))
    raw = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (means, deviations))
    normalised = (raw - mean) * 0.5 / std  # pipelines of Stable Diffusion XL
    torch.testing.assert_close(latent.normalize(raw), normalised)
    torch.testing.assert_close(latent.denormalize(normalised), raw)
    moments = torch.cat([raw, torch.full_like(raw, 0.1)], dim=1)
    torch.testing.assert_close(latent.means(moments), normalised)
    torch.testing.assert_close(latent.from_moments(moments, torch.ones_like(raw)), (raw + 0.1 - mean) * 0.5 / std)
    again = card_of(LatentSpec, json.loads(json.dumps(latent.to_dict())), "again")
    assert again == latent and hash(again) == hash(latent)
    assert load_autoencoder(again).latent == latent
    with pytest.raises(UserError, match=r"\(channels, scale, shift\)"):
        load_autoencoder(replace(latent, scale=0.5, shift=0.0), name=str(folder))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"latents_mean": [0.0] * 4}, "has latents_mean alone"),
        ({"latents_std": [1.0] * 4}, "has latents_std alone"),
        (
            {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "shift_factor": 0.1},
            "shift_factor beside latents_mean",
        ),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 4}, "have 3 and 4 numbers, expected 4 each"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0, 0.0, 1.0, 1.0]}, "none of latents_std 0"),
    ],
)
def test_a_normalisation_that_is_not_defined_is_refused(options, told, tmp_path):
    folder = save_tiny_vae(tmp_path / "vae", widths=(8, 16), **options)
    with pytest.raises(UserError, match=told) as error:
        latent_spec_of(str(folder), 16)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scale", [(1.0, 1.0), (1.0, 1.0, 0.0), 0.0, float("nan")])
def test_a_scale_that_can_not_be_is_refused(scale):
    with pytest.raises(UserError, match="latent scale"):
        LatentSpec((3, 8, 8), scale, 0.0, "identity")
