"""LightningDiT's and REPA-E's published files: imported networks compute the same, on latents of their statistics."""

import pytest
import torch

from stablevm.support.errors import UserError
from tests.helpers import published as sit_pub
from tests.helpers import published_lightning_dit as pub
from tests.helpers.data_sets import one_line
from tests.helpers.imported import REPA_ARGS, TOLD, imported, training_file
from tests.helpers.imported import difference as sit_difference

MEANS, DEVIATIONS = torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([1.0, 2.0, 0.5, 4.0])
CONFIG = {
    "transport": {"path_type": "Linear", "prediction": "velocity", "use_lognorm": True},
    "data": {"num_classes": pub.CLASSES, "image_size": 32},
    "model": {"use_qknorm": False},
}


def network(**options):
    return sit_pub.built(pub.PublishedLightningDiT, **options)


@pytest.fixture
def statistics(tmp_path):
    """As LightningDiT's training writes them."""
    shaped = {"mean": MEANS.view(1, -1, 1, 1), "std": DEVIATIONS.view(1, -1, 1, 1)}
    torch.save(shaped, tmp_path / "latents_stats.pt")
    return tmp_path / "latents_stats.pt"


def repa_e(**more):
    """A SiT in REPA's time, with the layer that normalises its latents; its autoencoder is beside it."""
    net = sit_pub.built(sit_pub.PublishedSiT, projectors=(12,))
    state = net.state_dict() | {
        "bn.running_mean": MEANS,
        "bn.running_var": DEVIATIONS.square(),
        "bn.num_batches_tracked": torch.tensor(7),
    }
    return net, {"ema": state, "vae": {"encoder.conv_in.weight": torch.ones(1)}, **more}


def inputs():
    stream = torch.Generator().manual_seed(3)
    x = torch.randn(5, pub.CHANNELS, pub.SIDE, pub.SIDE, generator=stream)
    return x, torch.tensor([0.0, 1.0, 0.2, 0.5, 0.7]), torch.tensor([0, 1, 2, 4, pub.CLASSES])


@pytest.mark.parametrize(
    ("options", "save", "told"),
    [
        ({}, lambda net: {"ema": net.state_dict(), "model": net.state_dict(), "config": CONFIG}, {}),
        ({"qk_norm": True, "patch": 2}, lambda net: net.state_dict(), TOLD),
        ({"tables": False}, lambda net: {"ema": {f"module.{k}": v for k, v in net.state_dict().items()}},
         {**TOLD, "source": "lightningdit"}),
    ],
    ids=["training", "bare", "wrapped"],
)  # fmt: skip
def test_a_lightning_dit_computes_the_same(options, save, told, tmp_path, statistics):
    """To 1e-5 of the output's size, in our time: the velocity has the other sign at 1 - t."""
    net = network(**options)
    card, model = imported(save(net), tmp_path, latent_statistics=statistics, **told)
    x, t, y = inputs()
    expected = -net(x, 1 - t, y)
    assert ((model(x, t, y) - expected).abs().max() / expected.std()).item() < 1e-5
    name = f"LightningDiT-XXS/{options.get('patch', 1)}"
    assert (card.model.name, card.model.kind, card.model.num_classes) == (name, "lightning_dit", pub.CLASSES)
    assert card.model.qk_norm == options.get("qk_norm", False)


def test_its_latents_have_the_statistics_of_the_training(tmp_path, statistics):
    card, _ = imported(network().state_dict(), tmp_path, latent_statistics=statistics, **TOLD)
    assert card.latent.measured and card.latent.autoencoder == "stabilityai/sd-vae-ft-mse"
    raw = MEANS[:, None, None] + DEVIATIONS[:, None, None] * torch.ones(1, 4, 4, 4)
    torch.testing.assert_close(card.latent.normalize(raw), torch.ones(1, 4, 4, 4))
    torch.testing.assert_close(card.latent.denormalize(torch.ones(1, 4, 4, 4)), raw)


def test_repa_e_brings_its_network_its_projector_and_its_statistics(tmp_path):
    net, content = repa_e(steps=400, args=training_file(sit_pub.built(sit_pub.PublishedSiT), REPA_ARGS)["args"])
    card, model = imported(content, tmp_path, vae="mse")
    assert sit_difference(net, model, reverse=False) < 1e-5
    assert (card.model.name, card.model.projector_dims, card.step) == ("SiT-XXS/2", (12,), 400)
    assert card.latent.measured and card.latent.shift == tuple(MEANS.tolist())
    torch.testing.assert_close(torch.tensor(card.latent.scale), 1 / DEVIATIONS)


@pytest.mark.parametrize("multiplier", [1.0, 0.5])
def test_a_recorded_multiplier_scales_the_latents(multiplier, tmp_path, statistics):
    config = {**CONFIG, "data": {**CONFIG["data"], "latent_norm": True, "latent_multiplier": multiplier}}
    card, _ = imported({"ema": network().state_dict(), "config": config}, tmp_path, latent_statistics=statistics)
    torch.testing.assert_close(torch.tensor(card.latent.scale), multiplier / DEVIATIONS)


def test_latents_that_were_not_normalised_need_no_statistics(tmp_path):
    config = {**CONFIG, "data": {**CONFIG["data"], "latent_norm": False, "latent_multiplier": 0.5}}
    card, _ = imported({"ema": network().state_dict(), "config": config}, tmp_path)
    assert (card.latent.scale, card.latent.shift, card.latent.measured) == (0.5, 0.0, True)


STATE = network().state_dict()


def other_tables():
    return STATE | {"feat_rope.freqs_cos": STATE["feat_rope.freqs_cos"].flip(1)}


MISTAKES = {
    "no statistics": (STATE, TOLD, "lacks the statistics of its latents.*give --latent-statistics"),
    "not sit": (STATE, {**TOLD, "source": "sit"}, "--source sit: .* is of lightningdit; leave"),
    "not repa": (repa_e()[1], {**TOLD, "source": "repa", "encoder_depth": 1}, "--source repa: .* is of repae"),
    "not lightningdit": (sit_pub.built(sit_pub.PublishedSiT).state_dict(), {**TOLD, "source": "lightningdit"},
                         "does not have the weights of a LightningDiT"),
    "not repae": (sit_pub.built(sit_pub.PublishedSiT).state_dict(), {**TOLD, "source": "repae"},
                  "does not have the weights of a REPA-E"),
    "gelu": ({k: v for k, v in STATE.items() if "w3" not in k}, {**TOLD, "latent_statistics": "here"},
             "missing: blocks.0.mlp.w3.bias"),
    "other rotation": (other_tables(), {**TOLD, "latent_statistics": "here"}, "is not the table of rotary positions"),
    "no autoencoder": (repa_e()[1], {**TOLD, "encoder_depth": 1},
                       "tuned its own autoencoder; give that, .* --vae FOLDER"),
    "twice": (repa_e()[1], {**TOLD, "encoder_depth": 1, "vae": "mse", "latent_statistics": "here"},
              "holds its own; leave it out"),
    "no variance": ({**repa_e()[1]["ema"], "bn.running_var": torch.zeros(4)},
                    {**TOLD, "encoder_depth": 1, "vae": "mse"}, "positive variance of each channel"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake, tmp_path, statistics):
    content, options, expected = MISTAKES[mistake]
    if "latent_statistics" in options:
        options = {**options, "latent_statistics": statistics}
    with pytest.raises(UserError, match=expected) as error:
        imported(content, tmp_path, **options)
    one_line(error)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"mean": MEANS}, "expected mean and std, a number for each channel; found mean"),
        ({"mean": MEANS, "std": DEVIATIONS[:3]}, "expected mean and std"),
        ({"mean": MEANS, "std": -DEVIATIONS}, "expected positive deviations"),
        ({"mean": MEANS / 0, "std": DEVIATIONS}, "expected mean and std"),
        ({"mean": MEANS[:3], "std": DEVIATIONS[:3]}, "the statistics are of 3 channels, the network takes 4"),
    ],
    ids=["one", "lengths", "negative", "infinite", "channels"],
)
def test_statistics_that_are_none(content, expected, tmp_path):
    torch.save(content, tmp_path / "s.pt")
    with pytest.raises(UserError, match=expected) as error:
        imported(STATE, tmp_path, latent_statistics=tmp_path / "s.pt", **TOLD)
    one_line(error)
