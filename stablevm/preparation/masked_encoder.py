"""The command `stablevm encoder`: an encoder for alignment, trained on a data set's images without their labels."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from stablevm.data.dataset import PreparedDataset
from stablevm.data.opening import open_dataset
from stablevm.networks.autoencoder import pixels_to_unit
from stablevm.networks.masked_net import MaskedAutoencoder, MaskedNet
from stablevm.preparation.config import EncoderConfig
from stablevm.support import rng
from stablevm.support.bars import progress_bar
from stablevm.support.cards import read_card
from stablevm.support.errors import UserError
from stablevm.support.files import write_json
from stablevm.support.locks import owned
from stablevm.support.machine import gigabytes
from stablevm.support.tensor_files import save_tensors

WEIGHTS_FILE, CARD_FILE = "encoder.safetensors", "encoder.json"
FORMAT_VERSION = 1
# As MAE's, but for the rate, which is of smaller batches, and the average of squared gradients.
BATCH_SIZE = 64
LEARNING_RATE, WEIGHT_DECAY, BETAS = 2e-3, 0.05, (0.9, 0.95)
WARMUP_SHARE = 0.1  # of the steps, with a linear rate; then a cosine to zero
READ_BLOCK = 512  # images per forward pass
NEIGHBOUR_QUERIES, NEIGHBOUR_DATA = 1000, 10_000  # images of the test split, and of the training split


@dataclass(frozen=True)
class EncoderCard:
    """What is known of a trained encoder; written last, so that a folder without it is incomplete."""

    seed: int
    steps: int
    patch_size: int
    mask_share: float
    data: str  # digest of the images
    loss: float  # the mean over the last tenth of the steps
    neighbour_accuracy: float | None  # see `neighbour_accuracy`; None for data without a split called test


def encoder(config: EncoderConfig) -> EncoderCard:
    """The card of the encoder in the output folder, which is trained first if it is missing.

    UserError, before anything is trained, if the folder holds an encoder of other options or images.
    """
    config.validate()
    with owned(config.output_dir):
        card = _encoder(config)
    known = card.neighbour_accuracy
    told = "" if known is None else f"; the nearest training image has the class of {known:.1%} of the test images"
    print(f"{config.output_dir / WEIGHTS_FILE}: error of masked pixels {card.loss:.4f}{told}")
    return card


def _encoder(config: EncoderConfig) -> EncoderCard:
    path = config.output_dir / CARD_FILE
    dataset = open_dataset(config.data_dir)
    dataset.check_images()
    wanted: dict[str, Any] = {
        "seed": config.seed, "steps": config.steps, "patch_size": config.patch_size, "mask_share": config.mask_share,
        "data": dataset.fingerprint(with_images=True).images,
    }  # fmt: skip
    if path.exists():
        card = read_card(path, EncoderCard, "encoder", version=FORMAT_VERSION, remedy="remove it to train it again")
        for name, value in wanted.items():
            if getattr(card, name) != value:
                words = name.replace("_", " ")
                raise UserError(
                    f"{config.output_dir}: holds an encoder with {words} {getattr(card, name)}, not {value}; "
                    "give another folder"
                )
        return card
    net, loss = train_encoder(
        dataset, seed=config.seed, steps=config.steps, patch_size=config.patch_size, mask_share=config.mask_share
    )
    save_tensors(config.output_dir / WEIGHTS_FILE, net.state_dict())
    card = EncoderCard(**wanted, loss=loss, neighbour_accuracy=neighbour_accuracy(net, config))
    write_json(path, {"format_version": FORMAT_VERSION, **asdict(card)})
    return card


def train_encoder(
    dataset: PreparedDataset, *, seed: int, steps: int, patch_size: int, mask_share: float
) -> tuple[MaskedNet, float]:
    """Train a masked autoencoder on all images of `dataset`, and return its encoder with the last loss.

    All random numbers depend on `seed`; the global random state is not changed. UserError for patches that do not fit,
    and for images that do not fit into memory.
    """
    _check_memory(dataset)
    pixels = dataset.images(range(len(dataset)))
    channels = 1 if all(torch.equal(pixels[:, 0], pixels[:, other]) for other in (1, 2)) else 3
    weights = rng.generator("encoder", seed, "weights")
    net = MaskedNet(weights, side=dataset.resolution, patch_size=patch_size, channels=channels)
    model = MaskedAutoencoder(net, weights)
    tokens = net.grid_size**2
    kept_tokens = max(1, round(tokens * (1 - mask_share)))
    generator = rng.generator("encoder", seed, "batches")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate_factor(step, steps))
    losses = []
    for _ in progress_bar(range(steps), desc="encoder", unit="step"):
        rows = torch.randint(len(pixels), (BATCH_SIZE,), generator=generator)
        kept = torch.rand(BATCH_SIZE, tokens, generator=generator).argsort(1)[:, :kept_tokens]
        loss = model.loss(pixels_to_unit(pixels[rows, :channels]), kept)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    net.eval().requires_grad_(False)
    return net, float(torch.stack(losses[-max(1, steps // 10) :]).mean())


def _check_memory(dataset: PreparedDataset) -> None:
    """Raise UserError if the images, which are all held at once, do not fit into memory."""
    needed, available = 3 * len(dataset) * dataset.resolution**2, psutil.virtual_memory().available
    if needed > available:
        raise UserError(
            f"{dataset.folder}: the {len(dataset):,} images take {gigabytes(needed)}, which this command holds at "
            f"once, and this machine has {gigabytes(available)} free; give a part of them (stablevm prepare convert "
            f"--part 1/{math.ceil(2 * needed / max(1, available))})"
        )


def neighbour_accuracy(net: MaskedNet, config: EncoderConfig) -> float | None:
    """The share of test images whose nearest training image, by the cosine of mean tokens, has the same class.

    It tells how much the tokens know of classes, which the training did not see: of the first 1,000 test images and
    10,000 training images. None without a split of the name test.
    """
    if not (config.data_dir / "test").is_dir():
        return None
    test, data = open_dataset(config.data_dir, "test"), open_dataset(config.data_dir)
    queries, known = _features(net, test, NEIGHBOUR_QUERIES), _features(net, data, NEIGHBOUR_DATA)
    centre = known.mean(0)
    queries, known = (torch.nn.functional.normalize(each - centre, dim=1) for each in (queries, known))
    nearest = (queries @ known.T).argmax(1)
    return float((data.labels()[nearest] == test.labels()[: len(queries)]).double().mean())


def _features(net: MaskedNet, dataset: PreparedDataset, count: int) -> Tensor:
    """The mean tokens of up to `count` images."""
    dataset.check_images()
    rows = torch.arange(min(count, len(dataset)))
    with torch.no_grad():
        blocks = [pixels_to_unit(dataset.images(part)[:, : net.channels]) for part in rows.split(READ_BLOCK)]
        return torch.cat([net.features(block) for block in blocks])


def _rate_factor(step: int, steps: int) -> float:
    """The learning rate at `step` = 0, 1, ... relative to its peak."""
    warmup = WARMUP_SHARE * steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
