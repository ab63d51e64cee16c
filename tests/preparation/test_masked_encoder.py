"""The command `stablevm encoder`: an encoder trained without labels, on a tiny set of images."""

import dataclasses
import json
from types import SimpleNamespace

import psutil
import pytest
import torch

from stablevm.data.digits import prepare_digits
from stablevm.data.opening import open_dataset
from stablevm.networks.encoders import load_encoder
from stablevm.networks.masked_net import MaskedAutoencoder, MaskedNet, masked_net_for
from stablevm.preparation.config import EncoderConfig
from stablevm.preparation.masked_encoder import encoder
from stablevm.support.errors import UserError
from tests.helpers.data_sets import one_line


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    prepare_digits(folder / "data")
    config = EncoderConfig(folder / "data", folder / "encoder", patch_size=2, steps=40)
    state = torch.random.get_rng_state()
    card = encoder(config)
    assert torch.equal(torch.random.get_rng_state(), state)
    return config, card


def test_it_learns_to_predict_masked_patches_and_something_of_classes(trained):
    _, card = trained
    assert card.loss < 0.45  # pixels between -1 and 1 have a variance of 0.57
    assert card.neighbour_accuracy > 0.4  # a tenth by chance


def test_training_loads_it_by_its_name(trained):
    config, _ = trained
    weights = config.output_dir / "encoder.safetensors"
    found = load_encoder("masked", grid_size=4, weights=weights, device="cpu")
    images = open_dataset(config.data_dir).images([0, 1])
    tokens = found(images)
    assert tokens.shape == (2, 16, 128) and torch.allclose(tokens.mean(1), found.pooled(images))
    for name, arguments, message in [
        ("masked", {"grid_size": 2, "weights": weights}, "it gives 4 x 4 tokens, the model has 2 x 2"),
        ("masked", {"grid_size": 4, "weights": None}, "give a file (.safetensors)"),
        ("extractor", {"grid_size": 4, "weights": weights}, "not the weights of a network that stablevm extractor"),
    ]:
        with pytest.raises(UserError) as error:
            load_encoder(name, device="cpu", **arguments)
        assert message in one_line(error)


def test_a_second_call_trains_nothing_and_other_options_are_refused(trained, monkeypatch):
    config, card = trained
    monkeypatch.setattr("stablevm.preparation.masked_encoder.train_encoder", None)
    assert encoder(config) == card
    for options, message in [
        ({"seed": 3}, "holds an encoder with seed 0, not 3; give another folder"),
        ({"mask_share": 0.5}, "mask share 0.75, not 0.5"),
        ({"mask_share": 1.0}, "--mask-share 1.0: expected a share in (0, 1)"),
    ]:
        with pytest.raises(UserError) as error:
            encoder(dataclasses.replace(config, **options))
        assert message in one_line(error)


def test_the_same_seed_gives_the_same_encoder(trained, tmp_path):
    config, _ = trained
    configs = [dataclasses.replace(config, output_dir=tmp_path / name, steps=2) for name in ("a", "b")]
    contents = []
    for each in configs:
        encoder(each)
        contents.append((each.output_dir / "encoder.safetensors").read_bytes())
    assert contents[0] == contents[1]
    # a folder without its card was interrupted
    (tmp_path / "a" / "encoder.json").unlink()
    encoder(configs[0])
    assert json.loads((tmp_path / "a" / "encoder.json").read_text())["steps"] == 2


def test_masked_patches_do_not_reach_the_encoder():
    generator = torch.Generator().manual_seed(0)
    net = MaskedNet(generator, side=8, patch_size=2, channels=3)
    images = torch.rand(1, 3, 8, 8, generator=generator)
    kept = torch.tensor([[0, 5]])
    changed = images.clone()
    changed[:, :, 6:, 6:] = 1.0  # patch 15
    assert torch.equal(net.visible(images, kept), net.visible(changed, kept))
    everything = torch.arange(16)[None]
    assert torch.allclose(net.visible(images, everything), net.patches(images), atol=1e-6)
    model = MaskedAutoencoder(net, generator)
    # a decoder that predicts 0 errs by the squares of the masked pixels alone
    for parameter in model.decoder[-1].parameters():
        parameter.data.zero_()
    hidden = changed.clone()
    hidden[:, :, :2, :2] = 0
    hidden[:, :, 2:4, 2:4] = 0
    assert model.loss(changed, kept).item() == pytest.approx(hidden.square().sum().item() / (14 * 12), rel=1e-6)


def test_sizes_that_do_not_fit():
    for side, patch_size in ((8, 3), (8, 8), (260, 4)):
        with pytest.raises(UserError, match="expected patches that divide the image"):
            MaskedNet(side=side, patch_size=patch_size)
    assert masked_net_for({}) is None and masked_net_for({"network.pos_embed": torch.ones(1)}) is None


def test_images_that_do_not_fit_into_memory_are_told_before_they_are_read(trained, tmp_path, monkeypatch):
    config = dataclasses.replace(trained[0], output_dir=tmp_path / "new")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100_000))
    with pytest.raises(UserError) as error:
        encoder(config)
    line = one_line(error)
    assert "the 1,347 images take 0.26 MB" in line and "has 0.10 MB free" in line and "--part 1/6" in line
