"""From the options to the things that training works with; every mismatch between them is an error here."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from tqdm import tqdm

from stablevm.bank import ClassBank
from stablevm.data.dataset import PreparedDataset, drawn_latents
from stablevm.data.mirrored import MirroredDataset
from stablevm.data.opening import open_dataset
from stablevm.networks.encoders import Encoder, load_encoder
from stablevm.networks.network_config import NetworkConfig
from stablevm.networks.registry import network_config
from stablevm.support import rng
from stablevm.support.errors import UserError
from stablevm.support.options import some_of
from stablevm.training.alignment_term import alignment_term
from stablevm.training.config import TrainConfig
from stablevm.training.objectives import GPU_SHARE, gigabytes
from stablevm.training.terms import Term


def open_data(config: TrainConfig) -> PreparedDataset:
    """The data set, checked against the options."""
    dataset = open_dataset(config.data_dir)
    if config.resolution not in (None, dataset.resolution):
        raise UserError(f"--resolution {config.resolution}: {config.data_dir} holds images of {dataset.resolution}")
    if config.num_classes is not None and config.num_classes < dataset.num_classes:
        raise UserError(
            f"--num-classes {config.num_classes}: {config.data_dir} has {dataset.num_classes} classes; "
            "give at least as many"
        )
    if config.use_proj_loss:
        dataset.check_images()
    return MirroredDataset(dataset) if config.horizontal_flips else dataset


def class_names(config: TrainConfig, dataset: PreparedDataset) -> tuple[str, ...]:
    """Names of all classes that the network knows; those beyond the data set's are called by their number."""
    extra = range(dataset.num_classes, config.num_classes or dataset.num_classes)
    return (*dataset.class_names, *map(str, extra))


def class_counts(config: TrainConfig, dataset: PreparedDataset) -> tuple[int, ...]:
    """Samples of each class that the network knows, in the whole data set."""
    counts = torch.bincount(dataset.labels(), minlength=config.num_classes or dataset.num_classes)
    return tuple(counts.tolist())


def empty_classes_warning(config: TrainConfig, dataset: PreparedDataset) -> list[str]:
    """One line where the network knows classes that the data has no sample of (StableVM refuses those: `prefill`)."""
    counts, names = class_counts(config, dataset), class_names(config, dataset)
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if not empty:
        return []
    return [
        f"--data-dir {config.data_dir} has no sample of {len(empty):,} of {len(counts):,} classes ({some_of(empty)}): "
        "the network learns nothing of them"
    ]


def model_config(config: TrainConfig, dataset: PreparedDataset) -> NetworkConfig:
    """The network without projectors: their widths are the encoders'. UserError where no block is left to align."""
    channels, height, width = dataset.latent.shape
    if height != width:
        raise UserError(f"--data-dir {config.data_dir}: its latents are {height} x {width}, the network takes squares")
    model = network_config(
        config.model,
        input_size=height,
        in_channels=channels,
        num_classes=config.num_classes or dataset.num_classes,
        qk_norm=config.qk_norm,
        fused_attn=config.fused_attn,
        encoder_depth=config.encoder_depth,
        projector_kind="conv" if config.use_irepa else "mlp",
    )
    if config.use_proj_loss and not 1 <= config.encoder_depth <= model.depth:
        raise UserError(
            f"--encoder-depth {config.encoder_depth}: {config.model} has {model.depth} blocks; give 1 to {model.depth}"
        )
    return model


def load_encoders(config: TrainConfig, grid_size: int, device: torch.device, dtype: torch.dtype) -> list[Encoder]:
    """The frozen encoders on `device`, for a network of `grid_size` tokens per side."""
    antialias = config.encoder_resize == "antialiased"
    return [
        load_encoder(name, grid_size=grid_size, weights=weights, device=device, dtype=dtype, antialias=antialias)
        for name, weights in zip(config.encoder_names, config.encoder_files, strict=True)
    ]


# Terms of the loss beside the velocity's: from the options and their encoders to the term, or None without it.
TERMS: tuple[Callable[[TrainConfig, Sequence[Encoder]], Term | None], ...] = (alignment_term,)


def make_terms(config: TrainConfig, encoders: Sequence[Encoder]) -> list[Term]:
    """The terms that the options ask for."""
    found = (make(config, encoders) for make in TERMS)
    return [term for term in found if term is not None]


def prefill(bank: ClassBank, dataset: PreparedDataset, config: TrainConfig, *, show: bool) -> None:
    """Fill the bank with samples of each class chosen by the seed, or with all, reading latents only.

    Every process chooses and reads the same ones, so that all hold the same bank without talking to each other.
    Raises UserError naming the classes of which the data holds no sample.
    """
    labels = dataset.labels()
    counts = torch.bincount(labels, minlength=bank.num_classes)
    missing = (counts == 0).nonzero().flatten().tolist()
    if missing:
        remedy = "lower --num-classes"
        if missing[0] < dataset.num_classes:
            remedy = "prepare the data with them or, without them, with classes numbered from 0 without gaps"
        raise UserError(
            f"--loss-type stablevm: {config.data_dir} has no sample of {len(missing)} of {bank.num_classes} classes "
            f"({some_of(missing)}), so their bank would stay empty; {remedy}"
        )
    fully = config.prefill_bank_fully or config.bank_is_fixed
    rows = choose_rows(labels, counts, bank.capacity if fully else 1, config.seed)
    if show and config.bank_is_fixed:
        print(_cost(bank, len(rows), config))
    workers = config.num_workers if config.prefill_workers is None else config.prefill_workers
    with tqdm(total=len(rows), desc="filling the bank", unit="latent", disable=not show) as progress:
        for part, latents in _read_latents(dataset, rows, config, workers):
            bank.insert(latents, labels[part], part)
            progress.update(len(part))
    short = int((counts < bank.capacity).sum())
    if show and config.prefill_bank_fully and short and not config.bank_is_fixed:
        print(f"bank: {short} of {bank.num_classes} classes have fewer than {bank.capacity} samples; all are in it")


def _cost(bank: ClassBank, rows: int, config: TrainConfig) -> str:
    size = gigabytes(bank.num_classes * bank.capacity * math.prod(bank.shape) * torch.float32.itemsize)
    place = "the GPU's memory" if bank.device.type == "cuda" else "the host's memory"
    if config.bank_on_gpu and bank.device.type == "cpu" and torch.cuda.is_available():
        place += f", as it would take more than {GPU_SHARE:.0%} of what is free on the GPU"
    slots = f"{bank.num_classes:,} classes x {bank.capacity:,} slots"
    return f"bank: all {rows:,} latents, {slots}, {size} in each process, in {place}"


def choose_rows(labels: Tensor, counts: Tensor, per_class: int, seed: int) -> Tensor:
    """At most `per_class` rows of each class, which has `counts` of them, at random, in the order of the file."""
    shuffled = torch.randperm(len(labels), generator=rng.generator(seed, "prefill"))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return by_class[rank < per_class].sort().values


def _read_latents(
    dataset: PreparedDataset, rows: Tensor, config: TrainConfig, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of `rows` with their latents, in order, read by `workers` threads (or this one)."""

    def read(part: Tensor) -> Tensor:
        return drawn_latents(dataset, part.tolist(), config.seed, "prefill")

    parts = rows.split(config.prefill_batch_size)
    if workers == 0:
        yield from zip(parts, map(read, parts), strict=True)
        return
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(parts), workers):  # no more than `workers` parts are read ahead
            ahead = parts[start : start + workers]
            yield from zip(ahead, pool.map(read, ahead), strict=True)
