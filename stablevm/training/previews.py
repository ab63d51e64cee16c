"""Grids of samples during training, always of the same noise, so that one sees the network learn."""

import re
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from stablevm.networks.autoencoder import Autoencoder
from stablevm.networks.snapshot import ModelCard
from stablevm.sampling.guidance import UNGUIDED, GuidanceSettings, draw_latents
from stablevm.sampling.labels import trained_labels
from stablevm.solvers.settings import SamplerSettings
from stablevm.support.images import save_png, tile
from stablevm.support.rng import RowGenerators

SETTINGS, GUIDANCE = SamplerSettings(mode="ode", num_steps=40), GuidanceSettings(cfg_scale=1.5)
CLASSES, PER_CLASS = 10, 6
MIN_SIDE = 64  # pixels: smaller images are enlarged by a whole number
PREVIEWS = "samples"  # their folder in that of the run
_NAME = re.compile(r"step-(\d+)\.png")


class Previews:
    """Draws `FOLDER/step-0010000.png`: a row for each of the first classes that the data has samples of, guided where
    the null class is trained.
    """

    def __init__(self, folder: Path, autoencoder: Autoencoder, seed: int) -> None:
        self.folder, self.autoencoder, self.seed = folder, autoencoder, seed

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}.png"

    def draw(self, model: nn.Module, card: ModelCard, device: torch.device) -> NDArray[np.uint8]:
        """Write the grid of `card.step`; returns it, uint8 (H, W, 3)."""
        labels = torch.tensor(card.trained_classes[:CLASSES]).repeat_interleave(PER_CLASS)
        streams = RowGenerators.for_keys("preview", self.seed, positions=range(len(labels)))
        guidance = GUIDANCE if card.null_is_trained and card.classes_are_trained else UNGUIDED
        shown = trained_labels(labels, card)
        latents, _ = draw_latents(model, card, shown, streams, SETTINGS, device, guidance=guidance)
        images = self.autoencoder.decode(latents).permute(0, 2, 3, 1).numpy()
        grid = tile(images, PER_CLASS, scale=max(1, MIN_SIDE // images.shape[1]))
        save_png(self.path(card.step), grid)
        return grid


def set_previews_aside(folder: Path, step: int, target: Path) -> None:
    """Move the grids after `step` to `target`: they would pass for those of the course that is begun."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = _NAME.fullmatch(path.name)
        if name and int(name[1]) > step:
            target.mkdir(exist_ok=True)
            path.replace(target / path.name)
