"""What the tests of the method share."""

import pytest
import torch

from tests.helpers.draws import CLASSES, ROWS, SHAPE


@pytest.fixture
def batch(stream):
    return torch.randn(ROWS, *SHAPE, generator=stream), torch.arange(ROWS) % CLASSES
