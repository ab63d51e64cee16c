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
    """Convert a published checkpoint of SiT, REPA, StableVelocity, REPA-E, LightningDiT or REG into a checkpoint folder
    for `generate` and `train --init-from`. Sizes are inferred from the weights; no code in the file runs."""

    checkpoint: tyro.conf.Positional[Path]
    """The .pt file: weights by name, taken as the moving average, or a dictionary with them as ema or model; or weights
    in .safetensors. hf:OWNER/NAME/FILE[@REVISION] is fetched from the Hugging Face Hub; FILE may be left out if there
    is only one."""
    output: Path
    """New folder for model.json with ema.safetensors and model.safetensors, if the file has both."""
    source: Literal["sit", "repa", "stablevelocity", "repae", "lightningdit"] | None = None
    """Project that trained it; repa also for REG. The times of sit and lightningdit run from noise to data, those of
    others from data to noise. Default: as the file shows."""
    path_type: PathName | None = None
    """Path of the training; cosine is SiT's GVP. Required if the file does not record it."""
    prediction: Prediction | None = None
    """What the network predicts: v, the velocity; x, the data. Required if the file does not record it."""
    encoder_depth: Count | None = None
    """Block, from 1, whose tokens the projectors read. Required if there are projectors and the file does not record
    it."""
    num_classes: Count | None = None
    """Number of classes, checked against the label table."""
    resolution: Count | None = None
    """Side of the images in pixels, checked against the positions of the tokens. Default: as many per latent pixel as
    the autoencoder has."""
    vae: str | None = None
    """Autoencoder of the latents: mse or ema (Stable Diffusion's), identity, a hub name, or a folder. Default: mse.
    Required for REPA-E, which tuned its own."""
    latent_statistics: Path | None = None
    """LightningDiT's latents_stats.pt: mean and deviation of each channel of the latents in training. REPA-E's files
    hold their own."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        require(self, [writable("output", self.output)])
