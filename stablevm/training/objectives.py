"""The objectives that `--loss-type` names: each word with what builds it, and what training asks of all of them."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import psutil
import torch
from torch import Tensor

from stablevm import objective
from stablevm.bank import ClassBank
from stablevm.data.dataset import PreparedDataset
from stablevm.interpolant import get_interpolant
from stablevm.networks.network_config import NetworkConfig
from stablevm.objective import Anchors, Draw, FlowMatching, StableVM
from stablevm.support.errors import UserError
from stablevm.support.rng import AnyGenerator
from stablevm.training.config import TrainConfig

GPU_SHARE = 0.5  # of the GPU's free memory that a bank of all the data may take: activations need the rest


class WithoutBank(Protocol):
    """An objective whose targets are made of the batch alone."""

    @property
    def bank(self) -> None: ...

    def draw(self, latents: Tensor, labels: Tensor, generator: AnyGenerator, *, ids: Tensor | None = None) -> Draw: ...


class WithBank(Protocol):
    """An objective with a bank, which training fills, saves and restores.

    anchors: "bank" where the samples to regress on are those that `objective.draw_anchors` draws, "batch" where they
    are the fresh ones. The batch is in the bank already, at `slots`.
    """

    @property
    def bank(self) -> ClassBank: ...

    @property
    def anchors(self) -> Anchors: ...

    def draw(
        self,
        latents: Tensor,
        labels: Tensor,
        generator: AnyGenerator,
        *,
        ids: Tensor | None = None,
        slots: Tensor | None = None,
        pool_generator: torch.Generator | None = None,
    ) -> Draw: ...


Objective: TypeAlias = WithoutBank | WithBank


@dataclass(frozen=True)
class Given:
    """What an objective is made of."""

    config: TrainConfig
    settings: "objective.ObjectiveSettings"  # what all objectives share
    class_counts: Tensor  # (classes,) samples of each class in the data
    shape: tuple[int, ...]  # of a latent
    device: torch.device


def make_objective(
    config: TrainConfig, model: NetworkConfig, dataset: PreparedDataset, device: torch.device
) -> Objective:
    """The objective that the options name, with an empty bank where it needs one."""
    settings = objective.ObjectiveSettings(
        path=get_interpolant(config.path_type),
        prediction=config.prediction,
        weighting=config.weighting,
        label_dropout=config.cfg_prob,
        null_class=model.null_class,
    )
    counts = torch.bincount(dataset.labels(), minlength=model.num_classes)
    return OBJECTIVES[config.loss_type](Given(config, settings, counts, dataset.latent.shape, device))


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


# Each word of `TrainConfig.loss_type`, with what makes its objective.
OBJECTIVES: dict[str, Callable[[Given], Objective]] = {"si": _flow_matching, "stablevm": _stablevm}


def make_bank(config: TrainConfig, counts: Tensor, shape: tuple[int, ...], device: torch.device) -> ClassBank:
    """An empty bank for data of `counts` (classes,) latents of `shape`, in the GPU's memory where that is wanted.

    One that is to hold all the data goes to the host's where it does not fit beside the network. UserError with the
    numbers where it does not fit there either.
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


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
