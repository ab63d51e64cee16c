"""The extractor for digits: a small network, trained in seconds on real ones, that classifies and gives features."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stablevm.data.dataset import PreparedDataset
from stablevm.data.manifest import MANIFEST_FILE
from stablevm.networks.autoencoder import pixels_to_unit
from stablevm.networks.digits_net import CLASSES, IMAGE_SIZE, DigitsNet
from stablevm.support import rng
from stablevm.support.cards import read_card
from stablevm.support.errors import UserError
from stablevm.support.files import sha256, write_json
from stablevm.support.tensor_files import save_tensors

NAME = "digits-cnn"
WEIGHTS_FILE = "extractor.safetensors"
CARD_FILE = "extractor.json"
FORMAT_VERSION = 1
_REMEDY = "train the extractor again"

# The recipe, measured over three seeds (docs/experiments.md).
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
WARMUP_SHARE = 0.1  # of the steps, linear; then a cosine to zero
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.05
ROTATION = math.radians(12)  # this and the next three: largest absolute value of a uniform draw
SCALE = 0.12
SHEAR = 0.1
SHIFT = 0.2  # where the image is 2 wide: 0.8 of its 8 pixels
NOISE = 0.1  # standard deviation, for pixels in [-1, 1]

READ_BLOCK = 1024  # images per forward pass


@dataclass(frozen=True)
class _Card:
    """The file beside the weights."""

    name: Literal["digits-cnn"]
    test_accuracy: float
    seed: int
    steps: int
    data_sha256: str


@dataclass(frozen=True)
class DigitsExtractor:
    """A trained extractor, in evaluation mode and without gradients, with the facts that belong beside its numbers."""

    net: DigitsNet
    test_accuracy: float
    seed: int
    steps: int
    data_sha256: str  # of the training split's manifest, which holds the checksums of its shards

    @property
    def name(self) -> str:
        return NAME

    def read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (n, 64) and predicted classes (n,) of uint8 images (n, 3, 8, 8)."""
        blocks = to_grey(images).split(READ_BLOCK)
        with torch.no_grad():
            features = torch.cat([self.net.features(block) for block in blocks])
            classes = torch.cat([self.net(block).argmax(1) for block in blocks])
        return features, classes


def train_extractor(
    dataset: PreparedDataset,
    test: PreparedDataset,
    *,
    seed: int,
    steps: int = 1500,
    progress: Callable[[int, int], object] | None = None,
) -> DigitsExtractor:
    """Train on `dataset`, measure the accuracy on `test`; `progress(step, steps)` is called after each step.

    Everything random follows from `seed`; the global random state is left as it was. UserError for data sets that
    are not 8 x 8 digits, and for `steps` below 1.
    """
    if steps < 1:
        raise UserError(f"extractor: {steps} training steps; give at least 1")
    for split in (dataset, test):
        check_digits(split)
    images, labels = to_grey(all_images(dataset)), dataset.labels()
    stream = rng.generator(NAME, seed, "batches")
    net = DigitsNet(rng.generator(NAME, seed, "weights"))
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate_factor(step, steps))
    for step in range(1, steps + 1):
        rows = torch.randint(len(images), (BATCH_SIZE,), generator=stream)
        logits = net(_augment(images[rows], stream))
        loss = F.cross_entropy(logits, labels[rows], label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step, steps)
    net.eval().requires_grad_(False)
    accuracy = float((net(to_grey(all_images(test))).argmax(1) == test.labels()).double().mean())
    return DigitsExtractor(net, accuracy, seed, steps, data_checksum(dataset))


def save_extractor(folder: str | Path, extractor: DigitsExtractor) -> None:
    """Write `extractor.safetensors`, then `extractor.json`."""
    folder = Path(folder)
    save_tensors(folder / WEIGHTS_FILE, extractor.net.state_dict())
    card = {
        "format_version": FORMAT_VERSION,
        "name": extractor.name,
        "test_accuracy": extractor.test_accuracy,
        "seed": extractor.seed,
        "steps": extractor.steps,
        "data_sha256": extractor.data_sha256,
    }
    write_json(folder / CARD_FILE, card)


def load_extractor(folder: str | Path) -> DigitsExtractor:
    """Read what `save_extractor` wrote; UserError when a file is absent, damaged or of another format version."""
    folder = Path(folder)
    card = read_card(folder / CARD_FILE, _Card, "--extractor", version=FORMAT_VERSION, remedy=_REMEDY)
    net = DigitsNet()
    try:
        net.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except FileNotFoundError:
        raise UserError(f"--extractor {folder}: {WEIGHTS_FILE} is missing; train the extractor again") from None
    except SafetensorError as error:
        raise UserError(
            f"--extractor {folder}: {WEIGHTS_FILE} is damaged ({error}); train the extractor again"
        ) from None
    except RuntimeError:
        raise UserError(
            f"--extractor {folder}: {WEIGHTS_FILE} is another network's; train the extractor again"
        ) from None
    net.eval().requires_grad_(False)
    return DigitsExtractor(net, card.test_accuracy, card.seed, card.steps, card.data_sha256)


def check_digits(dataset: PreparedDataset) -> None:
    """UserError unless the data set holds images of the size and number of classes that the extractor is made for."""
    dataset.check_images()
    if (dataset.resolution, dataset.num_classes) != (IMAGE_SIZE, CLASSES):
        raise UserError(
            f"{dataset.folder}: {dataset.num_classes} classes of {dataset.resolution}-pixel images, but the extractor "
            f"{NAME} evaluates {CLASSES} classes of {IMAGE_SIZE}-pixel images"
        )


def to_grey(images: Tensor) -> Tensor:
    """uint8 (n, 3, H, W) to the mean of its channels: float32 (n, 1, H, W) in [-1, 1]."""
    return pixels_to_unit(images).mean(1, keepdim=True)


def all_images(dataset: PreparedDataset) -> Tensor:
    """uint8 (N, 3, H, W), in the order of the labels."""
    return dataset.images(range(len(dataset)))


def data_checksum(dataset: PreparedDataset) -> str:
    """Names the data set's content: the digest of its manifest, which holds the digest of each shard."""
    return sha256(dataset.folder / MANIFEST_FILE)


def _rate_factor(step: int, steps: int) -> float:
    """Share of the peak rate at `step` = 0, 1, ..."""
    warmup = WARMUP_SHARE * steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def _augment(images: Tensor, stream: torch.Generator) -> Tensor:
    """Each image rotated, scaled, sheared and shifted a little, the uncovered border black (-1), then noise."""
    rotation, scale, shear, right, down = 2 * torch.rand(5, len(images), generator=stream) - 1
    angle, zoom = ROTATION * rotation, 1 + SCALE * scale
    cosine, sine = zoom * angle.cos(), zoom * angle.sin()
    rows = [cosine, SHEAR * shear - sine, SHIFT * right, sine, cosine, SHIFT * down]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
    moved = F.grid_sample(images + 1, grid, align_corners=False) - 1  # grid_sample fills with 0
    return moved + NOISE * torch.randn(images.shape, generator=stream)
