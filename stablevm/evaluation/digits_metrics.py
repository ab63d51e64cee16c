"""The numbers about a set of generated digits: are they the right digit, real-looking, varied, and not copies?

No number here is FID, whose features come from Inception: these are of the extractor named in the result.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stablevm.data.dataset import PreparedDataset
from stablevm.evaluation.digits_extractor import (
    DigitsExtractor,
    all_images,
    check_digits,
    data_checksum,
    to_grey,
)
from stablevm.metrics.neighbours import (
    COVERAGE_K,
    PRECISION_RECALL_K,
    memorised_share,
    nearest_distance,
    neighbourhood,
)
from stablevm.metrics.statistics import FeatureStatistics, frechet_distance
from stablevm.networks.digits_net import IMAGE_SIZE
from stablevm.support.errors import UserError


def judge_digits(
    images: Tensor,
    labels: Tensor,
    reference: PreparedDataset,
    train: PreparedDataset,
    extractor: DigitsExtractor,
) -> dict[str, Any]:
    """Compare `images` uint8 (N, 8, 8, 3), made for the classes `labels` (N,), with real digits.

    `reference` is the test split, `train` the split on which the extractor was trained. Keys of the result:

    - `accuracy`: share of the images that the extractor recognises as their class
    - `frechet_test`: Fréchet distance to the reference; `frechet_floor`: the same of `train`, what real digits get
    - `precision`, `recall`, `coverage` against the reference, in [0, 1]; `density` against it, about 1 for real digits
    - `nearest_train`: `min` and `median` over the images of the Euclidean distance to the nearest of `train`, over 64
      grey pixels in [-1, 1]; near 0 are copies. `nearest_train_of_test`: the same of the reference's digits
    - `memorisation`: share of the images that are nearer to one of `train` than 99 of 100 of the reference's digits are
      (`neighbours.memorised_share`)
    - `extractor`, `extractor_test_accuracy`, `num_samples`

    UserError for images or labels of another type, shape or range, for too few of them, and for data sets that the
    extractor is not made for.
    """
    _check_data(reference, train, extractor)
    _check_samples(images, labels, reference.num_classes)
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


def digits_rows(results: Mapping[str, Any]) -> list[tuple[str, str | float | int, str]]:
    """What `judge_digits` returned as rows (measure, value, meaning), the column names first."""
    nearest, nearest_test = results["nearest_train"], results["nearest_train_of_test"]
    return [
        ("measure", "value", "meaning"),
        ("samples", results["num_samples"], "generated images"),
        ("accuracy", results["accuracy"], "share that the extractor recognises as their class"),
        ("Fréchet distance", results["frechet_test"], "to the test digits; lower is closer"),
        ("its floor", results["frechet_floor"], "the same distance of the real training digits"),
        ("precision", results["precision"], f"share near a test digit, k = {PRECISION_RECALL_K}"),
        ("recall", results["recall"], f"share of test digits near a sample, k = {PRECISION_RECALL_K}"),
        ("density", results["density"], f"test digits close by, over k = {COVERAGE_K}; about 1 for real digits"),
        ("coverage", results["coverage"], f"share of test digits with a sample close by, k = {COVERAGE_K}"),
        (
            "nearest, smallest",
            nearest["min"],
            f"pixel distance to the closest training digit; for test digits {nearest_test['min']:.3g}",
        ),
        ("nearest, median", nearest["median"], f"the same; for test digits {nearest_test['median']:.3g}"),
        (
            "memorisation",
            results["memorisation"],
            "share nearer to a training digit than 99 of 100 test digits; 0.01 for new images",
        ),
        ("extractor", results["extractor"], f"test accuracy {results['extractor_test_accuracy']:.4f}"),
    ]


def _to_nearest(queries: Tensor, points: Tensor) -> Tensor:
    return nearest_distance(to_grey(queries).flatten(1), to_grey(points).flatten(1))


def _summary(distances: Tensor) -> dict[str, float]:
    return {"min": float(distances.min()), "median": float(distances.median())}


def _check_data(reference: PreparedDataset, train: PreparedDataset, extractor: DigitsExtractor) -> None:
    for dataset in (reference, train):
        check_digits(dataset)
    if data_checksum(train) != extractor.data_sha256:
        raise UserError(
            f"{train.folder}: not the data on which the extractor was trained, so it may have seen the test digits; "
            "train an extractor on it"
        )


def _check_samples(images: Tensor, labels: Tensor, num_classes: int) -> None:
    shape, dtype = tuple(images.shape), str(images.dtype).removeprefix("torch.")
    if dtype != "uint8":
        raise UserError(f"samples: images of type {dtype}, expected uint8; round floats to levels 0 to 255 first")
    if len(shape) != 4 or shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise UserError(f"samples: images of shape {shape}, expected (N, {IMAGE_SIZE}, {IMAGE_SIZE}, 3)")
    if len(images) < 2:
        raise UserError(f"samples: {len(images)} images; generate more, some hundreds for stable numbers")
    if labels.is_floating_point() or labels.shape != (len(images),):
        kind = str(labels.dtype).removeprefix("torch.")
        raise UserError(
            f"samples: labels are {kind} {tuple(labels.shape)}, expected one integer per image: ({len(images)},)"
        )
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        raise UserError(f"samples: label {int(labels[wrong][0])}, expected classes 0 to {num_classes - 1}")
