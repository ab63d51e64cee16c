"""The classes of generated images, which depend only on the seed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stablevm.networks.snapshot import ModelCard
from stablevm.support.rng import generator


def balanced_labels(num_samples: int, classes: Sequence[int], seed: int) -> Tensor:
    """Equally many int64 labels of each class, up to one, (num_samples,); the seed decides which classes have one more.

    They are shuffled over the whole set, because the Inception score is computed over consecutive chunks, and chunks
    that are balanced by construction would raise it.
    """
    stream = generator("labels", "equal", seed)
    per_class, remainder = divmod(num_samples, len(classes))
    pool = torch.tensor(classes, dtype=torch.int64)
    extra = pool[torch.randperm(len(pool), generator=stream)[:remainder]]
    labels = torch.cat([pool.repeat(per_class), extra])
    return labels[torch.randperm(num_samples, generator=stream)]


def random_labels(num_samples: int, classes: Sequence[int], seed: int) -> Tensor:
    """Labels (num_samples,) int64, each drawn uniformly from `classes`."""
    pool = torch.tensor(classes, dtype=torch.int64)
    return pool[torch.randint(len(pool), (num_samples,), generator=generator("labels", "random", seed))]


def trained_labels(labels: Tensor, card: ModelCard) -> Tensor:
    """The labels, or the null class for all if training dropped every label, so that no class was trained."""
    return labels if card.classes_are_trained else torch.full_like(labels, card.model.null_class)
