"""What is registered by a word: each word that an option takes leads to something, and nothing else does."""

from typing import get_args, get_type_hints

from stablevm.training.config import TrainConfig
from stablevm.training.objectives import OBJECTIVES


def test_every_loss_type_has_an_objective():
    assert tuple(OBJECTIVES) == get_args(get_type_hints(TrainConfig)["loss_type"])
