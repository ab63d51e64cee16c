"""The classes of generated images, which depend only on the seed."""

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor

from stablevm.networks.snapshot import ModelCard
from stablevm.support.errors import UserError
from stablevm.support.options import some_of
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


def numbers_by_name(card: ModelCard) -> dict[str, int]:
    """The number of each class, by its name with single spaces."""
    return {" ".join(name.split()): number for number, name in enumerate(card.class_names)}


def nearest_names(name: str, card: ModelCard) -> str:
    """The end of a message about an unknown class: the names that resemble `name` most, and the range of numbers."""
    near = difflib.get_close_matches(name, numbers_by_name(card), n=3, cutoff=0.0)
    return f"the nearest are {some_of(near)}, or give numbers from 0 to {card.model.num_classes - 1}"


def class_named(name: str, card: ModelCard) -> int:
    """The number of the class called `name`; UserError, with the nearest names, if there is none."""
    number = numbers_by_name(card).get(" ".join(name.split()))
    if number is None:
        raise UserError(f"class {name}: the network knows no such class; {nearest_names(name, card)}")
    return number
