"""The metrics of digits and other small images, by the features of an extractor that was trained on real ones.

They say whether samples are of the right class, realistic, varied, and not copies. None of them is FID, because the
features come from the extractor that the results name, not from Inception.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stablevm.data.dataset import PreparedDataset, digest
from stablevm.evaluation.small_extractor import (
    NAME,
    DigitsExtractor,
    all_images,
    check_fits,
    data_checksum,
    is_same_data,
    to_grey,
)
from stablevm.metrics.density_coverage import COVERAGE, DENSITY
from stablevm.metrics.memorisation import MEMORISATION
from stablevm.metrics.metric import FeatureSets
from stablevm.metrics.neighbours import (
    COVERAGE_K,
    PRECISION_RECALL_K,
    memorised_share,
    nearest_distance,
    neighbourhood,
)
from stablevm.metrics.precision_recall import PRECISION, RECALL
from stablevm.metrics.statistics import FeatureStatistics, frechet_distance
from stablevm.metrics.table import further_results, metrics_in
from stablevm.networks.small_net import SmallNet
from stablevm.support.errors import UserError

# Names of metrics of the table that this evaluation computes itself and has rows for.
_OWN = {PRECISION.name, RECALL.name, DENSITY.name, COVERAGE.name, MEMORISATION.name}


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
    - those of other metrics for features of any network, such as the caller's own, in `metrics.table`

    UserError for images or labels of another type, shape or range, for too few of them, and for data sets that the
    extractor is not made for.
    """
    _check_data(reference, train, extractor)
    _check_samples(images, labels, extractor.net)
    real, samples = _real_images(reference, train, extractor), images.permute(0, 3, 1, 2)
    features, classes = extractor.read(samples)
    found = neighbourhood(real.features, features)
    copies = _to_nearest(samples, real.train_images)
    results = {
        "num_samples": len(images),
        "accuracy": float((classes == labels).double().mean()),
        "frechet_test": frechet_distance(FeatureStatistics.from_features(features), real.statistics),
        "frechet_floor": real.floor,
        "precision": found.precision,
        "recall": found.recall,
        "density": found.density,
        "coverage": found.coverage,
        "nearest_train": _summary(copies),
        "nearest_train_of_test": _summary(real.unseen),
        "memorisation": memorised_share(copies, real.unseen),
        "extractor": extractor.name,
        "extractor_test_accuracy": extractor.test_accuracy,
    }
    sets = FeatureSets(
        extractor.name, False, {"pool": features}, {"pool": real.features}, {}, "exact", torch.device("cpu")
    )
    return results | further_results(sets, results)


@dataclass(frozen=True)
class _Real:
    """What evaluations need of the real images."""

    train_images: Tensor
    features: Tensor  # of the reference
    statistics: FeatureStatistics
    floor: float
    unseen: Tensor  # distances from the reference's images to the nearest of the training images


_LAST_REAL: dict[str, _Real] = {}  # by its key; a training or a study evaluates against the same images again and again


def _real_images(reference: PreparedDataset, train: PreparedDataset, extractor: DigitsExtractor) -> _Real:
    """The real images' side of an evaluation; kept for the next one, as it takes longer than the samples'."""
    weights = digest(tensor.numpy().tobytes() for tensor in extractor.net.state_dict().values())
    key = digest([data_checksum(reference), data_checksum(train), weights])
    if key not in _LAST_REAL:
        test_images, train_images = all_images(reference), all_images(train)
        features = extractor.read(test_images)[0]
        statistics = FeatureStatistics.from_features(features)
        of_train = FeatureStatistics.from_features(extractor.read(train_images)[0])
        floor, unseen = frechet_distance(of_train, statistics), _to_nearest(test_images, train_images)
        _LAST_REAL.clear()
        _LAST_REAL[key] = _Real(train_images, features, statistics, floor, unseen)
    return _LAST_REAL[key]


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
        *(each.row(results, f"the test {many}", f"the test {many}") for each in metrics_in(results.keys() - _OWN)),
        ("extractor", results["extractor"], f"test accuracy {results['extractor_test_accuracy']:.4f}"),
    ]


def _to_nearest(queries: Tensor, points: Tensor) -> Tensor:
    return nearest_distance(to_grey(queries).flatten(1), to_grey(points).flatten(1))


def _summary(distances: Tensor) -> dict[str, float]:
    return {"min": float(distances.min()), "median": float(distances.median())}


def _check_data(reference: PreparedDataset, train: PreparedDataset, extractor: DigitsExtractor) -> None:
    for dataset in (reference, train):
        check_fits(dataset, extractor.net)
    if not is_same_data(train, extractor.data_sha256) and not is_same_data(reference, extractor.test_sha256):
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
