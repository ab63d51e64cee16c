"""The command `stablevm extractor`: it wants two splits, and its folder belongs to their images."""

import shutil

import numpy as np
import pytest

from stablevm import cli
from stablevm.data.digits import prepare_digits
from stablevm.data.opening import open_dataset


@pytest.fixture
def digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare_digits(tmp_path / "digits")


def told(capsys, *options):
    status = cli.extractor(["--steps=2", *options])
    output = capsys.readouterr()
    return status, output.err or output.out


@pytest.mark.usefixtures("digits")
def test_one_data_set_is_refused(capsys):
    """Its test images would be those that it was trained on."""
    status, text = told(capsys, "--data-dir=digits/train", "--output-dir=out")
    assert status == 2 and "error: --data-dir digits/train: one data set, not a folder with the splits" in text


@pytest.mark.usefixtures("digits")
def test_a_folder_belongs_to_the_images_of_its_extractor(capsys):
    assert told(capsys, "--data-dir=digits", "--output-dir=out")[0] == 0
    assert "the extractor exists already" in told(capsys, "--data-dir=digits", "--output-dir=out")[1]
    shutil.copytree("digits/test", "other/train")
    shutil.copytree("digits/test", "other/test")
    status, text = told(capsys, "--data-dir=other", "--output-dir=out")
    assert (status, text) == (2, "error: out holds an extractor of other data than other; give another folder\n")
    status, text = told(capsys, "--data-dir=nowhere", "--output-dir=out")
    assert status == 2 and "nowhere: no such folder" in text


@pytest.mark.usefixtures("digits")
def test_a_poor_extractor_is_told(capsys):
    assert told(capsys, "--data-dir=digits", "--output-dir=out")[0] == 0
    images = open_dataset("digits", "test").images(range(40)).permute(0, 2, 3, 1).numpy()
    np.savez("samples.npz", arr_0=images, labels=open_dataset("digits", "test").labels()[:40].numpy())
    assert cli.evaluate(["samples.npz", "--reference=digits", "--extractor=out"]) == 0
    assert "% of the test images, so its numbers say little" in capsys.readouterr().err
