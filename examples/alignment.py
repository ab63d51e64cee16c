"""VA-REPA in a plain PyTorch loop: hidden tokens of a small transformer are aligned with those of a frozen encoder.

    python examples/alignment.py

The perturbed samples come from the bank, so they are not those of the batch: `draw.ids` has the rows of the data set
whose images the encoder must see. The encoder here is the first half of a classifier of digits, trained first. Any
frozen module from images to tokens (B, T, D) will do; `stablevm.networks.encoders.load_encoder` loads DINOv2.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from stablevm import AlignmentSchedule, ClassBank, StableVM, alignment_loss, squared_error, weighted_alignment

COEFFICIENT = 0.5  # of the alignment term, as published
WIDTH, FEATURES, PATCHES = 64, 32, 16


def make_encoder(images, digits, steps):
    """A frozen function from images (B, 1, 8, 8) to tokens (B, 16, 32), one for each 2 x 2 pixels."""
    features = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, FEATURES, 2, stride=2), nn.SiLU())
    classifier = nn.Sequential(features, nn.Flatten(), nn.Linear(PATCHES * FEATURES, 10))
    optimizer = torch.optim.Adam(classifier.parameters(), lr=2e-3)
    for _ in range(steps):
        rows = torch.randint(len(images), (256,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(classifier(images[rows]), digits[rows]).backward()
        optimizer.step()
    return lambda images: features(images).flatten(2).mT.detach()


class Network(nn.Module):
    """Predicts the velocity of images (B, 1, 8, 8), and the encoder's tokens from those after its first block."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, stride=2)
        self.places = nn.Parameter(0.02 * torch.randn(PATCHES, WIDTH))
        self.time, self.digit = nn.Linear(1, WIDTH), nn.Embedding(10, WIDTH)
        blocks = [nn.TransformerEncoderLayer(WIDTH, 4, 128, 0, batch_first=True, norm_first=True) for _ in range(3)]
        self.first, self.others = blocks[0], nn.Sequential(*blocks[1:])
        self.project = nn.Sequential(nn.Linear(WIDTH, 128), nn.SiLU(), nn.Linear(128, FEATURES))
        self.out = nn.Linear(WIDTH, 4)

    def forward(self, x, t, digits):
        condition = self.time(t[:, None]) + self.digit(digits)
        tokens = self.first(self.patches(x).flatten(2).mT + self.places + condition[:, None])
        patches = self.out(self.others(tokens)).mT.reshape(len(x), 4, 4, 4)
        return nn.functional.pixel_shuffle(patches, 2), self.project(tokens)


def main(steps=400, encoder_steps=200):
    torch.manual_seed(0)
    data, stream = load_digits(), torch.Generator().manual_seed(0)
    images, digits = torch.tensor(data.images).float()[:, None] / 8 - 1, torch.tensor(data.target)
    encoder, network = make_encoder(images, digits, encoder_steps), Network()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    objective = StableVM(ClassBank(10, 256, shape=(1, 8, 8)))
    schedule = AlignmentSchedule("sigmoid", tau=0.7)  # `stablevm variance` measures tau on your data
    results = []
    for step in range(steps):
        rows = torch.randint(len(images), (64,), generator=stream)
        draw = objective.draw(images[rows], digits[rows], stream, ids=rows)
        velocity, tokens = network(draw.x_t, draw.t, draw.labels)
        losses = alignment_loss(tokens, encoder(images[draw.ids]))  # the clean images that made x_t
        alignment = weighted_alignment(losses, schedule(draw.t))
        loss = squared_error(velocity, draw.target).mean() + COEFFICIENT * alignment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        results.append((loss.item() - COEFFICIENT * alignment.item(), -alignment.item()))
        if step % 50 == 0 or step == steps - 1:
            print("step {}: velocity loss {:.3f}, cosine with the encoder {:.3f}".format(step, *results[-1]))
    return results


if __name__ == "__main__":
    main()
