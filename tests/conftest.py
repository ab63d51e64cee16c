"""Fixtures shared by the rooms' tests."""

import os
import random
import signal
import socket
import zipfile

# The tests are too small to gain from threads, and OpenMP's wait for each other where another program is running.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the commands set it, before torch is imported

import pytest
import torch

pytest.register_assert_rewrite("tests.helpers")

# A shell lets what it starts in the background ignore Ctrl-C, which the commands under test would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Several workers take whole files in this order, so those with slow tests come first: none is left for the end."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _untouched_global_randomness():
    """Library code never touches the global random state: checked around every test."""
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(before, torch.random.get_rng_state()), "the global random state was used"


@pytest.fixture
def stream():
    return torch.Generator().manual_seed(20261124)


@pytest.fixture
def silent_hub(monkeypatch, tmp_path):
    """The hub's client asks an address of this machine where no server listens, and its cache is empty."""
    from tests.helpers.hub import use

    with socket.socket() as closed:  # bound, but it does not listen
        closed.bind(("127.0.0.1", 0))
        use(monkeypatch, f"http://127.0.0.1:{closed.getsockname()[1]}", tmp_path / "hub")
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with the data and the encoder of `runs`; each file of tests has its own."""
    from tests.helpers import runs  # which imports all of training: for the tests that need it

    folder = tmp_path_factory.mktemp("training")
    runs.write_data(folder / "data")
    runs.write_encoder(folder / "encoder.safetensors")
    return folder


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
