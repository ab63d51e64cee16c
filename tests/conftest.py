"""Fixtures shared by the rooms' tests."""

import os
import signal

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
