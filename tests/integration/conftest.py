"""Fixtures that several files of integration tests share."""

import pytest
import runs


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with the data and the encoder of `runs`; each file of tests has its own."""
    folder = tmp_path_factory.mktemp("training")
    runs.write_data(folder / "data")
    runs.write_encoder(folder / "encoder.safetensors")
    return folder
