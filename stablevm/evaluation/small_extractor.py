"""The extractor for digits and other small images, trained on real ones, and its command `stablevm extractor`."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stablevm.data.dataset import PreparedDataset, digest
from stablevm.data.manifest import MANIFEST_FILE
from stablevm.data.opening import open_dataset
from stablevm.evaluation.config import ExtractorConfig
from stablevm.networks.autoencoder import pixels_to_unit
from stablevm.networks.small_net import DIGITS_CLASSES, DIGITS_SIDE, SmallNet
from stablevm.support import rng
from stablevm.support.bars import progress_bar
from stablevm.support.cards import read_card
from stablevm.support.errors import UserError, arg
from stablevm.support.files import sha256, write_json
from stablevm.support.locks import owned
from stablevm.support.tensor_files import save_tensors

NAME, SMALL_NAME = "digits-cnn", "small-cnn"  # for digits of 8 pixels, and for other images
WEIGHTS_FILE = "extractor.safetensors"
CARD_FILE = "extractor.json"
FORMAT_VERSION = 1
_REMEDY = "train the extractor again"

# The recipe for digits, measured over three seeds (docs/experiments.md); other images take it too.
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
WARMUP_SHARE = 0.1  # of the steps, with a linear rate; then a cosine to zero
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.05
ROTATION = math.radians(12)  # this and the next three: largest absolute value of a uniform draw
SCALE = 0.12
SHEAR = 0.1
SHIFT = 0.2  # where the image is 2 wide: a tenth of its side
NOISE = 0.1  # standard deviation, for pixels in [-1, 1]

READ_BLOCK = 1024  # images per forward pass


@dataclass(frozen=True)
class _Card:
    """The contents of the file beside the weights."""

    name: Literal["digits-cnn", "small-cnn"]
    test_accuracy: float
    seed: int
    steps: int
    data_sha256: str
    test_sha256: str | None = None
    side: int = DIGITS_SIDE
    channels: int = 1
    classes: int = DIGITS_CLASSES


@dataclass(frozen=True)
class DigitsExtractor:
    """A trained extractor, in evaluation mode and without gradients, with facts about its training."""

    net: SmallNet
    test_accuracy: float
    seed: int
    steps: int
    data_sha256: str  # of the images and classes of the training split
    test_sha256: str | None = None  # of the test split; None in files of earlier versions

    @property
    def name(self) -> str:
        return NAME if (self.net.side, self.net.classes) == (DIGITS_SIDE, DIGITS_CLASSES) else SMALL_NAME

    def read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The features (n, 64) and predicted classes (n,) of uint8 images (n, 3, side, side)."""
        found = []
        with torch.no_grad():
            for block in images.split(READ_BLOCK):
                features = self.net.features(_input(block, self.net.channels))
                found.append((features, self.net.head(features).argmax(1)))
        return torch.cat([features for features, _ in found]), torch.cat([classes for _, classes in found])


def train_extractor(
    dataset: PreparedDataset,
    test: PreparedDataset,
    *,
    seed: int,
    steps: int = 1500,
    progress: Callable[[int, int], object] | None = None,
) -> DigitsExtractor:
    """Train an extractor on `dataset` and measure its accuracy on `test`.

    progress: called as progress(step, steps) after each step. All random numbers depend on `seed`; the global random
    state is not changed. UserError for images whose size `SmallNet` does not take, for splits that do not fit
    together, and for `steps` below 1.
    """
    if steps < 1:
        raise UserError(f"extractor: {steps} training steps; give at least 1")
    dataset.check_images()
    pixels, labels = all_images(dataset), dataset.labels()
    side, channels, classes = dataset.resolution, _channels(pixels), dataset.num_classes
    try:
        net = SmallNet(rng.generator(NAME, seed, "weights"), side=side, channels=channels, classes=classes)
    except UserError as error:
        raise UserError(f"{dataset.folder}: {error}") from None
    check_fits(test, net)
    generator = rng.generator(NAME, seed, "batches")
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate_factor(step, steps))
    for step in range(1, steps + 1):
        rows = torch.randint(len(pixels), (BATCH_SIZE,), generator=generator)
        logits = net(_augment(_input(pixels[rows], channels), generator))
        loss = F.cross_entropy(logits, labels[rows], label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step, steps)
    net.eval().requires_grad_(False)
    trained = DigitsExtractor(net, 0.0, seed, steps, data_checksum(dataset), data_checksum(test))
    accuracy = float((trained.read(all_images(test))[1] == test.labels()).double().mean())
    return replace(trained, test_accuracy=accuracy)


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
        "test_sha256": extractor.test_sha256,
        "side": extractor.net.side,
        "channels": extractor.net.channels,
        "classes": extractor.net.classes,
    }
    write_json(folder / CARD_FILE, card)


def load_extractor(folder: str | Path) -> DigitsExtractor:
    """Read an extractor saved by `save_extractor`; UserError if a file is missing, damaged or of another version."""
    folder = Path(folder)
    card = read_card(folder / CARD_FILE, _Card, "--extractor", version=FORMAT_VERSION, remedy=_REMEDY)
    try:
        net = SmallNet(side=card.side, channels=card.channels, classes=card.classes)
    except UserError as error:
        raise UserError(f"--extractor {folder / CARD_FILE}: {error}") from None
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
            f"--extractor {folder}: {WEIGHTS_FILE} is of another network; train the extractor again"
        ) from None
    net.eval().requires_grad_(False)
    return DigitsExtractor(net, card.test_accuracy, card.seed, card.steps, card.data_sha256, card.test_sha256)


def digits_splits(folder: Path, option: str = "reference") -> tuple[PreparedDataset, PreparedDataset]:
    """Open the training and test splits of the folder that `option` names; UserError if it is one data set."""
    train, test = open_dataset(folder, "train"), open_dataset(folder, "test")
    if train.folder == test.folder:
        raise UserError(
            f"{arg(option)} {folder}: one data set, not a folder with the splits train and test; give their folder "
            "(stablevm prepare convert --part makes them from one source)"
        )
    return train, test


def check_fits(dataset: PreparedDataset, net: SmallNet) -> None:
    """Raise UserError unless the images have the size and number of classes that the extractor needs."""
    dataset.check_images()
    if (dataset.resolution, dataset.num_classes) != (net.side, net.classes):
        raise UserError(
            f"{dataset.folder}: {dataset.num_classes} classes of {dataset.resolution}-pixel images, but the extractor "
            f"evaluates {net.classes} classes of {net.side}-pixel images"
        )


def _channels(images: Tensor) -> int:
    """1 for grey images uint8 (N, 3, H, W), whose channels are equal, else 3."""
    return 1 if torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2]) else 3


def _input(images: Tensor, channels: int) -> Tensor:
    """What a network of 1 or 3 channels takes of uint8 images (n, 3, H, W): floats (n, channels, H, W) in [-1, 1]."""
    return to_grey(images) if channels == 1 else pixels_to_unit(images)


def to_grey(images: Tensor) -> Tensor:
    """Convert uint8 images (n, 3, H, W) to grey, the mean over channels: float32 (n, 1, H, W) in [-1, 1]."""
    return pixels_to_unit(images).mean(1, keepdim=True)


def all_images(dataset: PreparedDataset) -> Tensor:
    """All images uint8 (N, 3, H, W), in the order of the labels."""
    return dataset.images(range(len(dataset)))


def data_checksum(dataset: PreparedDataset) -> str:
    """A checksum of the images, in their order, with their classes. Latents of any autoencoder may lie beside them."""
    known = dataset.fingerprint(with_images=True)
    return digest([known.class_names, known.images, dataset.labels().numpy().tobytes()])


def is_same_data(dataset: PreparedDataset, checksum: str | None) -> bool:
    """Whether `checksum` is that of this data. Extractors of version 0.1 recorded the digest of the manifest."""
    manifest = dataset.folder / MANIFEST_FILE
    return checksum == data_checksum(dataset) or (manifest.is_file() and checksum == sha256(manifest))


def _rate_factor(step: int, steps: int) -> float:
    """The learning rate at `step` = 0, 1, ... relative to its peak."""
    warmup = WARMUP_SHARE * steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, scale, shear and shift each image a little, with a black border (-1), and add noise."""
    rotation, scale, shear, right, down = 2 * torch.rand(5, len(images), generator=generator) - 1
    angle, zoom = ROTATION * rotation, 1 + SCALE * scale
    cosine, sine = zoom * angle.cos(), zoom * angle.sin()
    rows = [cosine, SHEAR * shear - sine, SHIFT * right, sine, cosine, SHIFT * down]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
    moved = F.grid_sample(images + 1, grid, align_corners=False) - 1  # grid_sample fills with 0
    return moved + NOISE * torch.randn(images.shape, generator=generator)


def extractor(config: ExtractorConfig) -> DigitsExtractor:
    """The extractor in the output folder, trained first if missing; UserError if its seed or data are others."""
    with owned(config.output_dir):
        return _extractor(config)


def _extractor(config: ExtractorConfig) -> DigitsExtractor:
    folder = config.output_dir
    splits = digits_splits(config.data_dir, "data_dir")
    if (folder / "extractor.json").exists():
        found = load_extractor(folder)
        for what, theirs, ours in (("seed", found.seed, config.seed), ("steps", found.steps, config.steps)):
            if theirs != ours:
                raise UserError(f"{folder} holds an extractor of {what} {theirs}, not {ours}; give another folder")
        if not all(map(is_same_data, splits, (found.data_sha256, found.test_sha256))):
            raise UserError(f"{folder} holds an extractor of other data than {config.data_dir}; give another folder")
        print(f"{folder}: the extractor exists already")
    else:
        with progress_bar(desc="extractor", unit="step") as bar:

            def show(step: int, steps: int) -> None:
                bar.total = steps
                bar.update(step - bar.n)

            found = train_extractor(*splits, seed=config.seed, steps=config.steps, progress=show)
        save_extractor(folder, found)
    print(f"extractor: {found.test_accuracy:.1%} of the test images recognised")
    return found
