"""Guidance by a weaker network: exact velocities, the number of evaluations, which networks fit, and the command."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from stablevm import cli
from stablevm.interpolant import COSINE, LINEAR
from stablevm.networks.autoencoder import LatentSpec
from stablevm.networks.registry import network_config
from stablevm.sampling.archive import read_provenance
from stablevm.sampling.config import GenerateConfig
from stablevm.sampling.guidance import Guide, GuidedVelocity, check_guide
from stablevm.support.errors import UserError
from tests.helpers.checkpoints import save_checkpoint, tiny_card


class Constant(nn.Module):
    """Predicts `value + label`, and counts the rows that it was asked for."""

    def __init__(self, value=0.0):
        super().__init__()
        self.value, self.rows, self.labels = value, 0, []

    def forward(self, x, t, labels):
        self.rows += len(x)
        self.labels += labels.tolist()
        return (self.value + labels.to(x.dtype)).reshape(-1, *[1] * (x.ndim - 1)).expand_as(x)


def velocities(time, *, guide, model=None, path=LINEAR, **options):
    velocity = GuidedVelocity(
        model or Constant(), path, "v", torch.tensor([2, 3]), null_class=4, guide=guide, **options
    )
    x = torch.full((2, 1, 1, 1), 0.5, dtype=torch.float64)
    return velocity(x, torch.tensor(time, dtype=torch.float64)).flatten().tolist(), velocity


def test_it_extrapolates_from_the_weaker_network_in_its_interval():
    """v_weak + 2.5 (v - v_weak), where v - v_weak = -7 for every row."""
    guide = Guide(Constant(7.0), tiny_card(), scale=2.5, low=0.2, high=0.7)
    for time in (0.2, 0.5, 0.7):
        assert velocities(time, guide=guide)[0] == pytest.approx([2 - 1.5 * 7, 3 - 1.5 * 7])
    for time in (0.1, 0.8):
        found, velocity = velocities(time, guide=guide)
        assert found == [2, 3] and velocity.evaluations == 1
    assert velocities(0.5, guide=guide)[1].evaluations == 2


def test_with_label_guidance_both_are_added():
    """v_null + 1.8 (v - v_null) + (2.5 - 1) (v - v_weak), each in its own interval."""
    guide, labels = Guide(Constant(7.0), tiny_card(), scale=2.5, high=0.6), {"scale": 1.8, "low": 0.4}
    both = [4 + 1.8 * (label - 4) - 1.5 * 7 for label in (2, 3)]
    found, velocity = velocities(0.5, guide=guide, **labels)
    assert found == pytest.approx(both) and velocity.evaluations == 3
    assert velocities(0.7, guide=guide, **labels)[0] == pytest.approx([4 + 1.8 * (2 - 4), 4 + 1.8 * (3 - 4)])
    assert velocities(0.3, guide=guide, **labels)[0] == pytest.approx([2 - 10.5, 3 - 10.5])


def test_the_guide_sees_the_same_labels_or_none_if_it_knows_none():
    trained, bare = Constant(), Constant()
    velocities(0.5, guide=Guide(trained, tiny_card(), scale=2))
    velocities(0.5, guide=Guide(bare, tiny_card(num_classes=9, label_dropout=1.0), scale=2))
    assert trained.labels == [2, 3] and bare.labels == [9, 9]


@pytest.mark.parametrize("path", [LINEAR, COSINE], ids=lambda path: path.name)
def test_the_guide_may_predict_the_data(path):
    """Its prediction becomes a velocity before the difference is taken."""
    x, time = torch.full((2, 1, 1, 1), 0.5, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    guide = Guide(Constant(1.0), replace(tiny_card(path_type=path.name), prediction="x"), scale=2)
    weak = path.convert(
        torch.tensor([3.0, 4.0]).double().view(2, 1, 1, 1), x, time.expand(2), "x0", "velocity"
    ).flatten()
    assert velocities(0.5, guide=guide, path=path)[0] == pytest.approx((2 * torch.tensor([2.0, 3.0]) - weak).tolist())


def test_rows_with_times_of_their_own():
    guide = Guide(Constant(7.0), tiny_card(), scale=2, high=0.5)
    velocity = GuidedVelocity(Constant(), LINEAR, "v", torch.tensor([2, 3]), null_class=4, guide=guide)
    times = torch.tensor([0.4, 0.6, 0.5], dtype=torch.float64)
    found = velocity(torch.zeros(3, 1, 1, 1, dtype=torch.float64), times, torch.tensor([0, 1, 1]))
    assert found.flatten().tolist() == [2 - 7, 3, 3 - 7] and guide.model.rows == 2
    assert velocity.evaluations == 5 / 2


NAMED = tiny_card()
OTHER_LATENT = LatentSpec(shape=(1, 8, 8), scale=2.0, shift=0.0, autoencoder=NAMED.latent.autoencoder)
LARGE = network_config("SiT-XS/2", input_size=8, in_channels=1, num_classes=4)


@pytest.mark.parametrize(
    "other",
    [
        replace(NAMED, model=LARGE, prediction="x", step=7, time_shift=2.0),
        replace(NAMED, class_names=("0", "1", "2", "3")),
        tiny_card(num_classes=6, label_dropout=1.0),
    ],
    ids=["another network", "imported", "without classes"],
)
def test_networks_that_may_guide(other):
    check_guide(other, NAMED)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (replace(NAMED, path_type="cosine"), "guide_ckpt: path: cosine, expected linear of the network that it guides"),
        (replace(NAMED, latent=OTHER_LATENT), r"latents' scale: 2.0, expected 1.0"),
        (replace(NAMED, latent=replace(NAMED.latent, autoencoder="grey")), "autoencoder: grey, expected identity"),
        (tiny_card(num_classes=6), "number of classes: 6, expected 4"),
        (replace(NAMED, class_names=("cat", "dog", "owl", "bat")), "classes: cat, dog, owl, bat, expected class 0"),
    ],
)
def test_networks_that_may_not(other, told):
    with pytest.raises(UserError, match=told):
        check_guide(other, NAMED)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoguidance")
    save_checkpoint(folder / "strong", tiny_card())
    save_checkpoint(folder / "weak" / "checkpoints" / "0000003", replace(tiny_card(), step=3), seed=5)
    save_checkpoint(folder / "curved", tiny_card(path_type="cosine"))
    save_checkpoint(folder / "labelled", tiny_card(label_dropout=0.0))
    return folder


def generate(checkpoints, tmp_path, *options, name="run"):
    words = ["--ckpt", str(checkpoints / "strong"), "--sample-dir", str(tmp_path), "--name", name]
    return cli.generate([*words, "--num-fid-samples=5", "--mode=ode", "--num-steps=3", *options])


def images(tmp_path, name):
    with np.load(tmp_path / f"{name}.npz") as archive:
        return archive["arr_0"]


def test_the_command_guides_and_records_it(checkpoints, tmp_path, capsys):
    weak = str(checkpoints / "weak")
    assert generate(checkpoints, tmp_path, name="plain") == 0
    assert generate(checkpoints, tmp_path, f"--guide-ckpt={weak}", "--guide-scale=3", "--guide-high=0.7") == 0
    told = capsys.readouterr()
    assert f"{weak}: its newest checkpoint is 0000003" in told.out and "5 network evaluations per image" in told.out
    assert not np.array_equal(images(tmp_path, "run"), images(tmp_path, "plain"))
    record, plain = (read_provenance(tmp_path / f"{name}.npz") for name in ("run", "plain"))
    assert record["guide_scale"] == 3 and record["guide_high"] == 0.7 and record["guide_step"] == 3
    assert not [key for key in plain if key.startswith("guide")], "as in files of earlier versions"
    assert json.dumps(record) != json.dumps(plain)
    assert generate(checkpoints, tmp_path, f"--guide-ckpt={weak}", "--guide-scale=2", "--guide-high=0.7") == 2
    assert "holds images made with guide_scale 3.0" in capsys.readouterr().err


def test_guided_by_itself_it_stays(checkpoints, tmp_path):
    assert generate(checkpoints, tmp_path, name="plain") == 0
    assert generate(checkpoints, tmp_path, f"--guide-ckpt={checkpoints / 'strong'}", "--guide-scale=3") == 0
    assert np.array_equal(images(tmp_path, "run"), images(tmp_path, "plain"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--guide-ckpt=CURVED", "--guide-scale=2"], "--guide-ckpt: path: cosine, expected linear"),
        (["--guide-ckpt=NONE", "--guide-scale=2"], "no such folder"),
        (["--guide-ckpt=WEAK", "--guide-scale=-1"], "--guide-scale -1.0: expected 0 or more"),
        (["--guide-ckpt=WEAK", "--guide-scale=2", "--guide-low=0.5", "--guide-high=0.4"], "at least --guide-low 0.5"),
        (["--guide-ckpt=WEAK", "--guide-scale=2", "--mode=meanflow"], "expected none with --mode meanflow"),
        (["--guide-ckpt=LABELLED", "--guide-scale=2", "--unconditional"], "its null class is untrained"),
    ],
)
def test_refusals(checkpoints, tmp_path, capsys, options, told):
    given = [
        option.replace("CURVED", str(checkpoints / "curved")).replace("WEAK", str(checkpoints / "weak"))
        .replace("NONE", str(tmp_path / "none")).replace("LABELLED", str(checkpoints / "labelled"))
        for option in options
    ]  # fmt: skip
    assert generate(checkpoints, tmp_path, *given) == 2
    lines = capsys.readouterr().err.splitlines()
    assert told in lines[-1] and lines[-1].startswith("error: "), lines
    assert not list(tmp_path.glob("run*"))


def test_options_without_effect_are_named(checkpoints):
    plain = GenerateConfig(ckpt=checkpoints / "strong")
    assert replace(plain, guide_scale=2.0, guide_high=0.5).warnings() == [
        "--guide-scale 2.0 has no effect with no --guide-ckpt",
        "--guide-high 0.5 has no effect with no --guide-ckpt",
    ]
    idle = replace(plain, guide_ckpt=checkpoints / "weak")
    assert idle.warnings() == [f"--guide-ckpt {checkpoints / 'weak'} has no effect with --guide-scale 1"]
    assert idle.effective() == plain
