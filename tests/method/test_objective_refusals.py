"""What objectives refuse: batches, labels, settings, slots and anchors that can't be."""

import warnings

import pytest
import torch

from stablevm.bank import ClassBank
from stablevm.objective import FlowMatching, ObjectiveSettings, StableTargetField, StableVM, squared_error
from stablevm.support.errors import UserError
from stablevm.support.rng import RowGenerators
from tests.helpers.draws import CLASSES, ROWS, SHAPE, same_stream


def test_mistakes_are_reported(batch):
    latents, labels = batch
    with pytest.raises(UserError, match="prediction 'eps': expected v or x"):
        ObjectiveSettings(prediction="eps")
    with pytest.raises(UserError, match=r"label_dropout 2: expected a probability in \[0, 1\]"):
        ObjectiveSettings(label_dropout=2, null_class=3)
    with pytest.raises(UserError, match=r"label_dropout 0\.1 needs null_class"):
        ObjectiveSettings(label_dropout=0.1)
    bank = ClassBank(CLASSES, 2, SHAPE)
    with pytest.raises(UserError, match="anchors 'fresh': expected bank or batch"):
        StableVM(bank, anchors="fresh")
    with pytest.raises(UserError, match="pool_size 0: expected at least 1"):
        StableVM(bank, pool_size=0)
    with pytest.raises(UserError, match="num_classes 0"):
        ClassBank(0, 2, SHAPE)
    with pytest.raises(ValueError, match="give pool_generator"):
        StableVM(bank).draw(latents, labels, RowGenerators.for_keys("x", positions=range(ROWS)))


def spoiled(values, row, value):
    values = values.clone()
    values[row] = value
    return values


MISTAKES = {
    "one-hot labels": (lambda x, y: (x, torch.nn.functional.one_hot(y)), r"int64 \(12, 3\).*argmax"),
    "labels as numbers": (lambda x, y: (x, y.float()), r"float32 \(12,\): expected torch.int64"),
    "short integers": (lambda x, y: (x, y.to(torch.uint8)), "labels are torch.uint8"),
    "too few labels": (lambda x, y: (x, y[:5]), r"\(5,\): expected torch.int64 \(12,\)"),
    "no labels": (lambda x, y: (x, None), "labels are None: .* zeros"),
    "a list": (lambda x, y: (x, y.tolist()), "labels are a list"),
    "a class too many": (lambda x, y: (x, y + 1), "labels range from 1 to 3: this bank has classes 0 to 2"),
    "a negative class": (lambda x, y: (x, y - 1), "labels range from -1 to 1"),
    "another device": (lambda x, y: (x, y.to("meta")), "latents are on cpu, labels on meta, the bank on cpu"),
    "other latents": (lambda x, y: (x[:, :1], y), r"latents are \(12, 1, 3, 3\): .* shape \(2, 3, 3\)"),
    "bytes": (lambda x, y: (x.byte(), y), "latents are torch.uint8"),
    "nothing": (lambda x, y: (x[:0], y[:0]), "one sample or more"),
    "NaN": (lambda x, y: (spoiled(x, 4, torch.nan), y), "NaN or infinity, first in row 4"),
}


@pytest.mark.parametrize("spoil, message", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_batch_that_does_not_fit_is_refused_and_leaves_the_bank_alone(spoil, message, batch):
    bank = ClassBank(CLASSES, 4, SHAPE)
    with pytest.raises(UserError, match=message):
        StableVM(bank).draw(*spoil(*batch), same_stream())
    assert not bank.counts.any() and not bank.entries.any()


@pytest.mark.parametrize("objective", [FlowMatching(), StableTargetField(), StableVM(ClassBank(CLASSES, 4, SHAPE))])
def test_labels_ids_and_streams_of_another_kind_are_refused(objective, batch):
    latents, labels = batch
    with pytest.raises(UserError, match=r"labels are torch.float32"):
        objective.draw(latents, labels.float(), same_stream())
    with pytest.raises(UserError, match=r"ids are torch.int64 \(3,\)"):
        objective.draw(latents, labels, same_stream(), ids=torch.arange(3))
    with pytest.raises(UserError, match=r"generator None: expected a torch.Generator"):
        objective.draw(latents, labels, None)


def test_objectives_that_contradict_themselves_are_refused():
    with pytest.raises(UserError, match="path 'linear': expected an Interpolant"):
        ObjectiveSettings(path="linear")
    with pytest.raises(UserError, match="weighting 'lognorm': expected one of uniform"):
        ObjectiveSettings(weighting="lognorm")
    bank = ClassBank(CLASSES, 4, SHAPE)
    with pytest.raises(UserError, match="null class 0 is one of the bank's classes, 0 to 2: give 3"):
        StableVM(bank, ObjectiveSettings(null_class=0))
    with pytest.raises(UserError, match=r"class_shares are \(2,\): expected \(3,\)"):
        StableVM(bank, class_shares=torch.ones(2))


def test_errors_of_other_shapes_are_refused():
    with pytest.raises(UserError, match=r"prediction is \(8,\), the target \(8, 1\)"):
        squared_error(torch.zeros(8), torch.zeros(8, 1))


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan")])
def test_a_time_outside_the_path_is_refused(wrong):
    with pytest.raises(UserError, match=r"references_from .*: expected a time in \[0, 1\]"):
        StableVM(ClassBank(1, 2, (1,)), references_from=wrong)
    with pytest.raises(UserError, match=r"references_from .*: expected a time in \[0, 1\]"):
        StableTargetField(references_from=wrong)


@pytest.mark.parametrize("shares", [[1.0, -0.1, 1.0], [1.0, float("nan"), 1.0]])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(UserError, match=r"class_shares \[1.0, .*: expected finite numbers, 0 or more"):
        StableVM(ClassBank(CLASSES, 4, SHAPE), class_shares=torch.tensor(shares))


@pytest.mark.parametrize(
    "slots, message",
    [
        (torch.zeros(3, dtype=torch.int64), r"slots are torch.int64 \(3,\): expected torch.int64 \(12,\)"),
        (torch.zeros(ROWS), r"slots are torch.float32 \(12,\)"),
        (torch.full((ROWS,), 13), "slots range from 13 to 13: expected 0 to 12"),
        ([0] * ROWS, "slots are a list"),
    ],
)
def test_slots_that_are_none_are_refused(slots, message, batch):
    with pytest.raises(UserError, match=message):
        StableVM(ClassBank(CLASSES, 4, SHAPE)).draw(*batch, same_stream(), slots=slots)


@pytest.mark.parametrize("anchors", [torch.tensor([True, False]), torch.tensor([0, 12]), torch.tensor([-1]), [0]])
def test_anchors_that_are_no_positions_are_refused(anchors, batch):
    with pytest.raises(UserError, match="anchors"):
        StableTargetField().draw(*batch, same_stream(), anchors=anchors)


def test_a_draw_without_ids_after_one_with_ids_warns_once(batch):
    latents, labels = batch[:2]
    objective, generator = StableVM(ClassBank(10, 8, shape=latents.shape[1:])), torch.Generator().manual_seed(0)
    ids = torch.arange(len(latents))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective.draw(latents, labels, generator)
        objective.draw(latents, labels, generator, ids=ids)
    with pytest.warns(UserWarning, match="given no ids, earlier ones were") as found:
        for _ in range(2):
            objective.draw(latents, labels, generator)
    assert len(found) == 1 and found[0].filename == __file__
