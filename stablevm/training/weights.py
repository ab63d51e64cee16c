"""Weights of a run: whole or in shards; their moving average; and those of another checkpoint, to fine-tune."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from stablevm.networks.network_config import PROJECTOR_FACTS
from stablevm.networks.snapshot import ModelCard, Weights, checkpoint_in, load_card, load_weights, title_of
from stablevm.support.errors import UserError
from stablevm.training.average import decay_of, exponent_of

NAMES_SHOWN = 8  # classes in the line about them
LATENT_FACTS = ("shape", "scale", "shift")
RUN_FACTS = ("path_type", "prediction")
_WHOLE = StateDictOptions(full_state_dict=True)
_ON_MAIN = StateDictOptions(full_state_dict=True, cpu_offload=True)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Weights by their plain names, on the host of the main process. All processes take part; the others get none."""
    tensors: dict[str, Any] = get_model_state_dict(model, options=_ON_MAIN)
    return tensors


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Take over whole weights; every process gives all of them and keeps its part."""
    set_model_state_dict(model, dict(tensors), options=_WHOLE)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state as "NAME.exp_avg" and the like, as `model_tensors` gives the weights."""
    found: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_ON_MAIN)
    return {f"{name}.{key}": value for name, state in found.get("state", {}).items() for key, value in state.items()}


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; settings such as the rate stay this run's."""
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parameter, key = name.rsplit(".", 1)
        states.setdefault(parameter, {})[key] = value
    (group,) = optimizer.param_groups
    settings = {key: value for key, value in group.items() if key != "params"}
    state: dict[str, Any] = {"state": states, "param_groups": [{**settings, "params": list(states)}]}
    set_optimizer_state_dict(model, optimizer, state, options=_WHOLE)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class MovingAverage:
    """A float32 copy of `model` that follows it: `average += (1 - d) (model - average)` after each step."""

    def __init__(self, model: nn.Module, decay: float, *, warm_up: bool = True) -> None:
        """decay: in [0, 1); with `warm_up`, `min(decay, (1 + n) / (10 + n))` is used after n updates."""
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.warm_up = decay, warm_up

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int, taken: Tensor | None = None) -> None:
        """Follow `model` after `updates` earlier updates; where `taken`, () bool on its device, is false, stay."""
        decay = self._decay(updates)
        average = [local(parameter.data) for parameter in self.model.parameters()]
        current = [local(parameter.data) for parameter in model.parameters()]
        if taken is None:
            torch._foreach_lerp_(average, current, 1 - decay)
        else:  # a weight on the device, which nothing waits for
            torch._foreach_lerp_(average, current, [(1 - decay) * taken] * len(current))

    def _decay(self, updates: int) -> float:
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warm_up else self.decay


class PowerAverage(MovingAverage):
    """A moving average of power-function profile: step t counts about in proportion to t^exponent (EDM2)."""

    def __init__(self, model: nn.Module, width: float) -> None:
        """width: relative to the steps so far; see `stablevm.training.average`."""
        super().__init__(model, 0.0, warm_up=False)
        self.exponent = exponent_of(width)

    def _decay(self, updates: int) -> float:
        return decay_of(self.exponent, updates + 1)


def initial_weights(
    folder: Path, weights: Weights, card: ModelCard, fresh: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of the checkpoint in `folder` for the network of `card`, and lines that say what they leave out.

    folder: as `checkpoint_in` takes it. Labels' rows are those of the classes of the same name, and `fresh` for others;
    the null class's is taken over. Projectors are `fresh` unless the checkpoint's read the same block for encoders of
    the same widths. UserError for a checkpoint that can't be read, and naming both values where it differs in anything
    else.
    """
    given, folder = folder, checkpoint_in(folder, weights)
    title, theirs = title_of(given, folder), load_card(folder)
    _check_same(title, theirs, card)
    found = load_weights(folder, weights)
    start = {name: found.get(name, value) for name, value in fresh.items()}
    lines = [f"starts from the weights {weights} of {title}, step {theirs.step:,}"]
    if not theirs.latent.has_autoencoder_of(card.latent):
        lines.append(f"its autoencoder was {theirs.latent.autoencoder}, this run's is {card.latent.autoencoder}")
    if _names(theirs) != _names(card):
        table = card.model.label_table
        start[table], line = _label_rows(theirs, card, found[table], fresh[table])
        lines.append(line)
    if card.model.projector_dims and any(
        getattr(theirs.model, fact) != getattr(card.model, fact) for fact in PROJECTOR_FACTS
    ):
        start |= {name: value for name, value in fresh.items() if name.startswith("projectors.")}
        had = "none" if not theirs.model.projector_dims else "others"
        lines.append(f"projectors start from scratch: the checkpoint has {had}")
    return start, lines


def _label_rows(theirs: ModelCard, ours: ModelCard, found: Tensor, fresh: Tensor) -> tuple[Tensor, str]:
    """The label table with the rows of classes of the same name, and a line that says which they are.

    Where one side only numbers its classes, as imported checkpoints do, names tell nothing: then the numbers count,
    if both have as many classes, and no class is taken over if not.
    """
    names, table = _names(theirs), fresh.clone()
    table[ours.model.null_class] = found[theirs.model.null_class]
    numbered = names == _numbers(theirs) or _names(ours) == _numbers(ours)
    if numbered and theirs.model.num_classes == ours.model.num_classes:
        return found, "labels are taken over by their numbers: only one side names its classes; check their order"
    if numbered and not (names == _numbers(theirs) and _names(ours) == _numbers(ours)):
        kept: list[int] = []
    else:
        kept = [label for label, name in enumerate(_names(ours)) if names.count(name) == 1]
    for label in kept:
        table[label] = found[names.index(_names(ours)[label])]
    new = sorted(set(range(ours.model.num_classes)) - set(kept))
    if not kept:
        counts = f"{ours.model.num_classes:,} classes, none of them among the {theirs.model.num_classes:,} by name"
        return table, f"labels start from scratch: {counts}; the null class is taken over"
    return table, (
        f"labels: taken over by name {_listed(ours, kept)}" + (f"; from scratch {_listed(ours, new)}" if new else "")
        + "; the null class is taken over"
    )  # fmt: skip


def _names(card: ModelCard) -> tuple[str, ...]:
    """One for each class; those beyond the recorded ones are called by their numbers."""
    return card.class_names + _numbers(card)[len(card.class_names) :]


def _numbers(card: ModelCard) -> tuple[str, ...]:
    return tuple(map(str, range(card.model.num_classes)))


def _listed(card: ModelCard, labels: list[int]) -> str:
    shown = ", ".join(_names(card)[label] for label in labels[:NAMES_SHOWN])
    return f"{len(labels):,} of {card.model.num_classes:,} ({shown}{', ...' if len(labels) > NAMES_SHOWN else ''})"


def _check_same(title: str, theirs: ModelCard, ours: ModelCard) -> None:
    _check_equal(title, theirs.model.weight_facts(), ours.model.weight_facts())
    for facts, one, other, of in (
        (LATENT_FACTS, theirs.latent, ours.latent, "latent's "),
        (RUN_FACTS, theirs, ours, ""),
    ):
        _check_equal(title, *({of + fact: getattr(card, fact) for fact in facts} for card in (one, other)))


def _check_equal(title: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    for fact, value in ours.items():
        if theirs[fact] != value:
            raise UserError(
                f"--init-from {title}: its {fact.replace('_', ' ')} is {theirs[fact]}, this run's is {value}; "
                "give the model, data and options of that checkpoint"
            )
