"""Fixtures that several files of unit tests share."""

import random
import zipfile

import pytest
import torch
from data_sets import source, write


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


@pytest.fixture(scope="session")
def damaged_torch_files(tmp_path_factory):
    """Torch files of two tensors in whose pickle one to three bytes are wrong: 300, the same each time."""
    folder, stream = tmp_path_factory.mktemp("damaged"), random.Random(0)
    torch.save({"layer.weight": torch.zeros(2, 3), "nested": {"bias": torch.ones(2)}}, folder / "whole.pth")
    with zipfile.ZipFile(folder / "whole.pth") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in members if name.endswith("data.pkl"))
    paths = [folder / f"{number}.pth" for number in range(300)]
    for path in paths:
        content = bytearray(members[pickled])
        for _ in range(stream.randint(1, 3)):
            content[stream.randrange(len(content))] = stream.randrange(256)
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in (members | {pickled: bytes(content)}).items():
                archive.writestr(name, data)
    return paths
