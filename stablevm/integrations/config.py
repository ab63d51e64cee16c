"""The options of `stablevm import`, `push` and `export`. Free of torch, so that `--help` stays quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from stablevm.choices import PathName, Prediction, Weights
from stablevm.support.errors import UserError
from stablevm.support.files import check_output
from stablevm.support.hub import PREFIX, HubName, hub_name
from stablevm.support.options import require, writable
from stablevm.support.ranges import Count
from stablevm.support.text import printable


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


@dataclass(frozen=True)
class PushConfig:
    """Upload a checkpoint to the Hugging Face Hub: safetensors, model.json, and a page with its recipe, numbers and
    pictures. `generate --ckpt hf:OWNER/NAME` then takes it from there."""

    run: tyro.conf.Positional[Path]
    """Checkpoint folder, or a run's folder, for its newest."""
    name: tyro.conf.Positional[str]
    """OWNER/NAME of the repository, which is made if it is missing; OWNER/NAME@BRANCH for another branch than main."""
    weights: Literal["ema", "model", "both"] = "ema"
    """Which weights: ema, the moving average; model, those of the last step."""
    evaluations: tuple[Path, ...] = ()
    """Results of stablevm evaluate (JSON) for the page. The run's own evaluation at that step is there anyway."""
    pictures: tuple[Path, ...] = ()
    """Pictures (PNG) for the page, such as those of generate. The run's own grid of that step is there anyway."""
    license: str | None = None
    """Licence of the weights, as the hub abbreviates it, such as apache-2.0."""
    private: bool = False
    """Make a new repository private."""
    message: str | None = None
    """Message of the commit. Default: the network and the step."""
    readme: bool = True
    """Write the page, README.md; otherwise the one that is there stays."""
    output: Path | None = None
    """Write the files into this folder, to look at them, and upload nothing."""

    @property
    def repository(self) -> HubName:
        """The repository, and the branch as its revision; UserError for a name of another form."""
        found = hub_name(PREFIX + self.name.removeprefix(PREFIX))
        if found.file is not None:
            raise UserError(f"NAME {printable(self.name)}: expected OWNER/NAME, or OWNER/NAME@BRANCH")
        return found

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        require(self, [writable("output", self.output), ("message", self.message != "", "some words")])
        _ = self.repository
        names = [path.name for path in self.pictures]
        for path in self.pictures:
            if path.suffix != ".png" or names.count(path.name) > 1:
                raise UserError(f"--pictures {printable(str(path))}: expected PNG files (.png) of different names")


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint as a pipeline of diffusers: network, scheduler and autoencoder, in one folder.

    `StableVMPipeline.from_pretrained(FOLDER)` loads it. To complete it after an interruption, run it again.
    """

    run: tyro.conf.Positional[Path]
    """Checkpoint folder, a run's folder, for its newest, or hf:OWNER/NAME[@REVISION], on the Hugging Face Hub."""
    folder: tyro.conf.Positional[Path]
    """New folder for the pipeline."""
    weights: Weights = "ema"
    """ema: the moving average of the weights. model: the weights of the last training step."""
    vae: str | None = None
    """Autoencoder for the pipeline: ema, mse, or the folder of one. Default: the one that the checkpoint records."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        check_output(f"FOLDER {self.folder}", self.folder, is_folder=True)
