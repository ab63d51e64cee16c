"""`stablevm data statistics`: mean and deviation of each channel, recorded with the data, and trained on."""

import json
from dataclasses import replace

import pytest
import torch

from stablevm import cli
from stablevm.data.manifest import Manifest
from stablevm.data.opening import open_dataset
from stablevm.data.writer import ShardWriter
from stablevm.networks.autoencoder import IDENTITY, LatentSpec
from stablevm.networks.snapshot import load_card
from stablevm.preparation import statistics
from stablevm.support.errors import UserError
from tests.helpers import runs

ROWS = 600  # more than are read at a time, and no multiple of it


def write(folder, *, deterministic=False, constant=False):
    """Latents of three channels, with means of 0, 100 and -3 and deviations of 1, 0.5 and 8."""
    stream = torch.Generator().manual_seed(0)
    factor, offset = (torch.tensor(values).view(1, 3, 1, 1) for values in ([1.0, 0.5, 8.0], [0.0, 100.0, -3.0]))
    means = (torch.randn(ROWS, 3, 4, 4, generator=stream) * factor + offset).half()
    if constant:
        means[:, 1] = 2
    parts = [means] if deterministic else [means, torch.rand(ROWS, 3, 4, 4, generator=stream).half()]
    latent = LatentSpec((3, 4, 4), 0.5, 0.25, IDENTITY, deterministic=deterministic)
    writer = ShardWriter(folder, Manifest(("a", "b"), 4, "none", latent, has_flips=False, has_images=False))
    rows = torch.arange(ROWS)
    writer.add(moments=torch.cat(parts, 1), moments_flip=None, labels=rows % 2, index=rows, images=None)
    writer.finish()
    return open_dataset(folder)


@pytest.mark.parametrize("deterministic", [True, False])
def test_they_are_those_of_all_draws(deterministic, tmp_path):
    dataset = write(tmp_path, deterministic=deterministic)
    means, deviations = statistics.measured(dataset)
    mean, deviation = dataset.latent.split(dataset.moments(range(ROWS)))
    torch.testing.assert_close(means, mean.double().mean((0, 2, 3)))
    variance = mean.double().var((0, 2, 3), unbiased=False)
    if deviation is not None:  # Var[m + s z] = Var[m] + E[s^2]
        variance = variance + deviation.double().square().mean((0, 2, 3))
    torch.testing.assert_close(deviations, variance.sqrt())


def test_recorded_they_normalise_what_training_sees(tmp_path, capsys):
    dataset = write(tmp_path / "data")
    before = (tmp_path / "data" / "dataset.json").read_bytes()
    assert cli.main(["data", "statistics", str(tmp_path / "data"), "--no-record"]) == 0
    assert (tmp_path / "data" / "dataset.json").read_bytes() == before and "not recorded" in capsys.readouterr().out
    assert cli.main(["data", "statistics", str(tmp_path / "data")]) == 0
    told = capsys.readouterr().out
    assert "mean of each channel: " in told and "600 latents of 3 channels; recorded" in told
    after = open_dataset(tmp_path / "data")
    assert after.latent.measured and after.latent.autoencoder == IDENTITY
    noise = torch.randn(ROWS, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    latents = after.latent.from_moments(after.moments(range(ROWS)), noise)
    # Means of 9,600 values of deviation 1 for each channel, seed 1: |z| < 4.
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=4 / 9600**0.5)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(3), rtol=0, atol=4 / (2 * 9600) ** 0.5)
    assert torch.equal(after.moments(range(ROWS)), dataset.moments(range(ROWS))), "what lies on the disk stays"
    assert cli.main(["data", "verify", str(tmp_path / "data"), "--num-workers", "0"]) == 0
    capsys.readouterr()
    assert cli.main(["data", "statistics", str(tmp_path / "data")]) == 0
    assert "were begun before" not in capsys.readouterr().out, "the same once more changes nothing"


def test_a_run_knows_by_which_statistics_its_latents_were_normalised(tmp_path):
    write(tmp_path / "data", deterministic=True)
    assert cli.main(["data", "statistics", str(tmp_path / "data")]) == 0
    settings = runs.config(tmp_path, model="SiT-XXS/1", max_train_steps=2, loss_type="stablevm")
    folder = runs.run(settings)
    latent = load_card(folder / "checkpoints" / "0000002").latent
    assert latent == open_dataset(tmp_path / "data").latent and latent.measured and latent.deterministic
    values = json.loads((tmp_path / "data" / "dataset.json").read_text())
    values["latent"]["scale"] = 1.0
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="does not fit the network or data set of the options"):
        runs.run(replace(settings, max_train_steps=3))


def test_a_constant_channel_has_no_scale(tmp_path):
    write(tmp_path, deterministic=True, constant=True)
    with pytest.raises(UserError, match="channel 1 of its latents is constant"):
        statistics.measured(open_dataset(tmp_path))


def test_a_layout_without_a_place_for_them_says_so(tmp_path):
    dataset = write(tmp_path)
    with pytest.raises(UserError, match=r"shards: statistics can't be recorded.*prepare pack"):
        super(type(dataset), dataset).record(dataset.latent)
