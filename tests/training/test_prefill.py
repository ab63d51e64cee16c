"""Filling the bank before the first step: how many samples, which ones, and that it doesn't matter who reads them."""

import shutil
from dataclasses import replace

import pytest
import torch

from stablevm.bank import NO_ID, ClassBank
from stablevm.data.opening import open_dataset
from stablevm.training.objectives import prefill
from tests.helpers import runs

CAPACITY = 5


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefill")
    labels = torch.tensor([0] * 20 + [2] * 17 + [1] * 3)  # class 1 has fewer samples than the bank has room
    runs.write_data(folder / "data", labels[torch.randperm(40, generator=torch.Generator().manual_seed(6))])
    return folder


def filled(root, **options):
    """The rows (3, CAPACITY) of the data that a new bank holds after filling, and its entries."""
    config = replace(runs.config(root, loss_type="stablevm"), **options)
    dataset = open_dataset(config.data_dir)
    bank = ClassBank(3, CAPACITY, dataset.latent.shape)
    prefill(bank, dataset, config, show=False)
    return bank.ids_at(torch.arange(3 * CAPACITY)).reshape(3, CAPACITY), bank.entries


@pytest.mark.parametrize("fully, counts", [(False, [1, 1, 1]), (True, [CAPACITY, 3, CAPACITY])])
def test_how_many_of_each_class(fully, counts, root):
    ids, _ = filled(root, prefill_bank_fully=fully)
    labels = open_dataset(root / "data").labels()
    for label, count in enumerate(counts):
        held = ids[label][ids[label] != NO_ID]
        assert len(held) == len(held.unique()) == count and (labels[held] == label).all()


def test_the_seed_chooses(root):
    first, again, other = (filled(root, prefill_bank_fully=True, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and set(first[0].tolist()) != set(other[0].tolist())


@pytest.mark.parametrize("workers, batch", [(0, 1), (1, 4), (3, 2), (2, 1000)])
def test_threads_and_parts_change_nothing(workers, batch, root):
    expected = filled(root, prefill_bank_fully=True)
    found = filled(root, prefill_bank_fully=True, prefill_workers=workers, prefill_batch_size=batch)
    assert all(map(torch.equal, found, expected))


def test_images_are_not_read(root, tmp_path):
    expected = filled(root, prefill_bank_fully=True)
    shutil.copytree(root / "data", tmp_path / "data")
    for file in (tmp_path / "data").glob("images-*"):
        file.unlink()
    assert all(map(torch.equal, filled(root, prefill_bank_fully=True, data_dir=tmp_path / "data"), expected))


def test_classes_that_have_fewer_are_reported(root, capsys):
    config = runs.config(root, loss_type="stablevm", prefill_bank_fully=True)
    dataset = open_dataset(config.data_dir)
    prefill(ClassBank(3, CAPACITY, dataset.latent.shape), dataset, config, show=True)
    assert capsys.readouterr().out == "bank: 1 of 3 classes have fewer than 5 samples; all are in it\n"
