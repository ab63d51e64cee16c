"""Evaluating digits and other small images: the extractor, which is trained on real ones, its command, and the metrics.

The metrics say whether samples are of the right class, realistic, varied, and not copies. None of them is FID, because
the features come from the extractor that the results name, not from Inception.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from stablevm.data.dataset import PreparedDataset
from stablevm.data.manifest import MANIFEST_FILE
from stablevm.data.opening import open_dataset
from stablevm.evaluation.config import ExtractorConfig
from stablevm.metrics.neighbours import (
    COVERAGE_K,
    PRECISION_RECALL_K,
    memorised_share,
    nearest_distance,
    neighbourhood,
)
from stablevm.metrics.statistics import FeatureStatistics, frechet_distance
from stablevm.networks.autoencoder import pixels_to_unit
from stablevm.networks.small_net import DIGITS_CLASSES, DIGITS_SIDE, SmallNet
from stablevm.support import rng
from stablevm.support.cards import read_card
from stablevm.support.errors import UserError
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
    data_sha256: str  # of the training split's manifest, which holds the checksums of its shards
    test_sha256: str | None = None  # of the test split's; None in files of earlier versions

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
    _check_fits(test, net)
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


def digits_splits(reference: Path) -> tuple[PreparedDataset, PreparedDataset]:
    """Open the training and test splits of a reference; UserError if the folder is one data set without splits."""
    train, test = open_dataset(reference, "train"), open_dataset(reference, "test")
    if train.folder == test.folder:
        raise UserError(
            f"--reference {reference}: one data set, not a folder with the splits train and test; give their folder"
        )
    return train, test


def _check_fits(dataset: PreparedDataset, net: SmallNet) -> None:
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
    """A checksum of the data set's content: the digest of its manifest, which holds the digests of its shards."""
    return sha256(dataset.folder / MANIFEST_FILE)


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
    """The extractor in the output folder, trained first if missing; UserError if it has another seed."""
    with owned(config.output_dir):
        return _extractor(config)


def _extractor(config: ExtractorConfig) -> DigitsExtractor:
    folder = config.output_dir
    if (folder / "extractor.json").exists():
        found = load_extractor(folder)
        for what, theirs, ours in (("seed", found.seed, config.seed), ("steps", found.steps, config.steps)):
            if theirs != ours:
                raise UserError(f"{folder} holds an extractor of {what} {theirs}, not {ours}; give another folder")
        print(f"{folder}: the extractor exists already")
    else:
        splits = open_dataset(config.data_dir), open_dataset(config.data_dir, "test")
        with tqdm(desc="extractor", unit="step") as bar:

            def show(step: int, steps: int) -> None:
                bar.total = steps
                bar.update(step - bar.n)

            found = train_extractor(*splits, seed=config.seed, steps=config.steps, progress=show)
        save_extractor(folder, found)
    print(f"extractor: {found.test_accuracy:.1%} of the test images recognised")
    return found


def evaluate_digits(
    images: Tensor,
    labels: Tensor,
    reference: PreparedDataset,
    train: PreparedDataset,
    extractor: DigitsExtractor,
) -> dict[str, Any]:
    """Compare generated images uint8 (N, side, side, 3) of the classes `labels` (N,) with real ones.

    `reference` is the test split, `train` the split on which the generator was trained. The extractor was trained on
    `train` too, or on other data of which `reference` was the test split. Keys of the result:

    - `accuracy`: share of the images that the extractor recognises as their class
    - `frechet_test`: Fréchet distance to the reference; `frechet_floor`: the same of `train`, what real images get
    - `precision`, `recall`, `coverage` against the reference, in [0, 1]; `density` against it, about 1 for real images
    - `nearest_train`: `min` and `median` over the images of the Euclidean distance to the nearest of `train`, over
      grey pixels in [-1, 1]; near 0 are copies. `nearest_train_of_test`: the same of the reference's images
    - `memorisation`: share of the images that are nearer to one of `train` than 99 of 100 of the reference's images are
      (`neighbours.memorised_share`)
    - `extractor`, `extractor_test_accuracy`, `num_samples`

    UserError for images or labels of another type, shape or range, for too few of them, and for data sets that the
    extractor is not made for.
    """
    _check_data(reference, train, extractor)
    _check_samples(images, labels, extractor.net)
    samples, test_images, train_images = images.permute(0, 3, 1, 2), all_images(reference), all_images(train)
    features, classes = extractor.read(samples)
    test_features, _ = extractor.read(test_images)
    train_features, _ = extractor.read(train_images)
    found = neighbourhood(test_features, features)
    copies, unseen = (_to_nearest(each, train_images) for each in (samples, test_images))
    test_statistics = FeatureStatistics.from_features(test_features)
    return {
        "num_samples": len(images),
        "accuracy": float((classes == labels).double().mean()),
        "frechet_test": frechet_distance(FeatureStatistics.from_features(features), test_statistics),
        "frechet_floor": frechet_distance(FeatureStatistics.from_features(train_features), test_statistics),
        "precision": found.precision,
        "recall": found.recall,
        "density": found.density,
        "coverage": found.coverage,
        "nearest_train": _summary(copies),
        "nearest_train_of_test": _summary(unseen),
        "memorisation": memorised_share(copies, unseen),
        "extractor": extractor.name,
        "extractor_test_accuracy": extractor.test_accuracy,
    }


def digits_rows(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What `evaluate_digits` returned as rows (measure, value, meaning), the column names first; fixed decimals."""
    one, many = ("digit", "digits") if results["extractor"] == NAME else ("image", "images")
    nearest, nearest_test = results["nearest_train"], results["nearest_train_of_test"]
    rows: list[tuple[str, float, int, str]] = [  # with the number of decimals
        ("accuracy", results["accuracy"], 3, "share that the extractor recognises as their class"),
        ("Fréchet distance", results["frechet_test"], 2, f"to the test {many}; lower is closer"),
        ("its floor", results["frechet_floor"], 2, f"the same distance of the real training {many}"),
        ("precision", results["precision"], 3, f"share near a test {one}, k = {PRECISION_RECALL_K}"),
        ("recall", results["recall"], 3, f"share of test {many} near a sample, k = {PRECISION_RECALL_K}"),
        ("density", results["density"], 3, f"test {many} close by, over k = {COVERAGE_K}; about 1 for real {many}"),
        ("coverage", results["coverage"], 3, f"share of test {many} with a sample close by, k = {COVERAGE_K}"),
        ("nearest, smallest", nearest["min"], 2,
         f"pixel distance to the closest training {one}; for test {many} {nearest_test['min']:.2f}"),
        ("nearest, median", nearest["median"], 2, f"the same; for test {many} {nearest_test['median']:.2f}"),
        ("memorisation", results["memorisation"], 3,
         f"share nearer to a training {one} than 99 of 100 test {many}; 0.01 for new images"),
    ]  # fmt: skip
    return [
        ("measure", "value", "meaning"),
        ("samples", f"{results['num_samples']:,}", "generated images"),
        *((measure, f"{value:.{decimals}f}", meaning) for measure, value, decimals, meaning in rows),
        ("extractor", results["extractor"], f"test accuracy {results['extractor_test_accuracy']:.4f}"),
    ]


def _to_nearest(queries: Tensor, points: Tensor) -> Tensor:
    return nearest_distance(to_grey(queries).flatten(1), to_grey(points).flatten(1))


def _summary(distances: Tensor) -> dict[str, float]:
    return {"min": float(distances.min()), "median": float(distances.median())}


def _check_data(reference: PreparedDataset, train: PreparedDataset, extractor: DigitsExtractor) -> None:
    for dataset in (reference, train):
        _check_fits(dataset, extractor.net)
    if data_checksum(train) != extractor.data_sha256 and data_checksum(reference) != extractor.test_sha256:
        raise UserError(
            f"{train.folder}: not the data on which the extractor was trained, so it may have seen the test images; "
            "train an extractor on it, or on other data with the same test split"
        )


def _check_samples(images: Tensor, labels: Tensor, net: SmallNet) -> None:
    shape, dtype = tuple(images.shape), str(images.dtype).removeprefix("torch.")
    if dtype != "uint8":
        raise UserError(f"samples: images of type {dtype}, expected uint8; round floats to levels 0 to 255 first")
    if len(shape) != 4 or shape[1:] != (net.side, net.side, 3):
        raise UserError(f"samples: images of shape {shape}, expected (N, {net.side}, {net.side}, 3)")
    if len(images) < 2:
        raise UserError(f"samples: {len(images)} images; generate more, some hundreds for stable numbers")
    if labels.is_floating_point() or labels.shape != (len(images),):
        kind = str(labels.dtype).removeprefix("torch.")
        raise UserError(
            f"samples: labels are {kind} {tuple(labels.shape)}, expected one integer per image: ({len(images)},)"
        )
    wrong = (labels < 0) | (labels >= net.classes)
    if wrong.any():
        raise UserError(f"samples: label {int(labels[wrong][0])}, expected classes 0 to {net.classes - 1}")
