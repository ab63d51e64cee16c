"""Judging the moving average while it is trained, always on the same noise and classes, so that values compare."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from stablevm.evaluation.digits import digits_splits, evaluate_digits, load_extractor
from stablevm.evaluation.extractors import FeatureExtractor, load_encoder_extractor, load_inception
from stablevm.evaluation.features import FeatureCache, extract
from stablevm.evaluation.samples import Reference, open_reference
from stablevm.metrics.frechet import FID, FRECHET
from stablevm.metrics.metric import FeatureSets
from stablevm.metrics.table import results_of
from stablevm.networks.autoencoder import Autoencoder
from stablevm.networks.snapshot import ModelCard
from stablevm.sampling.guidance import draw_latents
from stablevm.sampling.labels import balanced_labels, trained_labels
from stablevm.solvers.settings import SamplerSettings
from stablevm.support.errors import UserError
from stablevm.support.processes import Process
from stablevm.support.rng import RowGenerators
from stablevm.training.config import TrainConfig

SETTINGS = SamplerSettings(mode="ode", num_steps=40)  # no guidance: its best scale changes while the network learns
BATCH = 64
# The number by which a checkpoint is the best, whichever there is.
DISTANCES = (FID.name, FRECHET.name, "frechet_test")

Judge = Callable[[Tensor, Tensor], dict[str, float]]


class Evaluation:
    """Draws samples and evaluates them. Built, which reads the reference, and used on one process only."""

    def __init__(self, config: TrainConfig, autoencoder: Autoencoder, device: torch.device) -> None:
        self._config, self._autoencoder, self._device = config, autoencoder, device
        self._judge = _digits_judge(config) if config.eval_extractor else _features_judge(config, device)

    def run(self, model: nn.Module, card: ModelCard) -> dict[str, float]:
        """Numbers by name: a Fréchet distance (see `DISTANCES`), precision, recall, and perhaps others."""
        labels = balanced_labels(self._config.eval_samples, card.trained_classes, self._config.seed)
        images = []
        for rows in torch.arange(len(labels)).split(BATCH):
            streams = RowGenerators.for_keys("evaluation", self._config.seed, positions=rows.tolist())
            asked = trained_labels(labels[rows], card)
            latents, _ = draw_latents(model, card, asked, streams, SETTINGS, self._device)
            images.append(self._autoencoder.decode(latents))
        return self._judge(torch.cat(images), labels)


def distance_of(numbers: dict[str, float]) -> tuple[str, float]:
    """The name and value of the number by which checkpoints are compared."""
    (name,) = (name for name in DISTANCES if name in numbers)
    return name, numbers[name]


def _features_judge(config: TrainConfig, device: torch.device) -> Judge:
    """By Inception's features, or an encoder's."""
    reference = open_reference(Path(str(config.eval_reference)))
    extractor: FeatureExtractor
    if config.eval_enc_type is not None:
        extractor = load_encoder_extractor(config.eval_enc_type, _path(config.eval_weights), device)
    else:
        extractor = load_inception(_path(config.eval_weights), device)
        reference.check_extractor(extractor)
    known = _comparison(reference, extractor, device)

    def judge_features(images: Tensor, labels: Tensor) -> dict[str, float]:
        pool = torch.cat([extractor(batch)["pool"].cpu() for batch in images.split(BATCH)])
        results = results_of(replace(known, samples={"pool": pool}), subset=True)
        return {name: value for name, value in results.items() if isinstance(value, float)}

    return judge_features


def _comparison(reference: Reference, extractor: FeatureExtractor, device: torch.device) -> FeatureSets:
    """One without samples yet; the reference's features come from the cache or go there."""
    features: dict[str, Tensor] = {}
    if reference.source is not None:
        cache, alone = FeatureCache(FeatureCache.default_folder()), Process(0, 1, device)
        found = extract(reference.source, extractor, cache, alone, batch_size=BATCH, title="reference")
        assert found is not None
        features = {"pool": found.load("pool")}
    elif not extractor.has_stored_statistics:
        raise UserError(f"--eval-reference {reference.path}: holds no images to compute features of")
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


def _digits_judge(config: TrainConfig) -> Judge:
    train, test = digits_splits(Path(str(config.eval_reference)))
    extractor = load_extractor(str(config.eval_extractor))

    def judge_images(images: Tensor, labels: Tensor) -> dict[str, float]:
        results = evaluate_digits(images.permute(0, 2, 3, 1), labels, test, train, extractor)
        return {name: results[name] for name in ("frechet_test", "accuracy", "precision", "recall", "coverage")}

    return judge_images


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
