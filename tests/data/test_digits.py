"""The embedded digits: the split, the pixels, and preparing them several times."""

import hashlib

import numpy as np
import pytest
import torch

from stablevm.data.digits import prepare_digits
from stablevm.data.opening import open_dataset
from stablevm.networks.autoencoder import load_autoencoder, pixels_to_unit
from stablevm.support.errors import UserError
from tests.helpers.data_sets import damaged, kill_at_rename, one_line, source, write


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    assert "1,347 for train and 450 for test, written to" in prepare_digits(folder)
    return folder


class TestDigits:
    def test_splits_are_stratified_fixed_and_cover_the_source(self, digits):
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        train, test = (open_dataset(digits, split) for split in ("train", "test"))
        assert (len(train), len(test)) == (1347, 450)
        assert torch.cat([train.index(), test.index()]).sort().values.equal(torch.arange(1797))
        for share, data in ((0.75, train), (0.25, test)):
            assert (np.abs(np.bincount(labels) * share - data.manifest.class_counts) <= 1).all()
            mean, deviation = data.moments(range(len(data))).chunk(2, dim=1)
            assert not deviation.any()
            exact = pixels[data.index().numpy()].reshape(-1, 1, 8, 8) / 8 - 1
            assert (mean.double().numpy() == exact).all()
            assert (data.labels().numpy() == labels[data.index().numpy()]).all()
        digest = hashlib.sha256(test.index().numpy().astype("<i8").tobytes()).hexdigest()
        assert digest.startswith("a18a99c68d6d634f")

    def test_decoded_latents_are_the_stored_images(self, digits):
        data = open_dataset(digits)
        mean = data.moments(range(len(data)))[:, :1]
        images = data.images(range(len(data)))
        assert torch.equal(load_autoencoder(data.latent).decode(mean), images)
        assert (pixels_to_unit(images[:, :1]) - mean.float()).abs().max() <= 0.5001 / 127.5  # half a level

    def test_called_again_it_says_so_and_changes_nothing(self, digits):
        before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in digits.rglob("*.*")}
        assert "complete already in" in prepare_digits(digits)
        assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in digits.rglob("*.*")}

    @pytest.mark.parametrize("allowed", range(6))
    def test_interrupted_at_any_file_it_completes(self, tmp_path, monkeypatch, allowed):
        with monkeypatch.context() as patch:
            kill_at_rename(patch, allowed)
            with pytest.raises(KeyboardInterrupt):
                prepare_digits(tmp_path)
        assert "written to" in prepare_digits(tmp_path)
        for split in ("train", "test"):
            assert damaged(tmp_path / split) == []
        assert "complete already" in prepare_digits(tmp_path)

    @pytest.mark.parametrize("name", ["notes.txt", "train/images-00001.safetensors", "test/latents-00000.safetensors"])
    def test_a_folder_with_something_else_is_left_alone(self, tmp_path, name):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
        with pytest.raises(UserError, match=f"{name}: not a file of the digits") as error:
            prepare_digits(tmp_path)
        one_line(error)
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]
        assert (tmp_path / name).read_text() == "mine"

    def test_another_data_set_in_the_folder_is_left_alone(self, tmp_path):
        write(tmp_path / "train", source(10))
        with pytest.raises(UserError, match="not a file of the digits"):
            prepare_digits(tmp_path)
        assert not (tmp_path / "test").exists() and damaged(tmp_path / "train") == []
