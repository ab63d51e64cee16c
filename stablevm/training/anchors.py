"""Which samples the coming steps will perturb, known ahead, so that the loader's workers can read their images."""

from collections.abc import Iterator, Sequence

import torch

from stablevm.bank import ClassBank
from stablevm.data.dataset import PreparedDataset
from stablevm.data.loader import StepSampler
from stablevm.objective import draw_anchors
from stablevm.support import rng
from stablevm.training.config import TrainConfig


def objective_streams(seed: int, step: int, positions: Sequence[int]) -> rng.RowGenerators:
    """Where `step` draws its anchors, times, noise and dropped labels from; positions: in the global batch."""
    return rng.RowGenerators.for_keys(seed, "objective", step, positions=positions)


class AnchorPlan:
    """The dataset rows of the anchors that one process draws from the bank, for each step from `start_step` on.

    What a bank holds follows from its content now and from the samples of the steps between, all of which the seed
    tells; so a replica without values runs ahead of the bank and makes the same draws.
    """

    def __init__(
        self,
        bank: ClassBank,
        dataset: PreparedDataset,
        config: TrainConfig,
        positions: range,
        *,
        start_step: int,
        num_steps: int,
    ) -> None:
        """bank: as it is before `start_step`. positions: of the process's samples in the global batch."""
        self._books, self._labels, self._seed, self._positions = (
            bank.replica(),
            dataset.labels(),
            config.seed,
            positions,
        )
        self._sampler = StepSampler(len(dataset), config.batch_size, 0, 1, config.seed, start_step, num_steps)

    def __iter__(self) -> Iterator[list[int]]:
        books = self._books.replica()
        for step, rows in enumerate(self._sampler, start=self._sampler.start_step):
            books.insert(torch.empty(len(rows), 0), self._labels[rows], torch.tensor(rows))
            streams = objective_streams(self._seed, step, self._positions)
            _, slots = draw_anchors(books, len(self._positions), streams)
            yield books.ids_at(slots).tolist()
