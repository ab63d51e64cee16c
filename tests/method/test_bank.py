"""The ring against plain queues, and its guarantees about memory, copies and the pool."""

from collections import deque

import numpy as np
import pytest
import torch

from stablevm.bank import NO_ID, ClassBank
from stablevm.support.errors import UserError

CLASSES, CAPACITY = 3, 4


def filled(labels, ids=None, capacity=CAPACITY):
    """A bank whose samples are their ids (or positions)."""
    bank = ClassBank(CLASSES, capacity, (1,))
    labels = torch.tensor(labels)
    ids = torch.arange(len(labels)) if ids is None else torch.tensor(ids)
    bank.insert(ids[:, None].float(), labels, ids)
    return bank


def contents(bank):
    """Per class, the values from oldest to newest."""
    state = bank.state_dict()
    rows = []
    for label in range(bank.num_classes):
        count, head = int(bank.counts[label]), int(state["heads"][label])
        start = head if count == bank.capacity else 0
        slots = [(start + i) % bank.capacity for i in range(count)]
        rows.append(bank.entries[label, slots, 0].tolist())
    return rows


class QueueModel:
    """What the bank should do, one sample at a time, with distinct ids in each call."""

    def __init__(self):
        self.queues = [deque() for _ in range(CLASSES)]
        self.seen = [0] * CLASSES

    def insert(self, values, labels, ids):
        known = [any(entry[0] == i for entry in self.queues[c]) for c, i in zip(labels, ids, strict=True)]
        for value, label, i, is_known in zip(values, labels, ids, known, strict=True):
            self.seen[label] += 1
            if is_known:
                for entry in self.queues[label]:
                    if entry[0] == i:
                        entry[1] = value
        for value, label, i, is_known in zip(values, labels, ids, known, strict=True):
            if not is_known:
                self.queues[label].append([i, value])
                if len(self.queues[label]) > CAPACITY:
                    self.queues[label].popleft()

    def contents(self):
        return [[value for _, value in queue] for queue in self.queues]


@pytest.mark.parametrize("with_ids", [True, False])
def test_equals_plain_queues(with_ids, stream):
    bank, model = ClassBank(CLASSES, CAPACITY, (1,)), QueueModel()
    storage = bank.entries.data_ptr()
    for call in range(300):
        size = int(torch.randint(1, 12, (), generator=stream))
        labels = torch.randint(CLASSES, (size,), generator=stream)
        ids = torch.randperm(40, generator=stream)[:size] if with_ids else torch.arange(size) + 1000 * (call + 1)
        values = torch.rand(size, 1, generator=stream)
        slots = bank.insert(values, labels, ids if with_ids else None)
        model.insert(values[:, 0].tolist(), labels.tolist(), ids.tolist())
        assert contents(bank) == model.contents()
        assert bank.counts.tolist() == [len(queue) for queue in model.queues] and bank.seen.tolist() == model.seen
        stays = [value in model.contents()[label] for value, label in zip(values[:, 0].tolist(), labels, strict=True)]
        assert (slots != bank.discarded_slot).tolist() == stays
        assert torch.equal(bank.gather(slots)[stays], values[stays])
        if with_ids:
            assert torch.equal(bank.ids_at(slots)[stays], ids[stays])
    assert bank.entries.data_ptr() == storage, "insertion must not allocate new storage"


def test_slots_say_where_each_sample_went():
    bank = ClassBank(CLASSES, CAPACITY, (1,))
    labels = torch.tensor([0] * 6 + [2])
    slots = bank.insert(torch.arange(7.0)[:, None], labels)
    assert (slots[:2] == bank.discarded_slot).all(), "of six, the first two do not stay"
    assert bank.gather(slots[2:]).flatten().tolist() == [2, 3, 4, 5, 6]
    assert bank.counts.tolist() == [4, 0, 1] and bank.seen.tolist() == [6, 0, 1]


def test_known_sample_is_refreshed_where_it_stands():
    bank = filled([0, 0, 0])
    slots = bank.insert(torch.tensor([[7.0]]), torch.tensor([0]), torch.tensor([1]))
    assert slots.tolist() == [1] and contents(bank)[0] == [0, 7, 2]


def test_storage_may_be_half_precision(stream):
    bank = ClassBank(1, 2, (5,), dtype=torch.float16)
    sample = torch.randn(1, 5, generator=stream)
    bank.insert(sample, torch.tensor([0]))
    assert bank.entries.dtype == torch.float16 and torch.equal(bank.entries[0, 0], sample[0].half())


def largest_allocation(run):
    """Bytes of the largest tensor that torch allocates during `run`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    return max(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_step_allocates_for_its_batch_not_for_the_bank(dtype, stream):
    batch, capacity, width = 8, 64, 16
    samples, ids = torch.randn(batch, width, generator=stream), torch.arange(batch)
    labels, uniforms = torch.zeros_like(ids), torch.rand(batch, 2, generator=stream)

    def step(bank):
        slots = bank.insert(samples, labels, ids)
        bank.is_reference(labels, slots, ids)
        bank.gather(bank.draw(uniforms)[1])

    largest = {}
    for classes in (2, 200):
        bank = ClassBank(classes, capacity, (width,), dtype=dtype)
        storage = [each.data_ptr() for each in (bank.entries, bank.ids, bank.counts, bank.seen)]
        largest[classes] = largest_allocation(lambda bank=bank: [step(bank) for _ in range(3)])
        assert [each.data_ptr() for each in (bank.entries, bank.ids, bank.counts, bank.seen)] == storage
    assert largest[200] == largest[2] == batch * capacity * 8, "the ids of each row's class"


def test_state_is_exact(stream):
    bank = filled([0, 1, 2, 0, 0, 0, 0])
    other = ClassBank(CLASSES, CAPACITY, (1,))
    other.load_state_dict(bank.state_dict())
    more = torch.rand(5, 1, generator=stream), torch.tensor([0, 0, 1, 2, 2]), torch.arange(5) + 3
    for each in (bank, other):
        each.insert(*more)
    for name, value in bank.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_state_is_a_copy():
    bank = filled([0, 1, 2])
    state = bank.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    bank.insert(torch.full((2, 1), 9.0), torch.tensor([0, 1]), torch.tensor([0, 7]))
    for name, value in before.items():
        assert torch.equal(state[name], value), name


def test_state_of_another_bank_is_refused():
    state = filled([0, 1, 2]).state_dict()
    with pytest.raises(UserError, match=r"saved bank is \(3, 4, 1\).*this run's is \(3, 5, 1\)"):
        ClassBank(CLASSES, 5, (1,)).load_state_dict(state)
    with pytest.raises(UserError, match=r"torch.float32, this run's is .* torch.float16"):
        ClassBank(CLASSES, CAPACITY, (1,), dtype=torch.float16).load_state_dict(state)


def test_draw_is_uniform_over_classes_then_entries(stream):
    """z < 4 for each entry's count among 40,000 draws, fixture's seed; class 1 is empty and never drawn."""
    bank, draws = filled([0, 2, 2, 2]), 40_000
    labels, slots = bank.draw(torch.rand(draws, 2, generator=stream))
    assert torch.equal(labels, slots // CAPACITY)
    expected = {0: 1 / 2, 2 * CAPACITY: 1 / 6, 2 * CAPACITY + 1: 1 / 6, 2 * CAPACITY + 2: 1 / 6}
    assert set(slots.tolist()) == set(expected)
    for slot, share in expected.items():
        z = ((slots == slot).sum() - draws * share) / (draws * share * (1 - share)) ** 0.5
        assert abs(z) < 4


def test_draw_at_the_ends_of_the_interval():
    almost_one = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    labels, slots = filled([0, 2, 2]).draw(torch.stack([torch.zeros(2), almost_one.expand(2)]))
    assert labels.tolist() == [0, 2] and slots.tolist() == [0, 2 * CAPACITY + 1]


def test_pool_draws_every_entry_alike(stream):
    """Draws of one from entries of unequal classes: z < 4 for each entry over 4,000 draws (the fixture's seed)."""
    bank, draws = filled([0, 2, 2, 2]), 4000
    first = torch.stack([bank.draw_pool(1, stream)[0][0] for _ in range(draws)])
    for slot in (0, 2 * CAPACITY, 2 * CAPACITY + 1, 2 * CAPACITY + 2):
        assert abs((first == slot).sum() - draws / 4) / (draws * 0.25 * 0.75) ** 0.5 < 4


def test_pool_is_without_replacement_and_says_what_is_filled(stream):
    bank = filled([0, 0, 2])
    slots, full = bank.draw_pool(100, stream)
    assert len(slots) == CLASSES * CAPACITY and len(set(slots.tolist())) == len(slots)
    assert sorted(slots[full].tolist()) == [0, 1, 2 * CAPACITY]


def test_references_exclude_the_anchor_its_copies_and_empty_slots():
    bank = filled([0, 0, 0, 2])
    labels, slots = torch.tensor([0, 0, 2]), torch.tensor([0, bank.discarded_slot, 2 * CAPACITY])
    ids = torch.tensor([0, 2, NO_ID])
    assert bank.is_reference(labels, slots, ids).tolist() == [
        [False, True, True, False],  # itself
        [True, True, False, False],  # not in the bank by slot, but a copy of it by id
        [False, False, False, False],  # the only one of its class
    ]


def test_of_a_known_sample_that_comes_twice_at_once_the_last_one_stays():
    """Writes to one slot in one call have no order on a GPU: all but the last go where nothing is kept."""
    bank = ClassBank(2, 3, (1,))
    bank.insert(torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1]), torch.tensor([7, 8]))
    slots = bank.insert(torch.tensor([[3.0], [4.0], [5.0]]), torch.tensor([0, 1, 0]), torch.tensor([7, 8, 7]))
    assert slots.tolist() == [bank.discarded_slot, 3, 0]
    assert bank.entries[:, 0, 0].tolist() == [5.0, 4.0] and bank.counts.tolist() == [1, 1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 4, (2,)), "num_classes 0: expected a whole number, 1 or more"),
        ((3, 2.0, (2,)), "capacity 2.0"),
        ((3, 4, 2), r"shape 2, dtype torch.float32: expected a shape such as \(4, 32, 32\)"),
        ((3, 4, (2, -3)), r"shape \(2, -3\), dtype torch.float32: expected a shape"),
        ((3, 4, (2.5,)), r"shape \(2.5,\), dtype torch.float32"),
        ((3, 4, ("2",)), r"shape \('2',\), dtype torch.float32"),
        ((3, 4, (2,), torch.int64), r"shape \(2,\), dtype torch.int64"),
        ((3, 4, (2,), "float16"), r"shape \(2,\), dtype float16"),
    ],
)
def test_a_bank_that_cannot_be(arguments, message):
    options = {"dtype": arguments[3]} if len(arguments) > 3 else {}
    with pytest.raises(UserError, match=message):
        ClassBank(*arguments[:3], **options)


def test_a_capacity_of_zero_and_numbers_of_numpy():
    with pytest.raises(UserError, match="capacity 0"):
        ClassBank(3, 0, (2,))
    assert ClassBank(np.int64(3), 4, (2,)).num_classes == 3


def spoiled(values, row, value):
    values = values.clone()
    values[row] = value
    return values


# What `insert` refuses: samples, labels and ids as they should be, to what is given.
REFUSED = {
    "NaN": (lambda x, y, i: (spoiled(x, 2, torch.nan), y, i), r"NaN or infinity, first in row 2 .* \(id 12\)"),
    "infinity": (lambda x, y, i: (spoiled(x, 2, torch.inf), y), "NaN or infinity, first in row 2 of the batch:"),
    "one-hot": (lambda x, y, i: (x, torch.nn.functional.one_hot(y)), "labels are torch.int64 .*argmax"),
    "int32 labels": (lambda x, y, i: (x, y.int()), "labels are torch.int32"),
    "a class too many": (lambda x, y, i: (x, y + 1), "labels range from 1 to 3: this bank has classes 0 to 2"),
    "a negative class": (lambda x, y, i: (x, y - 1), "labels range from -1"),
    "no labels": (lambda x, y, i: (x, None), "labels are None"),
    "bytes": (lambda x, y, i: (x.byte(), y), "latents are torch.uint8"),
    "short ids": (lambda x, y, i: (x, y, i[:2]), r"ids are torch.int64 \(2,\)"),
    "ids as numbers": (lambda x, y, i: (x, y, i.float()), "ids are torch.float32"),
    "another shape": (lambda x, y, i: (x[:, :1], y), r"latents are \(3, 1\): this bank holds samples of shape \(2,\)"),
    "too few labels": (lambda x, y, i: (x, y[:2]), r"labels are torch.int64 \(2,\)"),
    "an array": (lambda x, y, i: (x.numpy(), y), "latents are a ndarray"),
    "nothing": (lambda x, y, i: (x[:0], y[:0]), "one sample or more"),
}


@pytest.mark.parametrize("spoil, message", REFUSED.values(), ids=REFUSED)
def test_insertion_refuses_what_a_draw_refuses_and_inserts_nothing(spoil, message):
    bank = ClassBank(CLASSES, CAPACITY, (2,))
    with pytest.raises(UserError, match=message):
        bank.insert(*spoil(torch.ones(3, 2), torch.arange(3), torch.arange(3) + 10))
    assert not any(tensor.any() for name, tensor in bank.state_dict().items() if name != "ids")


def test_values_beyond_the_storage_are_refused_and_those_within_are_not():
    half = ClassBank(1, 2, (2,), dtype=torch.float16)
    with pytest.raises(UserError, match=r"values beyond the range of the bank's torch\.float16, first in row 1"):
        half.insert(torch.tensor([[1.0, 2.0], [7e4, 0.0]]), torch.zeros(2, dtype=torch.int64))
    for dtype in (torch.float32, torch.bfloat16):
        ClassBank(1, 2, (2,), dtype=dtype).insert(torch.full((1, 2), 7e4), torch.zeros(1, dtype=torch.int64))


def test_samples_keep_no_gradient_in_the_bank():
    bank = ClassBank(1, 2, (2,))
    bank.insert(torch.ones(1, 2, requires_grad=True) * 2, torch.zeros(1, dtype=torch.int64))
    assert not bank.entries.requires_grad


def test_a_bank_made_or_filled_in_inference_mode_works_outside_it():
    zero = torch.zeros(1, dtype=torch.int64)
    with torch.inference_mode():
        bank = ClassBank(1, 2, (2,))
        bank.insert(torch.ones(1, 2), torch.zeros(1, dtype=torch.int64))
    bank.insert(torch.ones(1, 2) * 2, zero)
    with torch.inference_mode():
        latents = torch.ones(1, 2) * 3
    bank.insert(latents, zero)
    assert bank.entries[0].tolist() == [[3, 3], [2, 2]]
    bank.load_state_dict(bank.state_dict())


DAMAGES = {
    "a tensor gone": (
        {"counts": None},
        "damaged: it holds no tensor counts; expected entries, ids, heads,",
    ),
    "a tensor too many": ({"x\x1b[2J": torch.zeros(1)}, r"an unknown 'x\\x1b\[2J'"),
    "no tensor": ({"heads": [0, 0, 0]}, "no tensor heads"),
    "other books": ({"ids": torch.zeros(3, 5, dtype=torch.int64)}, r"saved bank is \(3, 5\) torch.int64 \(ids\)"),
    "books as numbers": ({"seen": torch.zeros(3)}, r"torch.float32 \(seen\)"),
    "a negative count": ({"counts": torch.tensor([1, -1, 1])}, "counts of class 1 is -1, expected 0 to 4"),
    "a count too high": ({"counts": torch.tensor([1, 1, 5])}, "counts of class 2 is 5"),
    "a cursor too high": ({"heads": torch.tensor([4, 1, 1])}, "heads of class 0 is 4, expected 0 to 3"),
    "a cursor elsewhere": ({"heads": torch.tensor([1, 1, 3])}, "heads of class 2 is 3, expected the number of entries"),
    "fewer seen than held": ({"seen": torch.tensor([1, 0, 1])}, "seen of class 1 is 0, expected at least"),
    "NaN": ({"entries": torch.full((3, 4, 1), torch.nan)}, "class 0 holds NaN or infinity"),
}


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_state_is_refused_in_a_line_and_changes_nothing(damage, message):
    bank = filled([0, 1, 2])
    before = bank.state_dict()
    state = {name: value for name, value in (before | damage).items() if value is not None}
    with pytest.raises(UserError, match=message) as caught:
        bank.load_state_dict(state)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    assert all(torch.equal(value, bank.state_dict()[name]) for name, value in before.items())


def test_what_is_no_state_is_refused():
    with pytest.raises(UserError, match="damaged: it is a NoneType, expected a mapping"):
        filled([0, 1, 2]).load_state_dict(None)
