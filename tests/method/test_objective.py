"""Draws: what they hold, and the exact facts about their targets."""

import copy

import pytest
import torch

import stablevm.objective as module
from stablevm.bank import NO_ID, ClassBank
from stablevm.interpolant import COSINE, LINEAR
from stablevm.objective import FlowMatching, ObjectiveSettings, StableTargetField, StableVM, squared_error
from stablevm.support.rng import RowGenerators
from stablevm.times import draw_times
from tests.helpers.draws import CLASSES, ROWS, SHAPE, same_stream

CONDITIONAL = {"label_dropout": 0.3, "null_class": CLASSES}


def exact_velocity(path, draw, samples, weights=None):
    """The velocity of the empirical distribution of `samples` with these weights (equal ones if None), in float64."""
    at = path.coefficients(draw.t.double()[:, None])
    x_t, points = draw.x_t.double().flatten(1), samples.double().flatten(1)
    distance = (x_t[:, None] - at.alpha[..., None] * points).square().sum(-1)
    prior = torch.ones(len(points)) if weights is None else weights
    mean = (-distance / (2 * at.sigma.square()) + prior.double().log()).softmax(-1) @ points
    return (at.d_alpha * mean + at.d_sigma * (x_t - at.alpha * mean) / at.sigma).reshape(draw.x_t.shape)


@pytest.mark.parametrize("path", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["v", "x"])
def test_one_reference_is_flow_matching_bit_for_bit(path, prediction, batch):
    latents, labels = batch[0][:CLASSES], batch[1][:CLASSES]
    protocol = ObjectiveSettings(path=path, prediction=prediction)
    plain = FlowMatching(protocol).draw(latents, labels, same_stream())
    bank = ClassBank(CLASSES, 1, SHAPE)
    stable = StableVM(bank, protocol, anchors="batch").draw(latents, labels, same_stream())
    for name in ("x_t", "t", "labels", "target", "x0", "noise"):
        assert torch.equal(getattr(plain, name), getattr(stable, name)), name
    assert torch.equal(stable.ess, torch.ones(CLASSES))


@pytest.mark.parametrize("anchors", ["bank", "batch"])
def test_whole_data_as_references_gives_the_exact_velocity(anchors, batch):
    latents, labels = batch
    bank = ClassBank(CLASSES, ROWS, SHAPE)
    draw = StableVM(bank, anchors=anchors).draw(latents, labels, same_stream(), ids=torch.arange(ROWS))
    for label in range(CLASSES):
        mine = draw.labels == label
        part = draw.part(mine)
        exact = exact_velocity(LINEAR, part, latents[labels == label])
        torch.testing.assert_close(part.target.double(), exact, rtol=1e-4, atol=1e-4)


def test_dropped_labels_are_weighed_against_all_classes(batch):
    latents, labels = batch
    protocol = ObjectiveSettings(label_dropout=1.0, null_class=CLASSES)
    draw = StableVM(ClassBank(CLASSES, ROWS, SHAPE), protocol, anchors="batch").draw(latents, labels, same_stream())
    assert (draw.labels == CLASSES).all()
    torch.testing.assert_close(draw.target.double(), exact_velocity(LINEAR, draw, latents), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("anchors, shares", [("bank", [0.5, 0.5]), ("batch", [0.75, 0.25])])
def test_without_label_classes_count_as_often_as_they_are_anchors(anchors, shares, batch):
    """Bank anchors are uniform over the classes that have entries, batch anchors as frequent as in the data."""
    latents, labels = batch[0], torch.tensor([0] * 9 + [2] * 3)
    bank = ClassBank(CLASSES, 4, SHAPE)
    protocol = ObjectiveSettings(label_dropout=1.0, null_class=CLASSES)
    draw = StableVM(bank, protocol, anchors=anchors).draw(latents, labels, same_stream(), ids=torch.arange(ROWS))
    stays = draw.ids >= 5  # of nine samples of class 0, the last four
    draw = draw.part(stays)
    weights = torch.tensor([shares[0] / 4] * 4 + [shares[1] / 3] * 3)
    exact = exact_velocity(LINEAR, draw, latents[5:], weights)
    torch.testing.assert_close(draw.target.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_a_copy_of_the_anchor_is_no_reference(dropout, batch):
    """Anchors that the bank holds by id, though their slots say that they did not stay."""
    latents, labels, ids = batch[0], torch.zeros(ROWS, dtype=torch.int64), torch.arange(ROWS)
    bank = ClassBank(1, ROWS, SHAPE)
    bank.insert(latents, labels, ids)
    elsewhere = torch.full_like(ids, bank.discarded_slot)
    objective = StableVM(bank, ObjectiveSettings(label_dropout=dropout, null_class=1), anchors="batch")
    draw = objective.draw(latents, labels, same_stream(), ids=ids, slots=elsewhere)
    torch.testing.assert_close(draw.target.double(), exact_velocity(LINEAR, draw, latents), rtol=1e-4, atol=1e-4)


def test_stable_target_field_without_labels_weighs_the_whole_set(batch):
    latents, labels = batch
    dropped = ObjectiveSettings(label_dropout=1.0, null_class=CLASSES)
    draws = [StableTargetField(dropped).draw(latents, labels, same_stream()),
             StableTargetField().draw(latents, None, same_stream())]  # fmt: skip
    for draw in draws:
        torch.testing.assert_close(draw.target.double(), exact_velocity(LINEAR, draw, latents), rtol=1e-4, atol=1e-4)
    assert (draws[0].labels == CLASSES).all() and (draws[1].labels == 0).all()


def test_stable_target_field_weighs_the_set_by_class(batch):
    latents, labels = batch
    draw = StableTargetField().draw(latents, labels, same_stream(), anchors=torch.tensor([0, 3, 6]))
    exact = exact_velocity(LINEAR, draw, latents[labels == 0])
    torch.testing.assert_close(draw.target.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_predicting_data_aims_at_the_posterior_mean(path, batch):
    latents, labels = batch
    draws = [
        StableVM(ClassBank(CLASSES, ROWS, SHAPE), ObjectiveSettings(path=path, prediction=kind), anchors="batch").draw(
            latents, labels, same_stream()
        )
        for kind in ("v", "x")
    ]
    mean = path.convert(draws[0].target.double(), draws[0].x_t.double(), draws[0].t.double(), "velocity", "x0")
    torch.testing.assert_close(draws[1].target.double(), mean, rtol=1e-4, atol=1e-4)


def test_label_dropout(stream):
    """The share of dropped labels: z < 4 over 5,000 rows, the fixture's seed."""
    rows = 5000
    labels = torch.zeros(rows, dtype=torch.int64)
    draw = FlowMatching(ObjectiveSettings(**CONDITIONAL)).draw(torch.zeros(rows, 1), labels, stream)
    dropped = draw.labels == CLASSES
    assert torch.equal(draw.labels[~dropped], labels[~dropped])
    assert abs(dropped.float().mean() - 0.3) / (0.3 * 0.7 / rows) ** 0.5 < 4


def test_anchors_are_identified_by_their_ids(batch):
    latents, labels = batch
    ids = torch.arange(ROWS) + 100
    bank = ClassBank(CLASSES, ROWS, SHAPE)
    draw = StableVM(bank, anchors="bank").draw(latents, labels, same_stream(), ids=ids)
    assert torch.equal(draw.x0, latents[draw.ids - 100]) and torch.equal(draw.labels, labels[draw.ids - 100])
    fresh = StableVM(bank, anchors="batch").draw(latents, labels, same_stream(), ids=ids)
    assert torch.equal(fresh.ids, ids) and torch.equal(fresh.x0, latents)
    assert (FlowMatching().draw(latents, labels, same_stream()).ids == NO_ID).all()
    assert torch.equal(FlowMatching().draw(latents, labels, same_stream(), ids=ids).ids, ids)
    chosen = StableTargetField().draw(latents, labels, same_stream(), anchors=torch.tensor([2, 7]), ids=ids)
    assert chosen.ids.tolist() == [102, 107]


@pytest.mark.parametrize("weighting", ["uniform", "lognormal", "logit_normal"])
@pytest.mark.parametrize("path", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_times_are_those_of_the_weighting(weighting, path, batch):
    draw = FlowMatching(ObjectiveSettings(path=path, weighting=weighting)).draw(*batch, same_stream())
    assert torch.equal(draw.t, draw_times(weighting, path, ROWS, same_stream()))
    assert torch.equal(draw.x_t, path.interpolate(draw.x0, draw.noise, draw.t))


def test_three_lines_in_somebody_elses_loop(stream):
    """The example at the top of the module, run as it stands."""
    example = [line[4:] for line in module.__doc__.splitlines() if line.startswith("    ")]
    assert len(example) == 3
    latents, labels = torch.randn(5, 4, 32, 32, generator=stream), torch.arange(5)
    scale = torch.ones((), requires_grad=True)
    names = {**vars(module), "latents": latents, "labels": labels, "generator": stream,
             "model": lambda x_t, t, labels: scale * x_t}  # fmt: skip
    exec("\n".join(example), names)
    names["loss"].backward()
    assert names["loss"].shape == () and scale.grad.isfinite()


@pytest.mark.parametrize("anchors", ["bank", "batch"])
def test_a_row_does_not_depend_on_how_the_batch_is_split(anchors, batch):
    latents, labels = batch
    bank = ClassBank(CLASSES, ROWS, SHAPE)
    slots = bank.insert(latents, labels)
    objective = StableVM(bank, ObjectiveSettings(**CONDITIONAL), anchors=anchors, pool_size=7)

    def draw(rows):
        streams = RowGenerators.for_keys("test", positions=range(rows.start, rows.stop))
        return objective.draw(latents[rows], labels[rows], streams, slots=slots[rows], pool_generator=same_stream())

    whole, halves = draw(slice(0, ROWS)), [draw(slice(0, 5)), draw(slice(5, ROWS))]
    for name in ("x_t", "t", "labels", "x0", "noise", "ids"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(half, name) for half in halves])), name
    for name in ("target", "ess"):
        torch.testing.assert_close(getattr(whole, name), torch.cat([getattr(half, name) for half in halves]))


def test_half_precision_bank_still_gives_nearly_the_same_target(batch):
    latents, labels = batch
    targets = [
        StableVM(ClassBank(CLASSES, ROWS, SHAPE, dtype=dtype), anchors="batch").draw(latents, labels, same_stream())
        for dtype in (torch.float32, torch.float16)
    ]
    torch.testing.assert_close(targets[0].target, targets[1].target, rtol=0.01, atol=0.01)


def test_squared_error_is_a_mean_per_sample():
    prediction, target = (
        torch.zeros(2, 2, 2, dtype=torch.bfloat16),
        torch.tensor([[[1.0, 1], [1, 1]], [[0, 2], [0, 0]]]),
    )
    assert squared_error(prediction, target).tolist() == [1.0, 1.0]
    assert squared_error(prediction, target).dtype == torch.float32


@pytest.mark.parametrize("anchors", ["bank", "batch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_latents_of_any_precision_make_float32_draws(anchors, dtype, batch):
    """Latents as autoencoders give them under autocast; their gradients, which would stay in the bank, are cut."""
    latents, labels = batch[0].to(dtype), batch[1]
    objective = StableVM(ClassBank(CLASSES, 4, SHAPE), anchors=anchors)
    draw = objective.draw(latents.requires_grad_(), labels, same_stream())
    expected = StableVM(ClassBank(CLASSES, 4, SHAPE), anchors=anchors).draw(latents.float(), labels, same_stream())
    for name in ("x_t", "target", "x0"):
        value = getattr(draw, name)
        assert value.dtype == torch.float32 and not value.requires_grad and torch.equal(value, getattr(expected, name))
    assert not objective.bank.entries.requires_grad


def targets_from(references_from, dropout=0.3, rows=40):
    """StableVM's draw of a full bank, and flow matching's of the same anchors and noise."""
    stream = torch.Generator().manual_seed(3)
    latents, labels = torch.randn(rows, *SHAPE, generator=stream), torch.arange(rows) % CLASSES
    protocol = ObjectiveSettings(label_dropout=dropout, null_class=CLASSES)
    objective = StableVM(ClassBank(CLASSES, rows, SHAPE), protocol, anchors="batch", references_from=references_from)
    plain = FlowMatching(protocol).draw(latents, labels, same_stream())
    return objective.draw(latents, labels, same_stream()), plain


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_below_the_time_the_target_is_plain_and_above_it_the_same_as_ever(dropout):
    ever, plain = targets_from(0.0, dropout)
    late, _ = targets_from(0.7, dropout)
    below = plain.t < 0.7
    assert below.any() and (~below).any() and torch.equal(ever.x_t, late.x_t)
    assert torch.equal(late.target[below], plain.target[below]) and (late.ess[below] == 1).all()
    torch.testing.assert_close(late.target[~below], ever.target[~below])
    never, _ = targets_from(1.0, dropout)
    assert torch.equal(never.target, plain.target)


def test_rows_below_the_time_are_not_weighed_at_all(monkeypatch):
    """No posterior is computed if all times are earlier, and otherwise only for the later rows."""
    seen, weigh = [], module.posterior

    def watched(path, x0, *rest, **more):
        seen.append(len(x0))
        return weigh(path, x0, *rest, **more)

    monkeypatch.setattr(module, "posterior", watched)
    _, plain = targets_from(0.7, 0.0)
    assert seen == [int((plain.t >= 0.7).sum())]
    targets_from(1.0, 0.0)
    assert len(seen) == 1


@pytest.mark.parametrize("references_from", [0.7, 1.0])
def test_stable_target_field_has_references_from_a_time_on(references_from, batch):
    latents, labels = batch
    plain = FlowMatching().draw(latents, labels, same_stream())
    below = plain.t < references_from
    field, whole = StableTargetField(references_from=references_from), StableTargetField()
    keep = ~torch.eye(ROWS, dtype=torch.bool)
    blocks = [(latents[:5], keep[:, :5]), (latents[5:], keep[:, 5:])]
    draws = {
        "classes": [each.draw(latents, labels, same_stream()) for each in (field, whole)],
        "blocks": [each.draw_over_blocks(latents, blocks, same_stream()) for each in (field, whole)],
    }
    for late, ever in draws.values():
        assert torch.equal(late.target[below], plain.target[below]) and (late.ess[below] == 1).all()
        torch.testing.assert_close(late.target[~below], ever.target[~below])


@pytest.mark.parametrize("objective", [FlowMatching(), StableTargetField(), StableVM(ClassBank(CLASSES, 4, SHAPE))])
def test_draws_are_the_same_in_autocast_and_usable_after_inference_mode(objective, batch):
    expected = copy.deepcopy(objective).draw(*batch, same_stream())
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = objective.draw(*batch, same_stream())
    assert torch.equal(found.target, expected.target) and found.target.dtype == torch.float32
    objective.draw(*batch, same_stream())
