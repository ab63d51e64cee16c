"""A loaded network and autoencoder, which make images by their indices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablevm.networks.autoencoder import Autoencoder, load_autoencoder
from stablevm.networks.backbone import Backbone
from stablevm.networks.snapshot import ModelCard, load_model
from stablevm.sampling.config import GenerateConfig
from stablevm.sampling.guidance import Guide, guidance_of, sample_latents
from stablevm.sampling.provenance import guide_card
from stablevm.solvers.settings import settings_of
from stablevm.support.errors import UserError
from stablevm.support.precision import tf32
from stablevm.support.rng import RowGenerators


def streams_of(seed: int, indices: Sequence[int]) -> RowGenerators:
    """The generators of the images with these indices, from which all their noise comes."""
    return RowGenerators.for_keys("generate", seed, positions=indices)


def load_guide(config: GenerateConfig, card: ModelCard, device: torch.device) -> Guide | None:
    """The weaker network of the options, if they name one; UserError if it does not fit the one with `card`."""
    theirs = guide_card(config, card)
    if config.guide_ckpt is None or theirs is None:
        return None
    model = load_model(config.guide_ckpt, theirs, weights=config.guide_weights, device=device)
    if config.compile:
        model.compile_blocks()
    return Guide(model, theirs, config.guide_scale, config.guide_low, config.guide_high)


@dataclass(frozen=True)
class ImageSampler:
    """Makes the images of a configuration by their indices."""

    config: GenerateConfig
    card: ModelCard
    model: Backbone
    autoencoder: Autoencoder
    device: torch.device
    guide: Guide | None = None

    @classmethod
    def load(cls, config: GenerateConfig, card: ModelCard, device: torch.device) -> "ImageSampler":
        """Load the networks of the options, and the autoencoder; UserError for weights that don't fit their cards."""
        model = load_model(config.ckpt, card, weights=config.weights, device=device)
        if config.compile:
            model.compile_blocks()
        autoencoder = load_autoencoder(card.latent, name=config.vae, device=device)
        return cls(config, card, model, autoencoder, device, load_guide(config, card, device))

    def sample(
        self,
        indices: Sequence[int],
        labels: Tensor,
        watch: Callable[[Tensor, Tensor, Tensor], None] | None = None,
    ) -> tuple[NDArray[np.uint8], int]:
        """The images uint8 (n, H, W, 3) with these indices and labels (n,), and the network evaluations per image.

        watch: as in `sample_latents`. Raises UserError for values that are not finite.
        """
        streams = streams_of(self.config.global_seed, indices)
        settings, guidance = settings_of(self.config), guidance_of(self.config)
        with tf32(self.config.tf32):
            latents, evaluations = sample_latents(
                self.model,
                self.card,
                labels,
                streams,
                settings,
                self.device,
                watch,
                guidance=guidance,
                guide=self.guide,
            )
            self._check_finite(latents, indices)
            return self.decode(latents), evaluations

    @property
    def image_side(self) -> int:
        """In pixels."""
        return self.decode(torch.zeros(1, *self.card.latent.shape)).shape[1]

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Decode latents to pixels uint8 (n, H, W, 3)."""
        return self.autoencoder.decode(latents.float()).permute(0, 2, 3, 1).numpy()

    def _check_finite(self, latents: Tensor, indices: Sequence[int]) -> None:
        broken = (~latents.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
        if broken:
            raise UserError(
                f"--precision {self.config.precision}: image {indices[broken[0]]} has values that are not finite; "
                "use fp32, or a checkpoint from before training diverged"
            )
