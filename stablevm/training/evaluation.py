"""Grids of samples and evaluations of the moving average during training, always from the same noise."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stablevm.evaluation.digits import evaluate_digits
from stablevm.evaluation.extractors import FeatureExtractor, load_encoder_extractor, load_inception
from stablevm.evaluation.features import FeatureCache, extract
from stablevm.evaluation.samples import Reference, open_reference
from stablevm.evaluation.small_extractor import digits_splits, load_extractor
from stablevm.figures.sheets import captions_of, plot_sheet
from stablevm.metrics.frechet import FID, FRECHET
from stablevm.metrics.metric import FeatureSets
from stablevm.metrics.table import results_of
from stablevm.networks.autoencoder import Autoencoder
from stablevm.networks.snapshot import ModelCard
from stablevm.sampling.guidance import UNGUIDED, GuidanceSettings, sample_latents
from stablevm.sampling.labels import balanced_labels, trained_labels
from stablevm.solvers.settings import SamplerSettings
from stablevm.support.errors import UserError
from stablevm.support.images import save_png
from stablevm.support.processes import Process
from stablevm.support.rng import RowGenerators
from stablevm.training.config import TrainConfig

SETTINGS = SamplerSettings(mode="ode", num_steps=40)
ONE_STEP = SamplerSettings(mode="meanflow", num_steps=1)  # of networks that learn mean velocities
GUIDANCE = GuidanceSettings(cfg_scale=1.5)  # for grids; evaluations have none, as the best scale changes in training
CLASSES, PER_CLASS = 10, 6  # of a grid
PREVIEWS = "samples"  # the folder of the grids in that of the run
_NAME = re.compile(r"step-(\d+)\.png")

BATCH = 64  # images that are evaluated at a time
# The metric by which checkpoints are compared, whichever of these exists.
DISTANCES = (FID.name, FRECHET.name, "frechet_test")
Measure = Callable[[Tensor, Tensor], dict[str, float]]  # from images and labels to numbers by name


class Previews:
    """Makes `FOLDER/step-0010000.png`: a row for each of the first classes that the data has samples of, with its name
    as on the sheets of `generate`, guided where the null class is trained.
    """

    def __init__(self, folder: Path, autoencoder: Autoencoder, seed: int) -> None:
        self.folder, self.autoencoder, self.seed = folder, autoencoder, seed

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}.png"

    def plot(self, model: nn.Module, card: ModelCard, device: torch.device) -> NDArray[np.uint8]:
        """Write the grid of `card.step`, and return it as uint8 (H, W, 3)."""
        labels = torch.tensor(card.trained_classes[:CLASSES]).repeat_interleave(PER_CLASS)
        streams = RowGenerators.for_keys("preview", self.seed, positions=range(len(labels)))
        guided = card.null_is_trained and card.classes_are_trained and not card.model.intervals
        guidance = GUIDANCE if guided else UNGUIDED
        shown = trained_labels(labels, card)
        latents, _ = sample_latents(model, card, shown, streams, settings_for(card), device, guidance=guidance)
        images = self.autoencoder.decode(latents).permute(0, 2, 3, 1).numpy()
        grid = plot_sheet(images, PER_CLASS, captions_of(shown.tolist(), card))
        save_png(self.path(card.step), grid)
        return grid


def set_previews_aside(folder: Path, step: int, target: Path) -> None:
    """Move the grids after `step` to `target`, because they do not belong to the run that resumes there."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = _NAME.fullmatch(path.name)
        if name and int(name[1]) > step:
            target.mkdir(exist_ok=True)
            path.replace(target / path.name)


class Evaluation:
    """Makes samples and evaluates them, in one process only; the constructor reads the reference."""

    def __init__(self, config: TrainConfig, autoencoder: Autoencoder, device: torch.device) -> None:
        self._config, self._autoencoder, self._device = config, autoencoder, device
        self._measure = _measure_of_digits(config) if config.eval_extractor else _measure_of_features(config, device)

    def run(self, model: nn.Module, card: ModelCard) -> dict[str, float]:
        """The results by name: a Fréchet distance (see `DISTANCES`), precision, recall, and possibly others."""
        labels = balanced_labels(self._config.eval_samples, card.trained_classes, self._config.seed)
        images = []
        for rows in torch.arange(len(labels)).split(BATCH):
            streams = RowGenerators.for_keys("evaluation", self._config.seed, positions=rows.tolist())
            asked = trained_labels(labels[rows], card)
            latents, _ = sample_latents(model, card, asked, streams, settings_for(card), self._device)
            images.append(self._autoencoder.decode(latents))
        return self._measure(torch.cat(images), labels)


def settings_for(card: ModelCard) -> SamplerSettings:
    """How the samples of grids and evaluations are made."""
    return ONE_STEP if card.model.intervals else SETTINGS


def distance_of(numbers: dict[str, float]) -> tuple[str, float]:
    """The name and value of the metric by which checkpoints are compared."""
    (name,) = (name for name in DISTANCES if name in numbers)
    return name, numbers[name]


def _measure_of_features(config: TrainConfig, device: torch.device) -> Measure:
    """The function that evaluates samples by the features of Inception or an encoder."""
    reference = open_reference(Path(str(config.eval_reference)))
    extractor: FeatureExtractor
    if config.eval_enc_type is not None:
        extractor = load_encoder_extractor(config.eval_enc_type, _path(config.eval_weights), device)
    else:
        extractor = load_inception(_path(config.eval_weights), device)
        reference.check_extractor(extractor)
    known = _comparison(reference, extractor, device)

    def of_features(images: Tensor, labels: Tensor) -> dict[str, float]:
        pool = torch.cat([extractor(batch)["pool"].cpu() for batch in images.split(BATCH)])
        results = results_of(replace(known, samples={"pool": pool}), subset=True)
        return {name: value for name, value in results.items() if isinstance(value, float)}

    return of_features


def _comparison(reference: Reference, extractor: FeatureExtractor, device: torch.device) -> FeatureSets:
    """The feature sets without samples; the reference's features are read from the cache, or computed and stored."""
    features: dict[str, Tensor] = {}
    if reference.source is not None:
        cache, alone = FeatureCache(FeatureCache.default_folder()), Process(0, 1, device)
        found = extract(reference.source, extractor, cache, alone, batch_size=BATCH, title="reference")
        assert found is not None
        features = {"pool": found.load("pool")}
    elif not extractor.has_stored_statistics:
        raise UserError(f"--eval-reference {reference.path}: holds no images from which to compute features")
    known = FeatureSets(
        extractor=extractor.name,
        published=extractor.published,
        samples={"pool": torch.empty(0)},
        reference=features,
        stored=reference.stored if extractor.has_stored_statistics else {},
        arithmetic="exact",
        device=device,
    )
    return replace(known, stored=known.moments)


def _measure_of_digits(config: TrainConfig) -> Measure:
    train, test = digits_splits(Path(str(config.eval_reference)), "eval_reference")
    extractor = load_extractor(str(config.eval_extractor))

    def of_digits(images: Tensor, labels: Tensor) -> dict[str, float]:
        results = evaluate_digits(images.permute(0, 2, 3, 1), labels, test, train, extractor)
        return {name: results[name] for name in ("frechet_test", "accuracy", "precision", "recall", "coverage")}

    return of_digits


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
