"""Saved networks: weights in safetensors, beside `model.json`, which holds all else that sampling needs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stablevm.choices import Prediction, Weights
from stablevm.networks.autoencoder import LatentSpec
from stablevm.networks.backbone import Backbone
from stablevm.networks.network_config import NetworkConfig
from stablevm.networks.registry import DEFAULT_KIND, config_classes, empty_network
from stablevm.support.cards import ByKind, read_card
from stablevm.support.errors import UserError
from stablevm.support.files import CHECKPOINTS, write_json
from stablevm.support.hub import fetched_folder, hub_name, is_on_hub
from stablevm.support.options import some_of
from stablevm.support.ranges import ABOVE_0, CHANCE
from stablevm.support.tensor_files import save_tensors
from stablevm.support.text import shown

CARD_FILE = "model.json"
FORMAT_VERSION = 1
_REMEDY = "use another checkpoint"


@dataclass(frozen=True)
class ModelCard:
    """The contents of `model.json`: the facts without which a network's weights are useless."""

    model: Annotated[NetworkConfig, ByKind(config_classes, DEFAULT_KIND)]
    latent: LatentSpec
    path_type: str
    prediction: Prediction
    class_names: tuple[str, ...]
    step: int
    # Facts about the training; None in cards of earlier versions and of imported checkpoints.
    class_counts: tuple[int, ...] | None = None  # samples of each class in the training data
    label_dropout: float | None = None  # probability that a sample was trained without its label
    time_shift: float = 1.0  # factor of sigma / alpha of the times of training, which sampling's grids follow

    def __post_init__(self) -> None:
        """Raise UserError for facts that contradict each other."""
        side, channels = self.model.input_size, self.model.in_channels
        if self.latent.shape != (channels, side, side):
            raise UserError(f"the latent is {list(self.latent.shape)}, but the network takes {[channels, side, side]}")
        if len(self.class_names) > self.model.num_classes:
            raise UserError(f"{len(self.class_names)} class_names, but num_classes is {self.model.num_classes}")
        if self.step < 0:
            raise UserError(f"step {self.step}, expected 0 or more")
        counts = self.class_counts
        if counts is not None and (len(counts) > self.model.num_classes or not all(count >= 0 for count in counts)):
            raise UserError(f"class_counts of {len(counts)} classes, expected {self.model.num_classes} of 0 or more")
        if self.label_dropout is not None and self.label_dropout not in CHANCE:
            raise UserError(f"label_dropout {self.label_dropout}, expected {CHANCE.words}")
        if self.time_shift not in ABOVE_0:
            raise UserError(f"time_shift {self.time_shift}, expected {ABOVE_0.words}")

    @property
    def trained_classes(self) -> tuple[int, ...]:
        """The classes of which the training data had samples; all classes if this is not recorded."""
        if self.class_counts is None:
            return tuple(range(self.model.num_classes))
        return tuple(label for label, count in enumerate(self.class_counts) if count)

    @property
    def names_classes(self) -> bool:
        """Whether classes have names, instead of numbers only, as in imported checkpoints."""
        return self.class_names != tuple(map(str, range(len(self.class_names))))

    @property
    def null_is_trained(self) -> bool:
        """Whether the null class, which guidance and unconditional images need, was trained; True if not recorded."""
        return self.label_dropout != 0

    @property
    def classes_are_trained(self) -> bool:
        """Whether labels were trained, that is, not all of them were dropped; True if not recorded."""
        return self.label_dropout != 1

    def agrees_with(self, other: "ModelCard") -> bool:
        """Whether both come from the same training run; the step, and facts that one of them lacks, are ignored."""
        other = replace(
            other,
            step=self.step,
            class_counts=self.class_counts if other.class_counts is None else other.class_counts,
            label_dropout=self.label_dropout if other.label_dropout is None else other.label_dropout,
        )
        completed = replace(
            self,
            class_counts=other.class_counts if self.class_counts is None else self.class_counts,
            label_dropout=other.label_dropout if self.label_dropout is None else self.label_dropout,
        )
        return completed == other

    def to_dict(self) -> dict[str, Any]:
        """The card as JSON values, with the version of its format."""
        return {
            "format_version": FORMAT_VERSION,
            "model": self.model.to_dict(),
            "latent": self.latent.to_dict(),
            "path_type": self.path_type,
            "prediction": self.prediction,
            "class_names": list(self.class_names),
            "step": self.step,
            "class_counts": None if self.class_counts is None else list(self.class_counts),
            "label_dropout": self.label_dropout,
            "time_shift": self.time_shift,
        }


def save(
    folder: str | Path,
    card: ModelCard,
    weights: Mapping[str, Mapping[str, Tensor]] | Mapping[Weights, Mapping[str, Tensor]],
) -> None:
    """Write each set of weights as `NAME.safetensors`, then the card; existing files are replaced."""
    folder = Path(folder)
    for name, tensors in weights.items():
        save_tensors(folder / f"{name}.safetensors", tensors)
    write_json(folder / CARD_FILE, card.to_dict())


def checkpoint_in(folder: str | Path, weights: Weights = "ema") -> Path:
    """The folder itself where it is a checkpoint; the newest checkpoint where it is a run's folder.

    hf:OWNER/NAME[@REVISION] is fetched from the Hugging Face Hub: the card and these weights, nothing else. UserError
    where it holds no such checkpoint.
    """
    if is_on_hub(folder):
        return _fetched(folder, weights)
    folder = Path(folder)
    found = _checkpoints(folder)
    if (folder / CARD_FILE).is_file() or not found:
        return folder
    return max(found, key=lambda checkpoint: int(checkpoint.name))


def _fetched(name: str | Path, weights: Weights) -> Path:
    file = f"{weights}.safetensors"
    folder = fetched_folder(name, [CARD_FILE, file])
    if not (folder / CARD_FILE).is_file():
        raise UserError(
            f"{name}: holds no {CARD_FILE}, so it is no checkpoint that was pushed from here; stablevm import converts "
            "published files"
        )
    if not (folder / file).is_file():
        raise UserError(f"{name}: holds no {file}; choose the other weights")
    return folder


def title_of(given: str | Path, folder: Path) -> str:
    """The name of a checkpoint in `folder` for people: one of the hub with its commit, else the folder."""
    return str(replace(hub_name(given), revision=folder.name)) if is_on_hub(given) else str(folder)


def _checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run; none if the folder is no run."""
    return [card.parent for card in run.glob(f"{CHECKPOINTS}/*/{CARD_FILE}") if card.parent.name.isdecimal()]


def _runs_in(folder: Path) -> str:
    """The end of a message, with the runs in a folder that have a checkpoint; empty if there is none."""
    runs = sorted(run.name for run in folder.iterdir() if _checkpoints(run)) if folder.is_dir() else []
    return f"; the runs in {folder} are {some_of(runs)}" if runs else ""


def load_card(folder: str | Path) -> ModelCard:
    """Read the card; UserError if `folder` is not a checkpoint, or its card is damaged or of another version."""
    folder = Path(folder)
    if not folder.exists():
        runs = _runs_in(folder.parent) or "; give that of a checkpoint, or of a run with checkpoints"
        raise UserError(f"{folder}: no such folder{runs}")
    if not (folder / CARD_FILE).is_file():
        raise UserError(f"{folder}: not a checkpoint folder (it holds no {CARD_FILE}){_runs_in(folder)}")
    return read_card(folder / CARD_FILE, ModelCard, "checkpoint", version=FORMAT_VERSION, remedy=_REMEDY)


def load_weights(folder: str | Path, name: str) -> dict[str, Tensor]:
    """Read the tensors of `NAME.safetensors`; UserError if it is missing or damaged, or weights are not finite."""
    path = Path(folder) / f"{name}.safetensors"
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{folder}: {path.name} is missing") from None
    except SafetensorError as error:
        raise UserError(f"{folder}: {path.name} is damaged ({error}); use an earlier checkpoint") from None
    for key, value in tensors.items() if name in get_args(Weights) else ():
        if not value.isfinite().all():
            raise UserError(f"{folder}: {path.name}: {shown(key)} is not finite; use an earlier checkpoint")
    return tensors


def load_model(
    folder: str | Path, card: ModelCard, *, weights: Weights = "ema", device: torch.device | str = "cpu"
) -> Backbone:
    """Load the network of `card` with the weights in `folder`: float32, in evaluation mode, without gradients.

    UserError if the weights are missing, damaged, or those of another network.
    """
    model = empty_network(card.model)
    try:
        model.load_state_dict(load_weights(folder, weights), assign=True)
    except RuntimeError:
        raise UserError(
            f"{folder}: the tensors of {weights}.safetensors do not fit the {card.model.name} of {CARD_FILE}; "
            "use another checkpoint"
        ) from None
    return model.to(device).eval().requires_grad_(False)
