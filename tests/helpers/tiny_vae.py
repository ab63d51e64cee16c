"""A tiny AutoencoderKL with random weights, saved as a folder."""

import pytest
import torch


def save_tiny_vae(folder, widths=(4, 4, 4, 8), **options):
    """By default its latents have four channels; each width but the last halves the side."""
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = diffusers.AutoencoderKL(
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            norm_num_groups=2,
            **{"latent_channels": 4, "layers_per_block": 1, **options},
        )
    model.save_pretrained(folder)
    return folder
