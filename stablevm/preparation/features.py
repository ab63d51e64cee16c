"""The command `stablevm prepare features`: an encoder's tokens of all images, computed once for alignment."""

from typing import Any

import torch
from torch import Tensor

from stablevm.data.dataset import PreparedDataset
from stablevm.data.features import CARD_FILE, FILE_LENGTH, TENSOR, FeatureCard, StoredFeatures, file_name
from stablevm.data.listing import WORK_FOLDER
from stablevm.data.mirrored import MirroredDataset
from stablevm.data.opening import open_dataset
from stablevm.data.streaming import StreamedTensor, write_streamed
from stablevm.networks.encoders import Encoder, load_encoder
from stablevm.preparation.config import FeaturesConfig
from stablevm.preparation.work import Job, begin_step, check_same, clear
from stablevm.support.errors import UserError
from stablevm.support.locks import owned
from stablevm.support.precision import DTYPES
from stablevm.support.processes import Process


def features(config: FeaturesConfig) -> StoredFeatures | None:
    """Compute and store the tokens; None in processes other than the first, which may end before others do.

    To resume after an interruption, call it again with the same options: complete files are kept. UserError for data
    without images, for an encoder that can't be loaded, and for a folder of other features.
    """
    config.validate()
    process = Process.from_environment()
    dataset = open_dataset(config.data_dir)
    dataset.check_images()
    whole = MirroredDataset(dataset) if config.flip else dataset
    encoder = load_encoder(
        config.enc_type,
        grid_size=config.grid_size,
        weights=config.encoder_weights,
        device=process.device,
        dtype=DTYPES[config.precision],
        antialias=config.encoder_resize == "antialiased",
    )
    card = FeatureCard(
        encoder=config.enc_type,
        weights=encoder.fingerprint(),
        resize=config.encoder_resize,
        precision=config.precision,
        rows=len(whole),
        grid_size=encoder.grid_size,
        dim=encoder.dim,
        flips=config.flip,
        data=dataset.fingerprint(with_images=True),
    )
    with owned(config.dest):
        if not (config.dest / CARD_FILE).exists():
            _compute(config, whole, encoder, card, process)
    if not process.is_first:
        return None
    stored = StoredFeatures(config.dest)
    check_same(config.dest, _plan(card), _plan(stored.card))
    size = card.rows * card.grid_size**2 * card.dim * 2
    print(f"{config.dest}: {card.rows:,} x {card.grid_size**2} tokens of {card.encoder}, {size / 1e9:.2f} GB")
    return stored


def _compute(
    config: FeaturesConfig, dataset: PreparedDataset, encoder: Encoder, card: FeatureCard, process: Process
) -> None:
    begin_step(config.dest / WORK_FOLDER, _plan(card) | {"batch size": config.batch_size})
    groups = [range(start, min(start + FILE_LENGTH, len(dataset))) for start in range(0, len(dataset), FILE_LENGTH)]
    job = Job("features", config.dest, groups, process, FILE_LENGTH)
    for part, batches in job.run(dataset.images, config.batch_size, config.num_workers, _is_done):
        tokens = torch.cat([_tokens(encoder, images, process.device, config) for images in batches])
        write_streamed(config.dest / file_name(part.start), {TENSOR: StreamedTensor.of(tokens.numpy())})
    job.wait([config.dest / file_name(part.start) for part in job.parts()])
    if process.is_first:
        card.write(config.dest)
        clear(config.dest)


def _is_done(names: set[str], part: range) -> bool:
    return file_name(part.start) in names


def _tokens(encoder: Encoder, images: Tensor, device: torch.device, config: FeaturesConfig) -> Tensor:
    """The tokens (n, T, D) float16 on the CPU."""
    tokens = encoder(images.to(device)).half().cpu()
    if not tokens.isfinite().all():
        raise UserError(f"--enc-type {config.enc_type}: a token is not finite in float16; choose another encoder")
    return tokens.contiguous()


def _plan(card: FeatureCard) -> dict[str, Any]:
    """All facts that determine the tokens, by the words of messages."""
    facts = {name.replace("_", " "): value for name, value in vars(card).items() if name != "data"}
    return facts | {"images": card.data.images}
