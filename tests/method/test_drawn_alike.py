"""A warning for processes that draw the same times and noise: docs/own-loop.md seeds the generator by rank."""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from stablevm import ClassBank, FlowMatching, StableTargetField, StableVM
from stablevm.support.rng import RowGenerators

BATCH = torch.zeros(4, 2), torch.arange(4) % 2


def warnings_of(objective, stream):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        objective.draw(*BATCH, stream)
    return [str(each.message) for each in caught]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def one_of_two(rank, folder):
    """Writes the warnings for each way of seeding to RANK.pt; draws alone at the end, for which no process waits."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    bank = ClassBank(2, 4, (2,))
    alike, apart = StableVM(bank), StableVM(bank)
    streams = RowGenerators.for_keys("rows", positions=range(4 * rank, 4 * rank + 4))
    found = {"rows": warnings_of(FlowMatching(), streams)}
    found["alike"] = warnings_of(alike, seeded(0))
    found["again"] = warnings_of(alike, seeded(0))
    found["apart"] = warnings_of(apart, seeded(rank + 10))
    found["of its own"] = warnings_of(StableTargetField(), seeded(rank + 10))
    if rank == 1:
        found["alone"] = warnings_of(FlowMatching(), seeded(77))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_that_draw_alike_are_warned_once(tmp_path):
    mp.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    by_rank = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    (told,) = [rank for rank, found in enumerate(by_rank) if found["alike"]]
    message = f"process {told} draws the same times and noise as process {1 - told}: seed its generator by rank"
    assert [message in text for text in by_rank[told].pop("alike")] == [True]
    assert not by_rank[1 - told].pop("alike")
    for found in by_rank:
        assert not any(found.values()), found


@pytest.mark.parametrize("objective", [FlowMatching(), StableVM(ClassBank(2, 4, (2,)))])
def test_a_single_process_is_not_warned(objective):
    assert warnings_of(objective, seeded(0)) == warnings_of(objective, seeded(0)) == []
