"""A tiny AutoencoderKL with random weights, saved as a folder: four channels, an eighth of the side."""

import pytest
import torch


def save_tiny_vae(folder, scaling_factor=0.18215):
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = diffusers.AutoencoderKL(
            block_out_channels=(4, 4, 4, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=2,
            layers_per_block=1,
            scaling_factor=scaling_factor,
        )
    model.save_pretrained(folder)
    return folder
