"""The learning rate over the steps, against values worked out by hand."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from stablevm.training.config import TrainConfig
from stablevm.training.step import rate_at

PLAIN = TrainConfig(exp_name="run", data_dir=Path("data"), learning_rate=2e-3)


def rates(steps, **options):
    return [rate_at(replace(PLAIN, **options), step, steps) for step in range(steps)]


def test_constant():
    assert rates(5) == [2e-3] * 5


def test_warmup_rises_linearly_and_never_is_zero():
    assert rates(6, lr_warmup_steps=4) == pytest.approx([5e-4, 1e-3, 1.5e-3, 2e-3, 2e-3, 2e-3], rel=1e-12)


def test_cosine_falls_along_a_half_cosine():
    share = [0.05 + 0.95 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert rates(8, lr_schedule="cosine") == pytest.approx([2e-3 * value for value in share], rel=1e-12)
    assert rate_at(replace(PLAIN, lr_schedule="cosine"), 4, 8) == pytest.approx(2e-3 * 0.525, rel=1e-12)


def test_cosine_ends_at_five_percent():
    assert rates(10_000, lr_schedule="cosine")[-1] == pytest.approx(0.05 * 2e-3, rel=1e-5)
    assert rate_at(replace(PLAIN, lr_schedule="cosine"), 12_000, 10_000) == pytest.approx(0.05 * 2e-3, rel=1e-12)


def test_cosine_begins_where_the_warmup_ends():
    values = rates(12, lr_schedule="cosine", lr_warmup_steps=4)
    assert values[:4] == pytest.approx([5e-4, 1e-3, 1.5e-3, 2e-3], rel=1e-12)
    assert values[4:] == pytest.approx(rates(8, lr_schedule="cosine"), rel=1e-12)


def test_a_warmup_longer_than_the_run_only_rises():
    values = rates(3, lr_schedule="cosine", lr_warmup_steps=10)
    assert values == pytest.approx([2e-4, 4e-4, 6e-4], rel=1e-12)
