"""The command `stablevm reference`, which writes a file to evaluate against; ADM's suite can read it too.

The file holds `arr_0`, uint8 (N, H, W, 3), for precision and recall; `mu`, `sigma`, `mu_s` and `sigma_s`, the
statistics of the features of the whole set, as in ADM's files; and `labels` and `protocol`, which only our commands
read.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stablevm.data.dataset import PreparedDataset
from stablevm.data.layouts import has_dataset
from stablevm.data.opening import dataset_folder, open_dataset
from stablevm.evaluation.config import ReferenceConfig, check_outputs
from stablevm.evaluation.extractors import InceptionExtractor, load_inception
from stablevm.evaluation.features import FeatureCache, Features, extract
from stablevm.evaluation.sources import DatasetSource, FolderSource, ImageSource
from stablevm.metrics.statistics import FeatureStatistics
from stablevm.preparation.crops import first_size
from stablevm.preparation.sources import open_source
from stablevm.sampling.archive import read_provenance, write_archive
from stablevm.support import rng
from stablevm.support.errors import UserError
from stablevm.support.files import remove_temporary_of, write_with
from stablevm.support.locks import owned
from stablevm.support.options import check_options
from stablevm.support.processes import Process

CHUNK = 256  # images in memory at once, in addition to those of a batch


def reference(config: ReferenceConfig) -> Path:
    """Write the file in the first process, and return its path; UserError for a source without images."""
    config.validate()
    inputs = {"SOURCE": config.source, "--inception-weights": config.inception_weights}
    check_outputs({"--output": config.output}, inputs)
    process = Process.from_environment()
    with owned(config.output.parent, config.output.name):
        if process.is_first:
            remove_temporary_of(config.output)
        return _reference(config, process)


def _reference(config: ReferenceConfig, process: Process) -> Path:
    if process.is_first:
        for line in config.warnings():
            print(f"warning: {line}", file=sys.stderr)
    source, labels, class_names = _open(config)
    arrays: dict[str, NDArray[Any]] = {}
    protocol: dict[str, Any] = {"source": str(config.source), "seed": config.seed, "class_names": list(class_names)}
    protocol["options"] = _options(config)
    _check_replaced(config.output, protocol["options"])
    if config.statistics:
        extractor = load_inception(config.inception_weights, process.device)
        cache = FeatureCache(config.cache_dir or FeatureCache.default_folder())
        features = extract(source, extractor, cache, process, batch_size=config.batch_size, title="images")
        if features is not None:
            arrays = _statistics(features, extractor)
            protocol |= {"statistics_of": len(source), "extractor": extractor.name}
            protocol["extractor_fingerprint"] = extractor.fingerprint
    if process.is_first:
        rows = torch.randperm(len(source), generator=rng.generator("reference", config.seed))[: config.num_images]
        chunks = (source.images(part.tolist()) for part in rows.split(CHUNK))
        write_with(config.output, lambda path: write_archive(path, chunks, labels[rows.numpy()], protocol, arrays))
        if config.statistics:
            cache.sweep(config.cache_gigabytes)
        what = f"statistics of {len(source):,} images ({extractor.name}), " if config.statistics else ""
        print(f"{config.output}: {what}{len(rows):,} images")
    return config.output


def _options(config: ReferenceConfig) -> dict[str, Any]:
    """The options that a reference depends on."""
    names = ("source", "split", "resolution", "transform", "num_images", "seed", "statistics")
    values = {name: getattr(config, name) for name in names}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _check_replaced(output: Path, options: Mapping[str, Any]) -> None:
    """UserError where `output` is anything but a reference with the same options."""
    if not output.exists():
        return
    remedy = "give --output another name, or remove it"
    try:
        earlier = read_provenance(output).get("options")
    except UserError:
        earlier = None
    if not isinstance(earlier, dict):
        raise UserError(f"{output} exists, and was not made by this version of the command: {remedy}")
    check_options(output, options, earlier, remedy)


def _statistics(features: Features, extractor: InceptionExtractor) -> dict[str, NDArray[np.float64]]:
    """The statistics mu, sigma, mu_s and sigma_s, by ADM's names, computed part by part."""
    arrays: dict[str, NDArray[np.float64]] = {}
    for kind, suffix in zip(extractor.feature_names, ("", "_s"), strict=True):
        moments = _gathered(features.parts(kind)).moments
        arrays |= {f"mu{suffix}": moments.mean.numpy(), f"sigma{suffix}": moments.covariance.numpy()}
    return arrays


def _gathered(parts: Iterator[torch.Tensor], at_once: int = 16) -> FeatureStatistics:
    """The statistics of all rows; parts are joined for each update, which costs the same for many rows."""
    first = next(parts)
    statistics, waiting = FeatureStatistics(first.shape[1]), [first]
    for part in parts:
        waiting.append(part)
        if len(waiting) == at_once:
            statistics.update(torch.cat(waiting))
            waiting.clear()
    if waiting:
        statistics.update(torch.cat(waiting))
    return statistics


def _open(config: ReferenceConfig) -> tuple[ImageSource, NDArray[np.int64], tuple[str, ...]]:
    """The images, their classes and the names of classes; a folder is a data set if it can be opened as one."""
    dataset = _dataset(config)
    if dataset is not None:
        dataset.check_images()
        if config.resolution not in (None, dataset.resolution):
            raise UserError(f"--resolution {config.resolution}: {config.source} holds images of {dataset.resolution}")
        return DatasetSource(dataset), dataset.labels().numpy(), dataset.class_names
    source = open_source(config.source, None if config.split == ReferenceConfig.split else config.split)
    for line in source.warnings:
        print(f"warning: {line}", file=sys.stderr)
    if config.resolution is None and config.transform != "none":
        raise UserError(
            f"{config.source}: a folder of images needs --resolution, the side to crop to; or --transform none, if "
            "all have the same size"
        )
    size = first_size(source) if config.resolution is None else (config.resolution, config.resolution)
    return FolderSource(source, config.transform, size), source.labels, source.class_names


def _dataset(config: ReferenceConfig) -> PreparedDataset | None:
    folder = dataset_folder(config.source, config.split)
    return open_dataset(config.source, config.split) if has_dataset(folder) else None
