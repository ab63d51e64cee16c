"""The classes of generated images: balanced or random, by the seed."""

from collections import Counter

import pytest
import torch

from stablevm.sampling.labels import balanced_labels, random_labels


@pytest.mark.parametrize("num_samples", [3, 30, 1003])
def test_balanced_labels_are_exact_to_one_and_shuffled(num_samples):
    classes = (7, 1, 4, 9)
    labels = balanced_labels(num_samples, classes, seed=5)
    counts = Counter(labels.tolist())
    assert len(labels) == num_samples and labels.dtype == torch.int64 and set(counts) <= set(classes)
    floor = num_samples // 4
    assert {counts[label] for label in classes} <= {floor, floor + 1}
    assert torch.equal(labels, balanced_labels(num_samples, classes, seed=5))
    if num_samples > 3:
        runs = (labels.diff() == 0).sum().item()
        assert 0 < runs < num_samples / 2, "neither in turn nor class by class"
        assert not torch.equal(labels, balanced_labels(num_samples, classes, seed=6))


def test_the_seed_picks_the_classes_that_get_one_more():
    extras = {balanced_labels(1, range(10), seed).item() for seed in range(60)}
    assert len(extras) >= 8


def test_random_labels_are_uniform():
    counts = Counter(random_labels(4000, (2, 5, 8, 11), seed=0).tolist())
    z = [(counts[label] - 1000) / (4000 * 0.25 * 0.75) ** 0.5 for label in (2, 5, 8, 11)]
    assert max(map(abs, z)) < 3.5, z  # seed 0
