"""A prepared data set that the tests of this room share."""

import pytest

from tests.helpers.data_sets import source, write


@pytest.fixture(scope="session")
def dataset_rows():
    """What the data set in `dataset_dir` was written from."""
    return source()


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory, dataset_rows):
    """A prepared data set of three shards, for reading only."""
    folder = tmp_path_factory.mktemp("data") / "train"
    write(folder, dataset_rows)
    return folder


@pytest.fixture
def dataset_copy(dataset_dir, tmp_path):
    """A copy of it to damage."""
    for file in dataset_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path
