"""An AutoencoderKL of diffusers for small images, with which the published path through latents runs on a CPU.

    stablevm prepare digits digits
    python examples/tiny_autoencoder.py digits autoencoder --latent-channels 4 --latent-side 4
    stablevm prepare encode --data-dir CONVERTED --vae autoencoder

It learns from the images of a prepared data set, needs no labels, and writes a folder for `--vae`. Latents of 4 x 8 x 8
and of 16 x 4 x 4 are usual for images of 32 pixels. docs/experiments.md has all commands for Fashion-MNIST.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from stablevm.data.opening import open_dataset

WIDTHS = (16, 32, 64, 64)  # channels at the full side, at half of it, and so on
KL_WEIGHT = 1e-4  # of the latents' divergence from N(0, 1) beside the pixels' error


def make_autoencoder(side, latent_channels, latent_side):
    levels = (side // latent_side).bit_length()
    if latent_side * 2 ** (levels - 1) != side or not 1 <= levels <= len(WIDTHS):
        raise SystemExit(f"--latent-side {latent_side}: expected {side} divided by 1, 2, 4 or 8")
    return AutoencoderKL(
        latent_channels=latent_channels,
        block_out_channels=WIDTHS[:levels],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=8,
        sample_size=side,
        mid_block_add_attention=False,
    )


def main(data, output, latent_channels=4, latent_side=8, steps=2000, batch_size=32, seed=0):
    """Train the autoencoder and write it; returns the mean absolute error of pixels in [-1, 1] at each step."""
    if output.exists():
        raise SystemExit(f"{output}: exists already; remove it or give another folder")
    generator = torch.Generator().manual_seed(seed)
    dataset = open_dataset(data)
    with torch.random.fork_rng():  # diffusers draws the weights from the global random state
        torch.manual_seed(seed)
        model = make_autoencoder(dataset.resolution, latent_channels, latent_side)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    errors = []
    for step in range(steps):
        rows = torch.randint(len(dataset), (batch_size,), generator=generator)
        images = dataset.images(rows.tolist()).float() / 127.5 - 1
        latents = model.encode(images).latent_dist
        error = (model.decode(latents.sample(generator)).sample - images).abs().mean()
        optimizer.zero_grad()
        (error + KL_WEIGHT * latents.kl().mean() / latents.mean[0].numel()).backward()
        optimizer.step()
        schedule.step()
        errors.append(error.item())
        if step % 100 == 0:
            print(f"step {step}: mean error of pixels {error.item():.3f}", flush=True)
    images = dataset.images(range(min(1000, len(dataset)))).float() / 127.5 - 1
    with torch.no_grad():
        latents = model.eval().encode(images).latent_dist.sample(generator)
    # networks see latents of mean 0 and deviation 1
    model.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    temporary = output.with_name(f"{output.name}.part")
    model.save_pretrained(temporary)
    temporary.rename(output)
    return errors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="prepared data set with images")
    parser.add_argument("output", type=Path, help="folder to write")
    for name, default in {"latent-channels": 4, "latent-side": 8, "steps": 2000, "batch-size": 32, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    main(**vars(parser.parse_args()))
