"""A tiny checkpoint with random weights, for tests that need a network but not a good one."""

import torch

from stablevm.networks.autoencoder import IDENTITY, LatentSpec
from stablevm.networks.registry import build_network
from stablevm.networks.sit_config import sit_config
from stablevm.networks.snapshot import ModelCard, save


def tiny_card(num_classes=4, prediction="v", path_type="linear", label_dropout=None, **model_options):
    """A card for grey images of 8 x 8."""
    model = sit_config("SiT-XXS/4", input_size=8, in_channels=1, num_classes=num_classes, **model_options)
    latent = LatentSpec(shape=(1, 8, 8), scale=1.0, shift=0.0, autoencoder=IDENTITY)
    names = tuple(f"class {index}" for index in range(num_classes))
    return ModelCard(model, latent, path_type, prediction, names, step=120, label_dropout=label_dropout)


def random_weights(card, seed):
    """Weights with no layer left at zero, so that the output depends on every input."""
    stream = torch.Generator().manual_seed(seed)
    state = build_network(card.model).state_dict()
    return {name: value + 0.1 * torch.randn(value.shape, generator=stream) for name, value in state.items()}


def save_checkpoint(folder, card, seed=0):
    save(folder, card, {"ema": random_weights(card, seed), "model": random_weights(card, seed + 1)})
    return folder
