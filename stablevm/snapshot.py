"""A trained network that knows all that sampling needs: `model.json` beside its weights in safetensors."""

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stablevm.autoencoder import LatentSpec
from stablevm.errors import UserError
from stablevm.files import read_json, replacing, write_json
from stablevm.models.config import SiTConfig
from stablevm.models.sit import SiT

CARD_FILE = "model.json"
FORMAT_VERSION = 1
Weights = Literal["ema", "model"]


@dataclass(frozen=True)
class ModelCard:
    """The facts that a network's weights are useless without."""

    model: SiTConfig
    latent: LatentSpec
    path_type: str
    prediction: Literal["v", "x"]
    class_names: tuple[str, ...]
    step: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "model": self.model.to_dict(),
            "latent": self.latent.to_dict(),
            "path_type": self.path_type,
            "prediction": self.prediction,
            "class_names": list(self.class_names),
            "step": self.step,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelCard":
        return cls(
            model=SiTConfig.from_dict(values["model"]),
            latent=LatentSpec.from_dict(values["latent"]),
            path_type=values["path_type"],
            prediction=values["prediction"],
            class_names=tuple(values["class_names"]),
            step=values["step"],
        )


def save(folder: str | Path, card: ModelCard, weights: dict[Weights, dict[str, Tensor]]) -> None:
    """Write each set of weights as `NAME.safetensors`, then the card; an existing file is replaced whole."""
    folder = Path(folder)
    for name, tensors in weights.items():
        save_tensors(folder / f"{name}.safetensors", tensors)
    write_json(folder / CARD_FILE, card.to_dict())


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, complete or not at all; OSError when the disk is full."""
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(plain, temporary)
        except SafetensorError as error:  # it tells of the system's error in words only
            for number in (errno.ENOSPC, errno.EDQUOT):
                if f"os error {number}" in str(error):
                    raise OSError(number, os.strerror(number), str(path)) from None
            raise


def load_card(folder: str | Path) -> ModelCard:
    """Read the card; UserError when `folder` is no checkpoint, its card is damaged, or of another format version."""
    folder = Path(folder)
    if not (folder / CARD_FILE).is_file():
        raise UserError(f"{folder}: not a checkpoint folder (it holds no {CARD_FILE})")
    values = read_json(folder / CARD_FILE, "checkpoint")
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{folder}: format version {version}, this program reads {FORMAT_VERSION}")
    try:
        return ModelCard.from_dict(values)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: {CARD_FILE} is damaged ({type(error).__name__}: {error}); use another checkpoint"
        ) from None


def load_weights(folder: str | Path, name: str) -> dict[str, Tensor]:
    """The tensors of `NAME.safetensors`; UserError when the file is absent or damaged."""
    path = Path(folder) / f"{name}.safetensors"
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{folder}: {path.name} is missing") from None
    except SafetensorError as error:
        raise UserError(f"{folder}: {path.name} is damaged ({error}); use an earlier checkpoint") from None


def load_model(
    folder: str | Path, card: ModelCard, *, weights: Weights = "ema", device: torch.device | str = "cpu"
) -> SiT:
    """The network of `card` with the weights in `folder`: evaluation mode, float32, without gradients.

    UserError when the weights are absent, damaged, or those of another network.
    """
    with torch.device("meta"):  # first values would be thrown away
        model = SiT(card.model)
    try:
        model.load_state_dict(load_weights(folder, weights), assign=True)
    except RuntimeError:
        raise UserError(
            f"{folder}: {weights}.safetensors holds other tensors than the {card.model.name} of {CARD_FILE}; "
            "use another checkpoint"
        ) from None
    return model.to(device).eval().requires_grad_(False)
