"""Targets are unbiased: they are compared with the closed form of a conditional Gaussian mixture.

Each method draws many batches at six fixed times. For random test functions f, the mean of
`(target - v(x_t, label)) . u f(x_t)` over independent batches must be zero: z < 4 for 20 functions (seed 0). A method
that reuses its references for ever must fail the same test, which shows its power.
"""

import math

import pytest
import torch

from stablevm import draw as draw_module
from stablevm.bank import ClassBank
from stablevm.interpolant import COSINE, LINEAR
from stablevm.objective import FlowMatching, ObjectiveSettings, StableTargetField, StableVM
from tests.helpers.mixtures import make_mixture

pytestmark = pytest.mark.statistical
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
DIMENSION, REFERENCES, ROWS, BATCHES, FUNCTIONS, CLASSES = 4, 8, 48, 150, 20, 2
NULL = CLASSES
CONDITIONAL = [make_mixture(3, DIMENSION, seed, torch.float64) for seed in range(CLASSES)]


def exact_velocity(path, draw, shares=(0.5, 0.5)):
    """The velocity given the label; without label, that of both classes with these shares."""
    x_t, t = draw.x_t, draw.t[0].item()
    labelled = torch.stack([mixture.field(path, x_t, t) for mixture in CONDITIONAL])
    both = type(CONDITIONAL[0])(
        torch.cat([share * m.weights for share, m in zip(shares, CONDITIONAL, strict=True)]),
        torch.cat([m.means for m in CONDITIONAL]),
        torch.cat([m.variances for m in CONDITIONAL]),
    )
    every = torch.cat([labelled, both.field(path, x_t, t)[None]])
    return every[draw.labels, torch.arange(len(x_t))]


def samples(labels, stream):
    drawn = torch.stack([mixture.sample(len(labels), stream) for mixture in CONDITIONAL])
    return drawn[labels, torch.arange(len(labels))].float()


def draw_cfm(protocol, stream):
    labels = torch.randint(CLASSES, (ROWS,), generator=stream)
    return FlowMatching(protocol).draw(samples(labels, stream), labels, stream)


def draw_stf(protocol, stream):
    labels = torch.randint(CLASSES, (ROWS,), generator=stream)
    return StableTargetField(protocol).draw(samples(labels, stream), labels, stream)


def full_bank(stream):
    labels = torch.arange(CLASSES).repeat(REFERENCES)
    bank = ClassBank(CLASSES, REFERENCES, (DIMENSION,))
    bank.insert(samples(labels, stream), labels)
    return bank


def draw_bank_anchors(protocol, stream):
    labels = torch.arange(ROWS) % CLASSES
    return StableVM(full_bank(stream), protocol, anchors="bank").draw(samples(labels, stream), labels, stream)


def draw_batch_anchors(protocol, stream, references=None):
    """A batch so small that the bank keeps all of it: the anchors and their references are independent draws."""
    labels = torch.arange(CLASSES).repeat(2)
    bank = full_bank(stream if references is None else references)
    return StableVM(bank, protocol, anchors="batch").draw(samples(labels, stream), labels, stream)


def draw_stale_references(protocol, stream):
    """The same references in every batch: biased ."""
    return draw_batch_anchors(protocol, stream, references=torch.Generator().manual_seed(5))


METHODS = {
    "cfm": draw_cfm,
    "stf": draw_stf,
    "stablevm, bank anchors": draw_bank_anchors,
    "stablevm, batch anchors": draw_batch_anchors,
}


def largest_z(draw, path, time, monkeypatch, dropout=0.2, shares=(0.5, 0.5)):
    """The largest |z| over the test functions; the batches are the independent observations."""
    monkeypatch.setattr(draw_module, "draw_times", lambda name, path, rows, *_, **__: torch.full((rows,), time))
    protocol = ObjectiveSettings(path=path, label_dropout=dropout, null_class=NULL)
    stream = torch.Generator().manual_seed(0)
    directions = torch.randn(FUNCTIONS, DIMENSION, generator=stream, dtype=torch.float64)
    frequencies = torch.randn(FUNCTIONS, DIMENSION, generator=stream, dtype=torch.float64)
    phases = torch.rand(FUNCTIONS, generator=stream, dtype=torch.float64) * 2 * math.pi
    means = []
    for _ in range(BATCHES):
        drawn = draw(protocol, stream)
        error = drawn.target.double() - exact_velocity(path, drawn, shares)
        value = torch.cos(drawn.x_t.double() @ frequencies.T + phases)
        means.append(((error @ directions.T) * value).mean(0))
    means = torch.stack(means)
    return (means.mean(0) / (means.std(0) / math.sqrt(BATCHES) + 1e-12)).abs().max().item()


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("method", METHODS)
def test_targets_are_unbiased(method, time, monkeypatch):
    assert largest_z(METHODS[method], LINEAR, time, monkeypatch) < 4


@pytest.mark.parametrize("method", METHODS)
def test_targets_are_unbiased_on_the_cosine_path(method, monkeypatch):
    assert largest_z(METHODS[method], COSINE, 0.6, monkeypatch) < 4


def test_stale_references_are_found_out(monkeypatch):
    assert largest_z(draw_stale_references, LINEAR, 0.9, monkeypatch) > 8


def draw_unequal_bank(protocol, stream):
    """Bank anchors, which are uniform over classes, from a bank that holds 8 of one class and 2 of the other."""
    labels = torch.tensor([0] * REFERENCES + [1] * 2)
    bank = ClassBank(CLASSES, REFERENCES, (DIMENSION,))
    return StableVM(bank, protocol, anchors="bank").draw(samples(labels, stream), labels, stream)


def draw_unequal_data(protocol, stream):
    """Batch anchors of data with nine of one class for one of the other, and a bank that holds 8 of each."""
    labels = (torch.rand(2, generator=stream) >= 0.9).long()
    objective = StableVM(full_bank(stream), protocol, anchors="batch", class_shares=torch.tensor([0.9, 0.1]))
    return objective.draw(samples(labels, stream), labels, stream)


@pytest.mark.parametrize("time", [0.5, 0.9])
@pytest.mark.parametrize("draw, shares", [(draw_unequal_bank, (0.5, 0.5)), (draw_unequal_data, (0.9, 0.1))])
def test_targets_without_label_are_unbiased_for_unequal_classes(draw, shares, time, monkeypatch):
    """All labels dropped, 600 batches: z < 4, where weights that ignore the classes' shares gave 7 to 23."""
    monkeypatch.setitem(globals(), "BATCHES", 600)
    assert largest_z(draw, LINEAR, time, monkeypatch, dropout=1.0, shares=shares) < 4


@pytest.mark.parametrize("references_from", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("anchors", ["bank", "batch"])
def test_targets_are_unbiased_wherever_references_begin(references_from, anchors, monkeypatch):
    """At t = 0.5, on both sides of the time and at it."""

    def draw(protocol, stream):
        labels = torch.arange(CLASSES).repeat(2) if anchors == "batch" else torch.arange(ROWS) % CLASSES
        objective = StableVM(full_bank(stream), protocol, anchors=anchors, references_from=references_from)
        return objective.draw(samples(labels, stream), labels, stream)

    assert largest_z(draw, LINEAR, 0.5, monkeypatch) < 4
