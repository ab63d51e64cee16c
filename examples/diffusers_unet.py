"""The objective in a training loop of diffusers: a small UNet2DModel learns handwritten digits.

    pip install 'stablevm[all]'
    python examples/diffusers_unet.py

It makes diffusers_unet.png, with a row for each class. The two marked lines are all that StableVM needs.
"""

import torch
from diffusers import UNet2DModel
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn.functional import pad

from stablevm import ClassBank, ObjectiveSettings, StableVM, squared_error

NULL_CLASS = 10  # means "no class"; some labels are replaced by it, for classifier-free guidance


def load_images():
    """1,797 images (1, 8, 8) in [-1, 1], and their classes."""
    digits = load_digits()
    return torch.tensor(digits.images).float()[:, None] / 8 - 1, torch.tensor(digits.target).long()


def make_network(width=16):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(width, 2 * width),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        num_class_embeds=NULL_CLASS + 1,
    )


def train(steps, batch_size=64):
    images, labels = load_images()
    network, stream = make_network(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    protocol = ObjectiveSettings(label_dropout=0.1, null_class=NULL_CLASS, weighting="logit_normal")
    objective = StableVM(ClassBank(10, 256, shape=(1, 8, 8)), protocol)  # 1
    for step in range(steps):
        rows = torch.randint(len(images), (batch_size,), generator=stream)
        draw = objective.draw(images[rows], labels[rows], stream, ids=rows)  # 2
        velocity = network(draw.x_t, 1000 * draw.t, draw.labels).sample
        loss = squared_error(velocity, draw.target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    return network.eval()


@torch.no_grad()
def sample(network, labels, steps=30):
    x = torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for step in range(steps):
        t = torch.full((len(labels),), 1 - step / steps)
        x = x - network(x, 1000 * t, labels).sample / steps
    return x


def main(steps=300, picture="diffusers_unet.png"):
    network = train(steps)
    images = sample(network, torch.arange(10).repeat_interleave(10))
    tiles = pad(images, (2, 2, 2, 2), value=-1).reshape(10, 10, 12, 12).transpose(1, 2).reshape(120, 120)
    pixels = ((tiles + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    Image.fromarray(pixels).resize((720, 720), Image.Resampling.NEAREST).save(picture)
    return images


if __name__ == "__main__":
    main()
