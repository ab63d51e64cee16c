"""The options of `stablevm import`. Free of torch, so that `--help` stays quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from stablevm.choices import PathName, Prediction
from stablevm.support.options import require, writable
from stablevm.support.ranges import Count


@dataclass(frozen=True)
class ImportConfig:
    """Turn a published checkpoint of SiT, REPA, StableVelocity, REPA-E or LightningDiT into a checkpoint folder for
    `generate` and `train --init-from`. Sizes are read off the weights; nothing in the file is executed."""

    checkpoint: tyro.conf.Positional[Path]
    """The .pt file: named weights, taken for the moving average, or a dictionary that holds them as ema or model."""
    output: Path
    """New folder for model.json with ema.safetensors and model.safetensors, as far as the file holds them."""
    source: Literal["sit", "repa", "stablevelocity", "repae", "lightningdit"] | None = None
    """Whose training made it: the times of sit and lightningdit run from noise to data, the others' from data to noise.
    Default: told from the file, where it shows."""
    path_type: PathName | None = None
    """Path of the training; cosine is SiT's GVP. Needed where the file does not record it."""
    prediction: Prediction | None = None
    """What the network predicts: v, the velocity; x, the data. Needed where the file does not record it."""
    encoder_depth: Count | None = None
    """Block, from 1, whose tokens the projectors read. Needed where there are projectors and the file does not record
    it."""
    num_classes: Count | None = None
    """Number of classes, checked against the label table."""
    resolution: Count | None = None
    """Side of the images in pixels, checked against the positions of the tokens. Default: as many per latent pixel as
    the autoencoder has."""
    vae: str = "mse"
    """Autoencoder of the latents: mse or ema (Stable Diffusion's), identity, a hub name, or a folder."""
    latent_statistics: Path | None = None
    """LightningDiT's latents_stats.pt: mean and deviation of each channel of the latents in training. REPA-E's files
    hold their own."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        require(self, [writable("output", self.output)])
