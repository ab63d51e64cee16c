"""Provenance: all that generated images depend on, recorded with them, so that different images never mix."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stablevm.networks.autoencoder import (
    GREY,
    IDENTITY,
    LatentSpec,
    autoencoder_id,
    full_name,
    is_folder,
    latent_spec_of,
)
from stablevm.networks.snapshot import ModelCard, checkpoint_in, load_card
from stablevm.sampling.config import GenerateConfig
from stablevm.sampling.guidance import check_guide, guidance_of
from stablevm.sampling.labels import balanced_labels, nearest_names, numbers_by_name, random_labels
from stablevm.solvers.settings import settings_of
from stablevm.support import files
from stablevm.support.errors import UserError
from stablevm.support.hub import is_on_hub
from stablevm.support.options import as_typed, distinct_indices, some_of
from stablevm.support.text import brief

Provenance = dict[str, Any]  # JSON values; `protocol` in files, as version 0.1 named it
_HASH_DIGITS = 8


def resolved(config: GenerateConfig) -> tuple[GenerateConfig, ModelCard]:
    """The request with what the checkpoint knows, and the checkpoint's card, with the attention kernel of the options.

    A run's folder becomes its newest checkpoint, a name of the hub the folder of its files, and names of classes their
    numbers. UserError as in `check_claims`.
    """
    config = replace(config, ckpt=checkpoint_in(config.ckpt, config.weights))
    if config.guide_ckpt is not None:
        config = replace(config, guide_ckpt=checkpoint_in(config.guide_ckpt, config.guide_weights))
    card = load_card(config.ckpt)
    if config.fused_attn is not None:  # any kernel computes the same function
        card = replace(card, model=replace(card.model, fused_attn=config.fused_attn))
    if config.classes is not None and distinct_indices(config.classes) is None:
        config = replace(config, classes=",".join(map(str, _numbers_of(config.classes, card))))
    check_claims(config, card)
    guide_card(config, card)
    return config, card


def guide_card(config: GenerateConfig, card: ModelCard) -> ModelCard | None:
    """The card of the weaker network, if the options name one; UserError if it does not fit the one with `card`."""
    if config.guide_ckpt is None:
        return None
    theirs = load_card(config.guide_ckpt)
    check_guide(theirs, card)
    if config.unconditional and not theirs.null_is_trained:
        raise UserError(
            f"{as_typed('guide_ckpt', config.guide_ckpt)}: was trained with --cfg-prob 0, so its null class is "
            "untrained; leave out --unconditional"
        )
    return replace(theirs, model=replace(theirs.model, fused_attn=card.model.fused_attn))


def newest_notes(given: GenerateConfig, taken: GenerateConfig) -> list[str]:
    """A line for each run's folder, or name of the hub, that stands for a checkpoint in it."""
    pairs = [(given.ckpt, taken.ckpt), (given.guide_ckpt, taken.guide_ckpt)]
    return [
        f"{one}: its {'commit' if is_on_hub(one) else 'newest checkpoint'} is {two.name}"
        for one, two in pairs
        if one is not None and two is not None and one != two
    ]


def _numbers_of(names: str, card: ModelCard) -> list[int]:
    """The classes of "cat, dog"; a name may hold commas itself. UserError for a name that is not known."""
    known = numbers_by_name(card)
    words, numbers = [" ".join(word.split()) for word in names.split(",")], []
    while words:
        fitting = [count for count in range(len(words), 0, -1) if ", ".join(words[:count]) in known]
        if not fitting:
            raise UserError(
                f"--classes {names}: the checkpoint knows no class {words[0]}; {nearest_names(words[0], card)}"
            )
        numbers.append(known[", ".join(words[: fitting[0]])])
        del words[: fitting[0]]
    return numbers


def check_claims(config: GenerateConfig, card: ModelCard) -> None:
    """Raise UserError, which names both values, if an option contradicts the checkpoint."""
    recorded = {
        "model": card.model.name,
        "path_type": card.path_type,
        "prediction_type": card.prediction,
        "projector_embed_dims": ",".join(str(width) for width in card.model.projector_dims) or "none",
        "use_projector": bool(card.model.projector_dims),
        "use_irepa": card.model.projector_kind == "conv",
        "qk_norm": card.model.qk_norm,
    }
    if card.model.projector_dims:
        recorded["encoder_depth"] = card.model.encoder_depth
    for option, value in recorded.items():
        given = getattr(config, option)
        if given is not None and given != value:
            raise UserError(
                f"{as_typed(option, given)}: the checkpoint {config.ckpt} records {as_typed(option, value)}; "
                "leave the option out"
            )
    _check_autoencoder(config, card)
    _check_trained(config, card)
    unknown = [index for index in config.class_indices() or () if index >= card.model.num_classes]
    if unknown:
        raise UserError(f"--classes {config.classes}: the checkpoint has classes 0 to {card.model.num_classes - 1}")


def _check_trained(config: GenerateConfig, card: ModelCard) -> None:
    """Raise UserError if the images need a label that was never trained; see `ModelCard.label_dropout`."""
    if not card.null_is_trained and (config.unconditional or config.cfg_scale != 1):
        asked = "--unconditional" if config.unconditional else f"--cfg-scale {config.cfg_scale:g}"
        raise UserError(
            f"{asked}: the checkpoint {config.ckpt} was trained with --cfg-prob 0, so its null class is untrained; "
            "leave the option out, or train with --cfg-prob 0.1"
        )
    if not card.classes_are_trained and not config.unconditional:
        raise UserError(
            f"the checkpoint {config.ckpt} was trained with --cfg-prob 1, so its classes are untrained; "
            "give --unconditional"
        )


def idle_claims(config: GenerateConfig, card: ModelCard) -> list[str]:
    """One warning for each option about something that the checkpoint lacks, or was not trained on."""
    lines = []
    if config.encoder_depth is not None and not card.model.projector_dims:
        lines.append(
            f"{as_typed('encoder_depth', config.encoder_depth)} has no effect: the checkpoint has no projectors"
        )
    if config.unconditional:
        return lines
    asked = config.class_indices()
    unseen = sorted(set(asked or range(card.model.num_classes)) - set(card.trained_classes))
    if unseen and asked is None:
        lines.append(
            f"{len(unseen):,} of {card.model.num_classes:,} classes had no sample in training "
            f"({some_of(unseen)}): they are left out"
        )
    elif unseen:
        lines.append(f"--classes: training had no sample of class {some_of(unseen)}, so its images are meaningless")
    return lines


def _check_autoencoder(config: GenerateConfig, card: ModelCard) -> None:
    recorded = card.latent.autoencoder
    if config.vae is not None and full_name(config.vae) != full_name(recorded):
        another_folder = recorded not in (IDENTITY, GREY) and is_folder(config.vae)
        if not another_folder:
            raise UserError(
                f"--vae {config.vae}: the checkpoint {config.ckpt} records {recorded}; leave the option out, "
                "or give the folder of an autoencoder to decode with"
            )
    if config.resolution is not None:
        side = latent_spec_of(config.vae or card.latent.autoencoder, config.resolution).shape[1]
        if side != card.latent.shape[1]:
            raise UserError(
                f"--resolution {config.resolution}: this means latents of {side} x {side}, "
                f"the checkpoint {config.ckpt} records {card.latent.shape[1]} x {card.latent.shape[2]}"
            )


def decoding_notes(vae: str | None, latent: LatentSpec) -> list[str]:
    """A note if --vae names another autoencoder than the one that encoded the data, as its content or name shows.

    Where neither the content is recorded nor the scale measured, the scales are compared instead, on loading.
    """
    if vae is None or (latent.fingerprint is None and not latent.measured) or latent.is_by(vae):
        return []
    if latent.fingerprint is None:  # a folder may hold the autoencoder of that name
        return [
            f"--vae {vae} can't be compared with the data's autoencoder, {latent.autoencoder}, whose content is not "
            "recorded; if it is another, images are wrong"
        ]
    return [f"--vae {vae} is not the data's autoencoder, {latent.autoencoder}; it is used to decode anyway"]


def labels_of(config: GenerateConfig, card: ModelCard) -> Tensor:
    """The class of each image: (num_fid_samples,) int64; the null class for all with `unconditional`."""
    if config.unconditional:
        return torch.full((config.num_fid_samples,), card.model.null_class)
    classes = config.class_indices() or card.trained_classes
    draw = balanced_labels if config.label_sampling == "equal" else random_labels
    return draw(config.num_fid_samples, classes, config.global_seed)


def provenance_of(config: GenerateConfig, card: ModelCard) -> Provenance:
    """All that the images depend on, as JSON values, including the hash of the weights file; `config` is effective."""
    weights_file = _weights_file("ckpt", config.ckpt, "weights", config.weights)
    classes, settings = config.class_indices(), asdict(settings_of(config))
    shift = settings.pop("time_shift") or card.time_shift
    return {
        "num_fid_samples": config.num_fid_samples,
        "global_seed": config.global_seed,
        "label_sampling": config.label_sampling,
        "classes": None if classes is None else list(classes),
        "unconditional": config.unconditional,
        **settings,
        **({} if shift == 1 or config.solver == "dopri5" or config.edm_schedule else {"time_shift": shift}),
        **asdict(guidance_of(config)),
        "tf32": config.tf32,
        "compile": config.compile,
        "fused_attn": card.model.fused_attn,
        "autoencoder": card.latent.autoencoder_id if config.vae is None else autoencoder_id(config.vae),
        "path_type": card.path_type,
        "prediction": card.prediction,
        "model": card.model.name,
        "step": card.step,
        "weights": config.weights,
        "weights_sha256": files.sha256(weights_file),
        **_guide_provenance(config),
    }


def _guide_provenance(config: GenerateConfig) -> Provenance:
    """What images depend on if a weaker network guides; empty without one, as in files of earlier versions."""
    if config.guide_ckpt is None:
        return {}
    card = load_card(config.guide_ckpt)
    weights_file = _weights_file("guide_ckpt", config.guide_ckpt, "guide_weights", config.guide_weights)
    return {
        "guide_scale": config.guide_scale,
        "guide_low": config.guide_low,
        "guide_high": config.guide_high,
        "guide_model": card.model.name,
        "guide_step": card.step,
        "guide_weights": config.guide_weights,
        "guide_weights_sha256": files.sha256(weights_file),
    }


def _weights_file(option: str, folder: Path, which: str, weights: str) -> Path:
    path = folder / f"{weights}.safetensors"
    if not path.is_file():
        raise UserError(f"{as_typed(option, str(folder))}: it has no {path.name}; see --{which.replace('_', '-')}")
    return path


def default_name(provenance: Provenance) -> str:
    """A descriptive file name that ends with a hash of the provenance, so that different runs have different names."""
    digits = hashlib.sha256(json.dumps(provenance).encode()).hexdigest()[:_HASH_DIGITS]
    model = provenance["model"].replace("/", "-")
    adaptive = provenance["solver"] == "dopri5"
    steps = f"{provenance['mode']}-dopri5" if adaptive else f"{provenance['mode']}{provenance['num_steps']}"
    guide = f"-guide{provenance['guide_scale']:g}" if "guide_scale" in provenance else ""
    return f"{model}-{provenance['step']:07d}-{steps}-cfg{provenance['cfg_scale']:g}{guide}-{digits}"


def check_same(provenance: Provenance, found: Provenance, where: Path) -> None:
    """Raise UserError, naming the first difference, if the provenance found at `where` is not that of this run."""
    for key in provenance | found:
        ours, theirs = provenance.get(key), found.get(key)
        if ours != theirs:
            raise UserError(
                f"{where} holds images made with {brief(key)} {brief(theirs)}, this run has {ours}; "
                "give another --name or --sample-dir, or the same options"
            )
