"""Steps that are not finite: skipped without an effect, reported with their samples, and counted."""

from types import SimpleNamespace

import pytest
import torch

from stablevm.support.errors import UserError
from stablevm.training.guard import Guard, GuardedAdamW, spread
from stablevm.training.weights import MovingAverage
from tests.helpers.data_sets import one_line

OPTIONS = {"lr": 0.1, "weight_decay": 0.1}
NAN, INF = float("nan"), float("inf")


def layer():
    return torch.nn.ParameterList([torch.ones(3), torch.full((2, 2), 2.0)])


def step(parameters, optimizer, gradient, skip):
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.skip = torch.tensor(skip)
    optimizer.step()


def everything(parameters, optimizer):
    states = [value for parameter in parameters for value in optimizer.state[parameter].values()]
    return [value.clone() for value in [*(parameter.detach() for parameter in parameters), *states]]


def assert_equal(one, other):
    assert len(one) == len(other) > 0
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize("gradient", [NAN, INF, 1e30])
def test_a_skipped_step_never_was(gradient):
    calm, shaken = layer(), layer()
    plain, guarded = GuardedAdamW(calm, **OPTIONS), GuardedAdamW(shaken, **OPTIONS)
    for number, value in enumerate([0.5, -1.0, 2.0]):
        step(calm, plain, value, skip=False)
        step(shaken, guarded, value, skip=False)
        before = everything(shaken, guarded)
        step(shaken, guarded, gradient, skip=True)
        assert_equal(everything(shaken, guarded), before)
        assert_equal(before, everything(calm, plain))
        assert guarded.state[shaken[0]]["step"] == number + 1, "nor is it counted"


def test_a_first_step_that_is_skipped():
    parameters = layer()
    optimizer = GuardedAdamW(parameters, **OPTIONS)
    step(parameters, optimizer, NAN, skip=True)
    assert_equal([parameter.detach() for parameter in parameters], [parameter.detach() for parameter in layer()])
    assert all(not value.any() for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("gradient, skip, moves", [(1.0, False, True), (1.0, True, False), (INF, False, False)])
def test_beside_the_scaler_of_fp16(gradient, skip, moves):
    """Either may ask to skip; the scaler lowers its factor for its own reasons only."""
    parameters, scaler = layer(), torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = GuardedAdamW(parameters, **OPTIONS)
    loss = sum((parameter * gradient).sum() for parameter in parameters)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    optimizer.skip = torch.tensor(skip)
    scaler.step(optimizer)
    scaler.update()
    assert (parameters[0].detach() != 1).all() == moves
    assert scaler.get_scale() == (8 if gradient == 1 else 4)


def test_the_average_stays_where_a_step_was_skipped():
    model = layer()
    average, expected = MovingAverage(model, 0.5), MovingAverage(model, 0.5)
    other = torch.nn.ParameterList([torch.zeros(3), torch.zeros(2, 2)])
    average.update(other, 100, torch.tensor(False))
    assert_equal([p.data for p in average.model], [p.data for p in model])
    average.update(other, 100, torch.tensor(True))
    expected.update(other, 100)
    assert_equal([p.data for p in average.model], [p.data for p in expected.model])


@pytest.mark.parametrize("loss", [NAN, INF, -INF, 2.5])
def test_a_bad_loss_spreads_over_the_gradient(loss):
    """The gradient of an infinite loss may be finite, and the processes agree by their gradients."""
    weight = torch.tensor(1.0, requires_grad=True)
    spread(weight + loss).backward()
    assert weight.grad == 1 if loss == 2.5 else weight.grad.isnan()


class Alone(SimpleNamespace):
    """The part of an Accelerator that the guard uses: sums over one process."""

    scaler = None

    def reduce(self, value, reduction):
        assert reduction == "sum"
        return value

    def gather(self, value):
        return value


def guard(limit=3, **attributes):
    return Guard(Alone(**attributes), limit)


def add(one, number, loss=1.0, norm=1.0, row_losses=(1.0, 1.0)):
    rows = torch.arange(len(row_losses)) + 10
    one.add(number, torch.tensor(loss), torch.tensor(norm), rows, torch.tensor(row_losses))


def test_good_steps_are_taken():
    one = guard()
    assert one.review() == ([], [])
    add(one, 1)
    add(one, 2)
    assert one.review() == ([True, True], []) and one.review() == ([], [])


def test_a_fault_names_the_rows_that_are_not_finite_first():
    one = guard()
    add(one, 7, loss=NAN, norm=NAN, row_losses=(1, 1, INF, 1, 1, 1, NAN))
    add(one, 8, norm=INF)
    taken, (first, second) = one.review()
    assert taken == [False, False]
    assert first.to_row() == {"step": 7, "fault": "loss", "rows": [12, 16, 10, 11, 13], "samples": 7}
    assert str(first) == "step 7: the loss is not finite; skipped. Rows of the data set: 12, 16, 10, 11, 13, ..."
    assert str(second) == "step 8: the gradient norm is not finite; skipped. Rows of the data set: 10, 11"


@pytest.mark.parametrize("reviews", [1, 2, 6])
def test_too_many_in_a_row_end_the_run(reviews, tmp_path):
    """However often one looks; good steps in between start the count again."""
    one, losses = guard(), [NAN, NAN, 1.0, NAN, NAN, NAN]
    with pytest.raises(UserError) as error:
        for number, loss in enumerate(losses, start=1):
            one.check(tmp_path)
            add(one, number, loss)
            if number % (len(losses) // reviews) == 0:
                one.review()
        one.check(tmp_path)
    assert "in 3 steps in a row (--max-bad-steps): 4, 5, 6; there is no checkpoint yet" in one_line(error)


def test_the_newest_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoints" / "0000042").mkdir(parents=True)
    one = guard(limit=1)
    add(one, 50, NAN)
    one.review()
    with pytest.raises(UserError, match="the newest checkpoint is of step 42; resume from it"):
        one.check(tmp_path)


@pytest.mark.parametrize(
    "factor, loss, faults, streak",
    [(2.0, 1.0, 0, [1, 3]), (1.0, 1.0, 0, [1, 3]), (0.5, 1.0, 1, [1, 2, 3]), (2.0, NAN, 1, [1, 2, 3])],
)
def test_overflows_of_the_scaler_are_no_faults(factor, loss, faults, streak):
    """Unless its factor is below 1, or the loss itself is bad. They neither lengthen nor break a row of bad steps."""
    scaler = torch.amp.GradScaler("cpu", init_scale=factor)
    one = guard(limit=9, scaler=scaler)
    add(one, 1, NAN)
    one.review()
    add(one, 2, loss, norm=INF)
    taken, found = one.review()
    assert taken == [False] and len(found) == faults
    add(one, 3, NAN)
    one.review()
    assert one.in_a_row == streak
