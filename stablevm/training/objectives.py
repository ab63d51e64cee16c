"""The objectives that `loss_type` names, how their bank is made and filled, and the plan of its future anchors."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypedDict, Unpack

import psutil
import torch
from torch import Tensor

from stablevm.bank import ClassBank
from stablevm.data.dataset import PreparedDataset, drawn_latents
from stablevm.data.loader import StepSampler
from stablevm.draw import Draw, ObjectiveSettings
from stablevm.interpolant import get_interpolant
from stablevm.meanflow import MeanFlow
from stablevm.networks.joint_state import joined
from stablevm.networks.network_config import NetworkConfig
from stablevm.objective import Anchors, FlowMatching, StableVM, draw_anchors
from stablevm.support import rng
from stablevm.support.bars import progress_bar
from stablevm.support.errors import UserError
from stablevm.support.machine import gigabytes
from stablevm.support.options import some_of
from stablevm.support.rng import AnyGenerator
from stablevm.times import automatic_shift
from stablevm.training.cls_tokens import ClsTokens
from stablevm.training.config import TrainConfig
from stablevm.training.console import on_terminal, say

GPU_SHARE = 0.5  # of the GPU's free memory that a bank of all the data may take; activations need the rest


class WithoutBank(Protocol):
    """An objective without a bank, whose targets are made from the batch alone."""

    @property
    def bank(self) -> None: ...

    def draw(self, latents: Tensor, labels: Tensor, generator: AnyGenerator, *, ids: Tensor | None = None) -> Draw: ...


class Inserted(TypedDict):
    """The arguments of `draw` for a batch that training has inserted into the bank with those of all processes."""

    ids: Tensor  # (B,) int64, rows in the data set
    slots: Tensor  # (B,) int64, slots in the bank
    pool_generator: torch.Generator  # source of references of all classes, the same in all processes


class WithBank(Protocol):
    """An objective with a bank, which training fills, saves and restores.

    anchors: "bank" if the samples to regress on are those that `objective.draw_anchors` draws, "batch" if they are the
    fresh ones.
    """

    @property
    def bank(self) -> ClassBank: ...

    @property
    def anchors(self) -> Anchors: ...

    def draw(self, latents: Tensor, labels: Tensor, generator: AnyGenerator, **inserted: Unpack[Inserted]) -> Draw: ...


Objective: TypeAlias = WithoutBank | WithBank


@dataclass(frozen=True)
class Given:
    """The facts from which an objective is made."""

    config: TrainConfig
    settings: ObjectiveSettings  # what all objectives share
    class_counts: Tensor  # (classes,) number of samples of each class in the data
    shape: tuple[int, ...]  # of what is perturbed: a latent, or the state of one with a class token
    device: torch.device


def time_shift(config: TrainConfig, shape: Sequence[int]) -> float:
    """The factor that the options ask for, for latents of `shape`."""
    return automatic_shift(shape) if config.time_shift == "auto" else config.time_shift


def make_objective(
    config: TrainConfig, model: NetworkConfig, dataset: PreparedDataset, device: torch.device
) -> Objective:
    """The objective that the options name, with an empty bank if it needs one."""
    settings = ObjectiveSettings(
        path=get_interpolant(config.path_type),
        prediction=config.prediction,
        weighting=config.weighting,
        label_dropout=config.cfg_prob,
        null_class=model.null_class,
        time_shift=time_shift(config, dataset.latent.shape),
        weighting_mean=config.weighting_mean,
        weighting_std=config.weighting_std,
        instant_share=config.meanflow_instants if config.meanflow else 1.0,
    )
    counts = torch.bincount(dataset.labels(), minlength=model.num_classes)
    return OBJECTIVES[config.loss_type](Given(config, settings, counts, model.state_shape, device))


def make_meanflow(config: TrainConfig, model: NetworkConfig) -> MeanFlow | None:
    """What turns the objective's velocities into the targets of MeanFlow, or None without."""
    if not config.meanflow:
        return None
    return MeanFlow(
        power=config.meanflow_power,
        omega=config.meanflow_omega,
        kappa=config.meanflow_kappa,
        guidance_low=config.meanflow_guidance_low,
        guidance_high=config.meanflow_guidance_high,
        null_class=model.null_class,
    )


def _flow_matching(given: Given) -> Objective:
    return FlowMatching(given.settings)


def _stablevm(given: Given) -> Objective:
    config = given.config
    return StableVM(
        make_bank(config, given.class_counts, given.shape, given.device),
        given.settings,
        anchors=config.bank_anchors,
        class_shares=given.class_counts,
        references_from=config.references_from,
    )


# The function that makes each objective, by the value of `TrainConfig.loss_type`.
OBJECTIVES: dict[str, Callable[[Given], Objective]] = {"si": _flow_matching, "stablevm": _stablevm}


def make_bank(config: TrainConfig, counts: Tensor, shape: tuple[int, ...], device: torch.device) -> ClassBank:
    """Make an empty bank for data with counts (classes,) of latents of `shape`, in the GPU's memory if requested.

    A bank for all the data is kept in the host's memory if it does not fit beside the network. UserError with the
    numbers if it does not fit there either.
    """
    home = device if config.bank_on_gpu else torch.device("cpu")
    if config.bank_capacity_per_class != "all":
        return ClassBank(len(counts), config.bank_capacity_per_class, shape, device=home)
    slot = torch.float32.itemsize * math.prod(shape)
    needed = len(counts) * int(counts.max()) * slot
    if home.type == "cuda" and needed > GPU_SHARE * torch.cuda.mem_get_info(home)[0]:
        home = torch.device("cpu")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes on this machine, as torchrun and accelerate count
    available = psutil.virtual_memory().available
    if home.type == "cpu" and needed * here > available:
        fits = available // (len(counts) * slot * here)
        raise UserError(
            f"--bank-capacity-per-class all: {len(counts):,} classes of up to {int(counts.max()):,} latents take "
            f"{gigabytes(needed)} in each of {here} processes, this machine has {gigabytes(available)} free; "
            + (f"give {fits} or less" if fits else "give --loss-type si")
        )
    return ClassBank(len(counts), int(counts.max()), shape, device=home)


def prefill(
    bank: ClassBank,
    dataset: PreparedDataset,
    config: TrainConfig,
    *,
    cls_tokens: ClsTokens | None = None,
    show: bool,
) -> None:
    """Fill the bank with samples of each class chosen by the seed, or with all, reading only latents.

    Every process chooses and reads the same samples, so all banks are equal without communication. cls_tokens: those of
    all rows, if the network has a class token. Raises UserError, naming the classes, if the data has no sample of some.
    """
    check_classes(dataset, config, bank.num_classes)
    labels = dataset.labels()
    counts = torch.bincount(labels, minlength=bank.num_classes)
    fully = config.prefill_bank_fully or config.bank_is_fixed
    rows = choose_rows(labels, counts, bank.capacity if fully else 1, config.seed)
    workers = config.num_workers if config.prefill_workers is None else config.prefill_workers
    with progress_bar(total=len(rows), desc="filling the bank", unit="latent", show=show and on_terminal()) as bar:
        for part, latents in _read_latents(dataset, rows, config, workers):
            states = latents if cls_tokens is None else joined(latents, cls_tokens(part))
            bank.insert(states, labels[part], part)
            bar.update(len(part))
    short = int((counts < bank.capacity).sum())
    if show and config.prefill_bank_fully and short and not config.bank_is_fixed:
        say(f"bank: {short} of {bank.num_classes} classes have fewer than {bank.capacity} samples; all are in it")


def check_classes(dataset: PreparedDataset, config: TrainConfig, num_classes: int) -> None:
    """Raise UserError, naming the classes, if the data has no sample of some of `num_classes`."""
    counts = torch.bincount(dataset.labels(), minlength=num_classes)
    missing = (counts == 0).nonzero().flatten().tolist()
    if missing:
        remedy = "lower --num-classes"
        if missing[0] < dataset.num_classes:
            remedy = "prepare the data with them or, without them, with classes numbered from 0 without gaps"
        raise UserError(
            f"--loss-type stablevm: {config.data_dir} has no sample of {len(missing)} of {num_classes} classes "
            f"({some_of(missing)}), so their part of the bank would stay empty; {remedy}"
        )


def choose_rows(labels: Tensor, counts: Tensor, per_class: int, seed: int) -> Tensor:
    """At most `per_class` random rows of each class, in the order of the file; counts: (classes,), rows of each."""
    shuffled = torch.randperm(len(labels), generator=rng.generator(seed, "prefill"))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return by_class[rank < per_class].sort().values


def _read_latents(
    dataset: PreparedDataset, rows: Tensor, config: TrainConfig, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield parts of `rows` with their latents, in order, read by `workers` threads, or by this one if 0."""

    def read(part: Tensor) -> Tensor:
        return drawn_latents(dataset, part.tolist(), config.seed, "prefill")

    parts = rows.split(config.prefill_batch_size)
    if workers == 0:
        yield from zip(parts, map(read, parts), strict=True)
        return
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(parts), workers):  # no more than `workers` parts are read ahead
            ahead = parts[start : start + workers]
            yield from zip(ahead, pool.map(read, ahead), strict=True)


def objective_streams(seed: int, step: int, positions: Sequence[int]) -> rng.RowGenerators:
    """The generators of anchors, times, noise and dropped labels in `step`; positions: in the global batch."""
    return rng.RowGenerators.for_keys(seed, "objective", step, positions=positions)


class AnchorPlan:
    """The data-set rows of the anchors that one process will draw from the bank, for each step from `start_step` on.

    The future contents of the bank depend only on its present contents and on the order of samples, which the seed
    determines. So a replica without values can run ahead of the bank and make the same draws.
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
        """bank: its state before `start_step`. positions: those of the process's samples in the global batch."""
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
