"""Fixtures shared by the rooms' tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _untouched_global_randomness():
    """Library code never touches the global random state: checked around every test."""
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(before, torch.random.get_rng_state()), "the global random state was used"


@pytest.fixture
def stream():
    return torch.Generator().manual_seed(20261124)
