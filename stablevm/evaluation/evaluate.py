"""The command `stablevm evaluate`: from images to a table, a JSON file and a report."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stablevm.data.dataset import PreparedDataset
from stablevm.data.opening import open_dataset
from stablevm.evaluation.cautions import warnings_of
from stablevm.evaluation.config import EvaluateConfig, JudgeConfig
from stablevm.evaluation.digits_extractor import load_extractor
from stablevm.evaluation.digits_metrics import digits_rows, judge_digits
from stablevm.evaluation.extractors import FeatureExtractor, load_encoder_extractor
from stablevm.evaluation.features import FeatureCache, extract
from stablevm.evaluation.inception import load_inception
from stablevm.evaluation.npz import Archive
from stablevm.evaluation.outputs import check_outputs, default_output, inputs_of, outputs_of
from stablevm.evaluation.samples import Reference, Samples, check_comparable, open_reference, open_samples
from stablevm.metrics.metric import FeatureSets
from stablevm.metrics.table import result_rows, results_of
from stablevm.support.errors import UserError
from stablevm.support.files import remove_temporary_of, write_json
from stablevm.support.locks import owned
from stablevm.support.processes import Process

Results = dict[str, Any]


def evaluate(config: EvaluateConfig) -> Results:
    """Judge the samples, print the table, write the JSON file and the report; returns what the JSON file holds.

    Processes other than the first return {} when their share of the features is computed. Raises UserError, before
    anything is written, for input that can't be evaluated.
    """
    process = begin(config, config.warnings())
    output = config.output or default_output(config.samples)
    check_outputs(outputs_of(output, config), {"SAMPLES": config.samples} | inputs_of(config))
    with results_owned(output, process):
        if config.extractor is None:
            return compare(open_samples(config.samples), config, process, output)
        if not process.is_first:
            return {}
        return finish_digits(*read_samples(config.samples), str(config.samples), config, output)


@contextmanager
def results_owned(output: Path, process: Process) -> Iterator[None]:
    """Keep other commands away from the results, and remove what interrupted ones left half-written."""
    with owned(output.parent, output.name):
        if process.is_first:
            remove_temporary_of(output, output.with_suffix(".html"))
        yield


def compare(samples: Samples, config: JudgeConfig, process: Process, output: Path) -> Results:
    """Judge `samples` by the features that `config` asks for; see `evaluate`."""
    reference = open_reference(config.reference)
    warnings = check_comparable(samples, reference)
    cache = FeatureCache(config.cache_dir or FeatureCache.default_folder())
    found = [
        _compare_by(extractor, samples, reference, config, cache, process)
        for extractor in _extractors(config, reference, process.device)
    ]
    comparisons = [each for each in found if each is not None]
    if not process.is_first:
        return {}
    cache.sweep(config.cache_gigabytes)
    results: Results = {
        "samples": samples.title,
        "num_samples": len(samples),
        "reference": str(reference.path),
        "reference_images": 0 if reference.source is None else len(reference.source),
        "warnings": _told(warnings),
    }
    rows: list[Sequence[str | float]] = [("measure", "value", "meaning"), ("samples", len(samples), "generated images")]
    for each in comparisons:
        values = results_of(each)
        values["statistics"] = reference.statistics_text(bool(each.stored))
        results["warnings"] += _told(warnings_of(each, samples))
        results[each.section] = values
        rows.append(("features", each.extractor, "the network that the numbers below come from"))
        rows += result_rows(values, values["statistics"], reference.images_text)
    if config.report:
        from stablevm.evaluation.sample_report import write_sample_report

        write_sample_report(output.with_suffix(".html"), samples, reference, comparisons, results, rows)
    return _finish(results, rows, output)


def finish_digits(images: Tensor, labels: Tensor, title: str, config: JudgeConfig, output: Path) -> Results:
    """What `judge_digits` says of digit images uint8 (N, 8, 8, 3) and their classes (N,)."""
    assert config.extractor is not None
    train, test = splits(config.reference)
    results = judge_digits(images, labels, test, train, load_extractor(config.extractor))
    rows = digits_rows(results)
    return _finish({"samples": title, "reference": str(config.reference), **results}, rows, output)


def read_samples(path: Path) -> tuple[Tensor, Tensor]:
    """`arr_0` and `labels` of an .npz file, as they are; UserError when the file or one of the two is not there."""
    archive = Archive(path)
    arrays = []
    for name, what in (("arr_0", "images, uint8 (N, H, W, 3)"), ("labels", "their classes, integers (N,)")):
        if name not in archive:
            raise UserError(f"{path}: holds no {name} ({what}); give an .npz with both arr_0 and labels")
        array = archive.array(name)
        if array.dtype.kind not in "biuf":
            raise UserError(f"{path}: {name} holds {array.dtype}, expected {what}")
        arrays.append(torch.from_numpy(array))
    return arrays[0], arrays[1]


def text_table(rows: Sequence[Sequence[str | float | int]]) -> str:
    """Columns aligned for a terminal; floats with six significant digits."""
    cells = [[f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def begin(config: JudgeConfig, warnings: Sequence[str]) -> Process:
    """Check the options and say which have no effect."""
    config.validate()
    process = Process.from_environment()
    if process.is_first:
        for line in warnings:
            print(f"warning: {line}", file=sys.stderr)
    return process


def _finish(results: Results, rows: Sequence[Sequence[str | float]], output: Path) -> Results:
    write_json(output, results)
    print(text_table(rows))
    print(f"results written to {output}")
    return results


def _extractors(config: JudgeConfig, reference: Reference, device: torch.device) -> list[FeatureExtractor]:
    """Those that the options ask for, checked against the reference before anything is computed."""
    extractors: list[FeatureExtractor] = []
    if config.inception:
        inception = load_inception(config.inception_weights, device)
        reference.check_extractor(inception)
        extractors.append(inception)
    if config.enc_type is not None:
        if reference.source is None:
            raise UserError(
                f"--enc-type {config.enc_type}: {reference.path} holds no images to compute its features of"
            )
        extractors.append(load_encoder_extractor(config.enc_type, config.encoder_weights, device))
    return extractors


def _compare_by(
    extractor: FeatureExtractor,
    samples: Samples,
    reference: Reference,
    config: JudgeConfig,
    cache: FeatureCache,
    process: Process,
) -> FeatureSets | None:
    """The features of both sets, side by side; None where this isn't the first process."""
    sets = {"samples": samples.source, "reference": reference.source}
    found = {
        what: extract(source, extractor, cache, process, batch_size=config.batch_size,
                      title=f"{what}, {extractor.name}")
        for what, source in sets.items() if source is not None
    }  # fmt: skip
    if not process.is_first:
        return None
    loaded = {
        what: {name: features.load(name) for name in extractor.feature_names}
        for what, features in found.items() if features is not None
    }  # fmt: skip
    if extractor.logits is not None:
        loaded["samples"]["logits"] = extractor.logits(loaded["samples"]["pool"])
    return FeatureSets(
        extractor=extractor.name,
        published=extractor.published,
        samples=loaded["samples"],
        reference=loaded.get("reference", {}),
        stored=reference.stored if extractor.has_stored_statistics else {},
        arithmetic=config.precision_recall,
        device=process.device,
        section=extractor.section,
    )


def _told(warnings: list[str]) -> list[str]:
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)
    return warnings


def splits(reference: Path) -> tuple[PreparedDataset, PreparedDataset]:
    """Training and test split; UserError where the folder holds one data set that would pass for both."""
    train, test = open_dataset(reference, "train"), open_dataset(reference, "test")
    if train.folder == test.folder:
        raise UserError(
            f"--reference {reference}: one data set, not a folder with the splits train and test; give their folder"
        )
    return train, test
