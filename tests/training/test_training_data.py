"""A run and its data: known by their content, mirrored where asked for, with a bad latent named."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stablevm import cli
from stablevm.bank import ClassBank
from stablevm.data.opening import open_dataset
from stablevm.support.errors import UserError
from stablevm.training.start import DATA_FILE, check_bank
from tests.helpers import runs

BANK = {"loss_type": "stablevm", "prefill_bank_fully": True}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    runs.write_data(folder / "data")
    runs.write_data(folder / "mirrored", flips=True)
    runs.write_encoder(folder / "encoder.safetensors")
    return folder


def refusal(settings, capsys):
    capsys.readouterr()
    runs.AcceleratorState._reset_state(True)
    assert cli.train(runs.as_arguments(settings)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture(scope="module")
def begun(root):
    """A run of which two of six steps are done."""
    settings = runs.config(root, "begun", **BANK)
    runs.run(replace(settings, max_train_steps=2))
    return settings


def copied(settings, name):
    shutil.copytree(settings.folder, settings.output_dir / name)
    return replace(settings, exp_name=name)


def test_data_may_lie_elsewhere_or_be_spelled_otherwise(root, begun, tmp_path, monkeypatch):
    whole = runs.run(runs.config(root, "whole", **BANK))
    shutil.copytree(root / "data", tmp_path / "moved" / "train")
    monkeypatch.chdir(tmp_path)
    for number, spelling in enumerate((Path("moved"), tmp_path / "moved" / "train", root / "data" / ".." / "data")):
        folder = runs.run(replace(copied(begun, f"elsewhere-{number}"), data_dir=spelling))
        runs.assert_same_checkpoint(folder, whole)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.arange(13) % 3, "13 rows instead of 40"),
        ((torch.arange(40) + 1) % 3, "other latents or labels, or the same in another order"),
    ],
)
def test_other_data_under_the_same_path_are_refused(root, begun, tmp_path, labels, words, capsys):
    settings = replace(copied(begun, f"replaced-{len(labels)}"), data_dir=tmp_path / "data")
    runs.write_data(tmp_path / "data", labels)
    line = refusal(settings, capsys)
    assert words in line and "give those that it started with" in line and str(settings.folder) in line


def test_a_run_of_before_knows_its_data_by_their_path(root, begun, tmp_path, capsys):
    settings = copied(begun, "before")
    (settings.folder / DATA_FILE).unlink()
    shutil.copytree(root / "data", tmp_path / "data")
    assert "holds a run with --data-dir" in refusal(replace(settings, data_dir=tmp_path / "data"), capsys)
    runs.run(replace(settings, max_train_steps=4))
    assert "was started by an earlier version" in capsys.readouterr().err
    runs.run(replace(settings, data_dir=tmp_path / "data"))  # now it is recorded
    assert "earlier version" not in capsys.readouterr().err


def test_a_bank_of_rows_that_the_data_do_not_have(root, begun, tmp_path):
    """Reading their images ended in an IndexError."""
    bank = ClassBank(3, 8, (1, 8, 8))
    bank.insert(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), torch.tensor([12, 13]))
    settings, fewer = begun, open_dataset(runs.write_data(tmp_path / "data", torch.arange(13) % 3))
    check_bank(settings, open_dataset(root / "data"), bank)
    with pytest.raises(UserError, match=r"has 13 rows, but the bank of the run in .* has row 13; give the data"):
        check_bank(settings, fewer, bank)


@pytest.mark.parametrize(
    "options", [{}, BANK, {**BANK, **runs.ALIGNED}, {**BANK, **runs.ALIGNED, "bank_anchors": "bank"}]
)
def test_mirror_images_are_samples_of_their_own(root, options):
    """Losses differ from those without, are the same after an interruption, and an epoch has twice the rows."""
    name = f"flips-{len(options)}"
    settings = runs.config(root, name, data_dir=root / "mirrored", horizontal_flips=True, **options)
    plain = runs.losses(runs.run(replace(settings, exp_name=f"{name}-without", horizontal_flips=False)))
    whole = runs.run(settings)
    assert runs.losses(whole) != plain
    runs.run(replace(settings, exp_name=f"{name}-resumed", max_train_steps=3))
    runs.assert_same_checkpoint(runs.run(replace(settings, exp_name=f"{name}-resumed")), whole)
    assert settings.total_steps(2 * runs.SAMPLES) == 6
    if options:
        ids = load_file(whole / "checkpoints" / "0000006" / "bank.safetensors")["ids"]
        assert (ids >= runs.SAMPLES).any() and (ids < runs.SAMPLES).any() and ids.max() < 2 * runs.SAMPLES


def test_an_epoch_has_the_mirror_images_too(root):
    settings = runs.config(root, "epoch", data_dir=root / "mirrored", epochs=1, max_train_steps=100, batch_size=40)
    for flips in (False, True):
        folder = runs.run(replace(settings, horizontal_flips=flips, exp_name=f"epoch-{flips}"))
        assert len(runs.losses(folder)) == 1 + flips


def test_flips_of_data_without_them(root, capsys):
    line = refusal(runs.config(root, "none", horizontal_flips=True), capsys)
    assert "no latents of mirrored images" in line and "encode --flip" in line and "--horizontal-flips" in line


def test_flips_belong_to_a_run(root, capsys):
    settings = runs.config(root, "belongs", data_dir=root / "mirrored", max_train_steps=1)
    runs.run(settings)
    assert "--horizontal-flips" in refusal(replace(settings, horizontal_flips=True, max_train_steps=2), capsys)


@pytest.mark.parametrize("fully", [True, False])
def test_a_latent_that_is_not_finite_never_enters_a_bank(root, tmp_path, fully, capsys):
    """In an earlier version it made every target of its class NaN, and other rows were reported."""
    shard = runs.write_data(tmp_path / "data") / "latents-00000.safetensors"
    tensors = load_file(shard)
    tensors["moments"][20] = torch.nan
    save_file(tensors, shard)
    settings = runs.config(root, f"spoiled-{fully}", data_dir=tmp_path / "data", loss_type="stablevm")
    line = refusal(replace(settings, prefill_bank_fully=fully, bank_capacity_per_class=40), capsys)
    assert "the latent of row 20 (image 20 of the source, in latents-00000.safetensors) is not finite" in line


def test_the_record_of_the_data(root, begun):
    record = json.loads((begun.folder / DATA_FILE).read_text())
    assert record["rows"] == runs.SAMPLES == len(open_dataset(root / "data")) and record["images"] == ""
