"""The command `stablevm import`, from a published file to a checkpoint folder."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from stablevm.data.lightning_dit import read_statistics
from stablevm.integrations import conversion
from stablevm.integrations.config import ImportConfig
from stablevm.integrations.reader import ENDINGS, PublishedCheckpoint, read_published
from stablevm.networks import snapshot
from stablevm.networks.autoencoder import (
    SD_AUTOENCODERS,
    SD_FACTOR,
    SD_SCALE,
    LatentSpec,
    PerChannel,
    downsampling,
    full_name,
    latent_spec_of,
)
from stablevm.networks.snapshot import CARD_FILE, ModelCard, Weights
from stablevm.networks.transformer_config import TransformerConfig
from stablevm.support.errors import UserError
from stablevm.support.files import remove_temporary
from stablevm.support.hub import fetched_file, is_on_hub
from stablevm.support.locks import is_foreign, owned
from stablevm.support.options import as_typed
from stablevm.support.text import shown

# The names of our values in the projects' options; SiT's path VP and predictions noise and score have no counterpart.
RECORDED: dict[str, dict[str, str]] = {
    "path_type": {"Linear": "linear", "GVP": "cosine", "linear": "linear", "cosine": "cosine"},
    "prediction": {"velocity": "v", "v": "v", "x": "x"},
}

TIME_FROM_NOISE = ("sit", "lightningdit")  # their time runs from noise to data
TOLD_APART = {"lightningdit": "LightningDiT", "repae": "REPA-E"}  # recognised by the names of their weights


def import_checkpoint(config: ImportConfig) -> Path:
    """Convert a published checkpoint into the folder `config.output`, and return its path.

    Raises UserError, before anything is written, if the file is not such a checkpoint, if tensors are unknown or
    missing, if neither the file nor the options have a required fact, or if the folder is in use. A folder that already
    holds this result is left unchanged.
    """
    config.validate()
    with owned(config.output):
        _check_free(config.output)
        return _import(config)


def _import(config: ImportConfig) -> Path:
    published = read_published(_local(config.checkpoint))
    source = _source(config, published)
    vae = _vae(config, source)
    sets = {name: conversion.our_names(state) for name, state in published.weights.items()}
    _check_no_dit(config, published)
    model = _model(config, published, next(iter(sets.values())))
    card = ModelCard(
        model=model,
        latent=_latent(config, published, model, vae),
        path_type=_fact(config, published, "path_type"),
        prediction=_prediction(config, published),
        class_names=tuple(map(str, range(model.num_classes))),
        step=published.steps or 0,
        label_dropout=_label_dropout(published, model),
    )
    conversion.check_positions(published.any_weights, model)
    converted = {name: _convert(state, model, source in TIME_FROM_NOISE) for name, state in sets.items()}
    if not _is_there(config.output, card, converted):
        for name in get_args(Weights):  # from an interrupted import, perhaps of another file
            (config.output / f"{name}.safetensors").unlink(missing_ok=True)
        remove_temporary(config.output)
        snapshot.save(config.output, card, converted)
    projectors = f", projectors of {', '.join(map(str, model.projector_dims))}" if model.projector_dims else ""
    print(
        f"{config.output}: {model.name}, {model.num_classes:,} classes, latents of "
        f"{' x '.join(map(str, card.latent.shape))}, path {card.path_type}, prediction {card.prediction}{projectors}; "
        f"weights: {' and '.join(converted)}"
    )
    return config.output


def _local(checkpoint: Path) -> Path:
    """The file itself, or the one of that name on the hub."""
    return fetched_file(checkpoint, ENDINGS) if is_on_hub(checkpoint) else checkpoint


def _check_free(folder: Path) -> None:
    """Raise UserError if the folder holds more than an interrupted import leaves, which is weights without a card.

    `_is_there` checks a folder with a card.
    """
    ours = {CARD_FILE, *(f"{name}.safetensors" for name in get_args(Weights))}
    for path in folder.iterdir():
        if path.name not in ours and is_foreign(path):
            raise UserError(f"--output {folder}: holds {path.name}; give a new folder")


def _is_there(folder: Path, card: ModelCard, weights: dict[Weights, dict[str, Tensor]]) -> bool:
    """Whether the folder already holds this result; UserError if it holds another checkpoint."""
    if not (folder / CARD_FILE).exists():
        return False
    names = {name for name in get_args(Weights) if (folder / f"{name}.safetensors").exists()}
    if names == weights.keys() and snapshot.load_card(folder) == card:
        found = {name: snapshot.load_weights(folder, name) for name in weights}
        if all(_same(found[name], weights[name]) for name in weights):
            return True
    raise UserError(f"--output {folder}: holds {CARD_FILE}; give a new folder")


def _same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def _source(config: ImportConfig, published: PublishedCheckpoint) -> str:
    """The project that made the checkpoint, by the option, which the file must not contradict, or by the file."""
    state, options = published.any_weights, published.options
    if conversion.is_lightning_dit(state) or conversion.MEANS in state:
        return _checked(config, "lightningdit" if conversion.is_lightning_dit(state) else "repae")
    if config.source in TOLD_APART:
        raise UserError(
            f"--source {config.source}: {config.checkpoint} does not have the weights of a "
            f"{TOLD_APART[config.source]}; leave the option out"
        )
    sit = conversion.predicts_twice(state) or "image_size" in options
    repa = any(key.startswith(("projectors.", "decoder_blocks.")) for key in state) or "encoder_depth" in options
    repa = repa or published.steps is not None
    if config.source is None and sit == repa:
        raise UserError(
            f"{config.checkpoint} does not show which project made it, and their times run in opposite directions; "
            "give --source sit, repa or stablevelocity"
        )
    if config.source is not None and (repa if config.source == "sit" else sit):
        other = "repa or stablevelocity" if config.source == "sit" else "sit"
        raise UserError(f"--source {config.source}: {config.checkpoint} is of {other}; leave the option out")
    return config.source or ("sit" if sit else "repa")


def _checked(config: ImportConfig, shown_by_file: str) -> str:
    if config.source not in (None, shown_by_file):
        raise UserError(f"--source {config.source}: {config.checkpoint} is of {shown_by_file}; leave the option out")
    return shown_by_file


def _model(config: ImportConfig, published: PublishedCheckpoint, state: dict[str, Tensor]) -> TransformerConfig:
    depth = conversion.legacy_depth(published.any_weights)
    if depth is None:
        depth = published.options.get("encoder_depth")
    if None not in (depth, config.encoder_depth) and depth != config.encoder_depth:
        raise UserError(f"--encoder-depth {config.encoder_depth}: {config.checkpoint} records {depth}; leave it out")
    has_projectors = conversion.has_projectors(state)
    if config.encoder_depth is not None and not has_projectors:
        raise UserError(f"--encoder-depth {config.encoder_depth}: the checkpoint has no projectors; leave it out")
    depth = depth or config.encoder_depth
    if depth is None and has_projectors:
        raise UserError(f"{config.checkpoint} has projectors but does not record their block; give --encoder-depth")
    return conversion.infer_config(state, depth if has_projectors else None, _num_classes(config, published))


def _num_classes(config: ImportConfig, published: PublishedCheckpoint) -> int | None:
    """The number of classes, as recorded or given; None for a file that is not a SiT's.

    The label table has a row for each class, and one for the null class if labels were dropped. UserError if its rows,
    the recorded number and the given number contradict each other.
    """
    table = published.any_weights.get(conversion.LABEL_TABLE)
    if table is None or table.ndim != 2:
        return None
    rows, recorded = len(table), published.options.get("num_classes")
    if recorded is not None and not (type(recorded) is int and recorded >= 1):
        raise UserError(f"{config.checkpoint}: records {shown(recorded)} as num_classes; give a whole checkpoint")
    if None not in (recorded, config.num_classes) and recorded != config.num_classes:
        raise UserError(f"--num-classes {config.num_classes}: {config.checkpoint} records {recorded}; leave it out")
    number, chance = config.num_classes or recorded, _recorded_dropout(published.options)
    if number is None:
        number = rows if chance == 0 else rows - 1
        if chance is None:
            print(
                f"warning: {config.checkpoint}: {rows:,} rows in the label table are taken for {number:,} classes and "
                f"the null class; give --num-classes {rows} if the last one is a class",
                file=sys.stderr,
            )
    fitting = {None: (number, number + 1), 0.0: (number,)}.get(chance, (number + 1,))
    if rows not in fitting or number < 1:
        said = "--num-classes" if config.num_classes else "recorded"
        raise UserError(
            f"{config.checkpoint}: {number:,} classes ({said}) and {rows:,} rows in the label table, expected "
            f"{' or '.join(map(str, fitting))}; check --num-classes, or give the checkpoint as it was written"
        )
    return number


def _check_no_dit(config: ImportConfig, published: PublishedCheckpoint) -> None:
    """Raise UserError for the weights of a DiT, which have the names and shapes of a SiT but predict noise."""
    state, name = published.any_weights, published.options.get("model")
    if isinstance(name, str) and name.lower().startswith("dit"):
        raise UserError(f"{config.checkpoint}: a {shown(name, quoted=False)}, which predicts noise, not a velocity; "
                        "only networks of flow matching can be imported")  # fmt: skip
    recorded = published.options.get("path_type") is not None
    if recorded or not conversion.predicts_twice(state) or not conversion.second_half_is_trained(state):
        return
    if config.source != "sit":
        raise UserError(
            f"{config.checkpoint}: the second half of its outputs is trained, as a DiT's is, which predicts noise and "
            "can't be imported, and a SiT's never is; give --source sit if you know that it predicts a velocity"
        )
    print(f"warning: {config.checkpoint} looks like a DiT's; --source sit says that it is a velocity", file=sys.stderr)


def _vae(config: ImportConfig, source: str) -> str:
    """The name of the autoencoder; UserError if none is given for REPA-E, which tunes one of its own."""
    if config.vae is None and source == "repae":
        raise UserError(
            f"{config.checkpoint} is of REPA-E, which tuned its own autoencoder; give that, in diffusers' form, as "
            "--vae FOLDER"
        )
    return config.vae or "mse"


def _latent(config: ImportConfig, published: PublishedCheckpoint, model: TransformerConfig, vae: str) -> LatentSpec:
    """The latents, with the scale and shift of the network's training."""
    latent = _encoded(vae, config.resolution, model)
    statistics = _statistics(config, published)
    if statistics is None:
        return latent
    scale, shift = statistics
    if isinstance(scale, tuple) and len(scale) != model.in_channels:
        raise UserError(
            f"the statistics are of {len(scale)} channels, the network takes {model.in_channels}; give those of its "
            "training as --latent-statistics"
        )
    return replace(latent, scale=scale, shift=shift, measured=True)


def _statistics(config: ImportConfig, published: PublishedCheckpoint) -> tuple[PerChannel, PerChannel] | None:
    """The scale and shift of the latents, measured on the training data, from this file or --latent-statistics; None if
    those of the autoencoder apply.
    """
    recorded = conversion.statistics_of_latents(published.any_weights)
    path, options = config.latent_statistics, published.options
    if path is None:
        if recorded is not None or not conversion.is_lightning_dit(published.any_weights):
            return recorded
        if options.get("latent_norm") is False:
            return float(options.get("latent_multiplier", SD_SCALE)), 0.0
        raise UserError(
            f"{config.checkpoint} lacks the statistics of its latents, without which images are wrong; "
            "give --latent-statistics, the latents_stats.pt of its training"
        )
    if recorded is not None:
        raise UserError(f"--latent-statistics {path}: {config.checkpoint} holds its own; leave it out")
    means, deviations = read_statistics(path, "--latent-statistics")
    scales = float(options.get("latent_multiplier", 1.0)) / deviations
    return tuple(scales.tolist()), tuple(means.tolist())


def _encoded(vae: str, resolution: int | None, model: TransformerConfig) -> LatentSpec:
    side, channels = model.input_size, model.in_channels
    name = full_name(vae)
    if name in SD_AUTOENCODERS.values():  # known without reading the configuration, so without a network connection
        resolution = resolution or side * SD_FACTOR
        shape = (4, resolution // SD_FACTOR, resolution // SD_FACTOR)
        latent = LatentSpec(shape, SD_SCALE, 0.0, name)
    else:
        resolution = resolution or side * downsampling(vae)
        latent = latent_spec_of(vae, resolution)
    if latent.shape != (channels, side, side):
        raise UserError(
            f"--vae {vae}: it makes latents of {latent.shape} from images of {resolution} pixels, the network "
            f"takes {(channels, side, side)}; give the --vae and --resolution of its training"
        )
    return latent


def _fact(config: ImportConfig, published: PublishedCheckpoint, option: str) -> str:
    """An option of the training, as recorded in the file, or as given."""
    given, recorded = getattr(config, option), published.options.get(option)
    if recorded is None:
        if given is None:
            raise UserError(f"{config.checkpoint} does not record its path and prediction; give {_typed(option)}")
        return given
    ours = RECORDED[option].get(str(recorded))
    if ours is None:
        raise UserError(
            f"{config.checkpoint} was trained with {as_typed(option, recorded)}; only {_typed(option)} can be imported"
        )
    if given not in (None, ours):
        raise UserError(f"{as_typed(option, given)}: {config.checkpoint} records {recorded}; leave the option out")
    return ours


def _prediction(config: ImportConfig, published: PublishedCheckpoint) -> Literal["v", "x"]:
    return "v" if _fact(config, published, "prediction") == "v" else "x"


def _label_dropout(published: PublishedCheckpoint, model: TransformerConfig) -> float | None:
    """The probability of a dropped label, as recorded; 0 if the label table has no row for the null class."""
    if len(published.any_weights[conversion.LABEL_TABLE]) == model.num_classes:
        return 0.0
    return _recorded_dropout(published.options)


def _recorded_dropout(options: dict[str, Any]) -> float | None:
    """The probability of a dropped label that the training scripts of REPA and StableVelocity record."""
    chance = options.get("cfg_prob")
    return float(chance) if isinstance(chance, int | float) and 0 <= chance <= 1 else None


def _typed(option: str) -> str:
    return as_typed(option, " or ".join(sorted(set(RECORDED[option].values()))))


def _convert(state: dict[str, Tensor], model: TransformerConfig, turned: bool) -> dict[str, Tensor]:
    if conversion.predicts_twice(state):
        state = conversion.first_half(state, model)
    if len(state[conversion.LABEL_TABLE]) == model.num_classes:
        state = conversion.with_null_class(state)
    conversion.check_fits(state, model)
    return conversion.turn_time(state) if turned else state
