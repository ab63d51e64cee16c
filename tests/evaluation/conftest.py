"""What the tests of evaluations share: the weights of an Inception, a cache, and a configuration."""

import numpy as np
import pytest
import torch

from stablevm.evaluation.config import EvaluateConfig
from tests.helpers import inception
from tests.helpers.evaluations import FAKE, REAL


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Weights and a cache that all tests share: each image goes through the network once."""
    folder = tmp_path_factory.mktemp("evaluation")
    torch.save(inception.random_weights(), folder / "weights.pth")
    return folder


@pytest.fixture
def options(home, tmp_path):
    """Build a config: by default it evaluates FAKE against REAL."""

    def build(samples=None, real=None, **given):
        np.savez(tmp_path / "samples.npz", **(samples or {"arr_0": FAKE}))
        np.savez(tmp_path / "ref.npz", **(real or {"arr_0": REAL}))
        defaults = {
            "samples": tmp_path / "samples.npz",
            "reference": tmp_path / "ref.npz",
            "inception_weights": home / "weights.pth",
            "cache_dir": home / "cache",
        }
        return EvaluateConfig(**(defaults | given))

    return build
