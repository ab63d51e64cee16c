"""The anchors of the coming steps, known before the bank draws them."""

import torch

from stablevm.bank import ClassBank
from stablevm.data.loader import StepSampler
from stablevm.data.opening import open_dataset
from stablevm.interpolant import LINEAR
from stablevm.objective import ObjectiveSettings, StableVM
from stablevm.training.objectives import AnchorPlan, objective_streams
from tests.helpers import runs

CLASSES, CAPACITY, STEPS, BATCH = 3, 4, 25, 6


def insert(bank, stream, count):
    labels = torch.randint(CLASSES, (count,), generator=stream)
    ids = torch.randint(30, (count,), generator=stream)  # some are in the bank already
    return bank.insert(torch.randn(count, *bank.shape), labels, ids), labels, ids


def test_a_replica_keeps_the_same_books(stream):
    with torch.random.fork_rng():
        bank = ClassBank(CLASSES, CAPACITY, (2, 2))
        insert(bank, stream, 9)
        books = bank.replica()
        assert books.entries.numel() == 0
        for _ in range(STEPS):
            slots, labels, ids = insert(bank, stream, 7)
            assert torch.equal(books.insert(torch.empty(7, 0), labels, ids), slots)
            uniforms = torch.rand(5, 2, generator=stream)
            assert all(map(torch.equal, books.draw(uniforms), bank.draw(uniforms)))
            assert torch.equal(books.ids, bank.ids) and torch.equal(books.seen, bank.seen)
        before = bank.ids.clone()
        insert(books, stream, 20)
        assert torch.equal(bank.ids, before)


def start(root):
    """A data set and a bank that holds a sample of each class."""
    dataset = open_dataset(runs.write_data(root / "data"))
    bank = ClassBank(CLASSES, CAPACITY, dataset.latent.shape)
    bank.insert(torch.zeros(3, *dataset.latent.shape), torch.arange(3), torch.arange(3))
    return dataset, bank


def drawn(dataset, bank, config, position, *, first, until):
    """The ids of the anchors that StableVM draws in the steps `first` to `until` for one half of the batch."""
    objective = StableVM(bank, ObjectiveSettings(path=LINEAR))
    labels, rows_of = dataset.labels(), StepSampler(len(dataset), BATCH, 0, 1, config.seed, first, until - first)
    for step, rows in enumerate(rows_of, start=first):
        latents = torch.zeros(BATCH, *dataset.latent.shape)
        slots = bank.insert(latents, labels[rows], torch.tensor(rows))
        half = slice(position.start, position.stop)
        draw = objective.draw(
            latents[half], labels[rows][half], objective_streams(config.seed, step, position),
            ids=torch.tensor(rows)[half], slots=slots[half], pool_generator=torch.Generator(),
        )  # fmt: skip
        yield draw.ids.tolist()


def test_the_plan_is_what_is_drawn(tmp_path):
    """For both processes of two, from the beginning and from a resumed run's bank; computed twice, it is the same."""
    config = runs.config(tmp_path, batch_size=BATCH, seed=5)
    for position in (range(3), range(3, 6)):
        dataset, bank = start(tmp_path / str(position.start))
        plan = AnchorPlan(bank, dataset, config, position, start_step=0, num_steps=STEPS)
        ahead = list(plan)
        assert list(drawn(dataset, bank, config, position, first=0, until=10)) == ahead[:10]
        assert list(plan) == ahead, "the bank's changes do not reach it"
        assert list(AnchorPlan(bank, dataset, config, position, start_step=10, num_steps=STEPS - 10)) == ahead[10:]
        assert list(drawn(dataset, bank, config, position, first=10, until=STEPS)) == ahead[10:]
        assert len({tuple(rows) for rows in ahead}) > STEPS // 2
