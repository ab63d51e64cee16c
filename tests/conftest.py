"""Fixtures shared by the rooms' tests."""

import os
import signal
import socket

# The tests are too small to gain from threads, and OpenMP's wait for each other where another program is running.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# A shell lets what it starts in the background ignore Ctrl-C, which the commands under test would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


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
    """The hub's client asks an address of this machine where nobody listens, and its cache is empty."""
    from huggingface_hub import constants

    with socket.socket() as closed:  # bound, but it does not listen
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield
