"""The command `stablevm evaluate`, which evaluates images or a checkpoint and writes a table, a JSON file and a report.

A checkpoint is evaluated without writing its images to a file.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablevm.evaluation.config import (
    EvaluateCheckpointConfig,
    EvaluateConfig,
    EvaluationOptions,
    check_outputs,
    default_output,
    inputs_of,
    outputs_of,
)
from stablevm.evaluation.digits import digits_rows, evaluate_digits
from stablevm.evaluation.extractors import FeatureExtractor, load_encoder_extractor, load_inception
from stablevm.evaluation.features import FeatureCache, extract
from stablevm.evaluation.npz import Archive
from stablevm.evaluation.samples import Reference, Samples, check_comparable, open_reference, open_samples, warnings_of
from stablevm.evaluation.small_extractor import digits_splits, load_extractor
from stablevm.evaluation.sources import content_sha256
from stablevm.metrics.metric import FeatureSets
from stablevm.metrics.table import result_rows, results_of
from stablevm.networks.snapshot import ModelCard, title_of
from stablevm.sampling.archive import read_provenance
from stablevm.sampling.config import GenerateConfig
from stablevm.sampling.image_sampler import ImageSampler
from stablevm.sampling.provenance import (
    Provenance,
    decoding_notes,
    default_name,
    labels_of,
    newest_notes,
    provenance_of,
    resolved,
)
from stablevm.support.cards import entry_of
from stablevm.support.compiler import check_compiler
from stablevm.support.errors import UserError
from stablevm.support.files import remove_temporary_of, write_json
from stablevm.support.locks import owned
from stablevm.support.npz import NpzFile
from stablevm.support.processes import Process
from stablevm.support.text import shown

Results = dict[str, Any]
POOR_ACCURACY = 0.8  # of an extractor, on the test images, below which its numbers come with a warning


def evaluate(config: EvaluateConfig) -> Results:
    """Evaluate samples, print the table, write the JSON file and the report, and return the results.

    Processes other than the first return {} when they have computed their share of the features. Raises UserError,
    before anything is written, for input that can't be evaluated.
    """
    process = _begin(config, config.warnings())
    output = config.output or default_output(config.samples)
    check_outputs(outputs_of(output, config), {"SAMPLES": config.samples} | inputs_of(config))
    with _results_owned(output, process):
        if config.extractor is None:
            samples = replace(open_samples(config.samples), protocol=protocol_in(config.samples))
            return _evaluate_samples(samples, config, process, output)
        if not process.is_first:
            return {}
        arrays, protocol = read_samples(config.samples), protocol_in(config.samples)
        return _finish_digits(*arrays, str(config.samples), config, output, protocol=protocol)


@contextmanager
def _results_owned(output: Path, process: Process) -> Iterator[None]:
    """Keep other commands away from the results, and remove temporary files of interrupted ones."""
    with owned(output.parent, output.name):
        if process.is_first:
            remove_temporary_of(output, output.with_suffix(".html"))
        yield


def _check_replaced(output: Path, made_with: Mapping[str, str]) -> None:
    """UserError for a file that holds anything but the results of this evaluation, whose samples may have changed.

    made_with: the digests of the reference and of each network, by what they are called in the results.
    """
    if not output.exists():
        return
    other = f"give --output another name, or remove {output}"
    known = entry_of(output, "sha256")
    if known is None:
        raise UserError(f"{output} exists, and holds no results of an evaluation by this version: {other}")
    changed = [name for name, value in known.items() if made_with.get(name) != value]
    if changed:
        names = ", ".join(shown(name, quoted=False) for name in changed)
        raise UserError(f"{output} holds results of another evaluation (differing in {names}): {other}")


def _evaluate_samples(
    samples: Samples, config: EvaluationOptions, process: Process, output: Path, *, show: bool = True
) -> Results:
    """Evaluate samples with the features that the options request; see `evaluate`. show: whether to print."""
    reference = open_reference(config.reference)
    warnings = check_comparable(samples, reference)
    extractors = _extractors(config, reference, process.device)
    made_with = {"reference": content_sha256(reference.path)} | {each.section: each.fingerprint for each in extractors}
    _check_replaced(output, made_with)
    cache = FeatureCache(config.cache_dir or FeatureCache.default_folder())
    found = [_features_of_both(each, samples, reference, config, cache, process) for each in extractors]
    comparisons = [each for each in found if each is not None]
    if not process.is_first:
        return {}
    cache.sweep(config.cache_gigabytes)
    results: Results = {
        "samples": samples.title,
        "num_samples": len(samples),
        "reference": str(reference.path),
        "reference_images": 0 if reference.source is None else len(reference.source),
        "sha256": made_with,
        "warnings": _told(warnings, show),
    }
    rows: list[Sequence[str | float]] = [("measure", "value", "meaning"), ("samples", len(samples), "generated images")]
    for each in comparisons:
        values = results_of(each)
        values["statistics"] = reference.statistics_text(bool(each.stored))
        results["warnings"] += _told(warnings_of(each, samples), show)
        results[each.section] = values
        rows.append(("features", each.extractor, "the network that the numbers below come from"))
        rows += result_rows(values, values["statistics"], reference.images_text)
    if config.report:
        from stablevm.evaluation.sample_report import write_sample_report

        write_sample_report(output.with_suffix(".html"), samples, reference, comparisons, results, rows)
    return _finish(results | _under_protocol(samples.protocol), rows, output, show)


def _finish_digits(
    images: Tensor,
    labels: Tensor,
    title: str,
    config: EvaluationOptions,
    output: Path,
    *,
    show: bool = True,
    protocol: Provenance | None = None,
) -> Results:
    """Evaluate images of digits uint8 (N, 8, 8, 3) with classes (N,), and write the results."""
    assert config.extractor is not None
    made_with = {"reference": content_sha256(config.reference), "extractor": content_sha256(config.extractor)}
    _check_replaced(output, made_with)
    train, test = digits_splits(config.reference)
    extractor = load_extractor(config.extractor)
    if extractor.test_accuracy < POOR_ACCURACY:
        poor = f"recognises {extractor.test_accuracy:.0%} of the test images, so its numbers say little"
        _told([f"--extractor {config.extractor}: {poor}; train it longer, or on more images"], show)
    results = evaluate_digits(images, labels, test, train, extractor)
    rows = digits_rows(results)
    named = {
        "samples": title,
        "reference": str(config.reference),
        "sha256": made_with,
        **results,
        **_under_protocol(protocol),
    }
    return _finish(named, rows, output, show)


def _under_protocol(protocol: Provenance | None) -> Results:
    """What the images were made with, for the results; nothing where that isn't recorded."""
    return {} if protocol is None else {"protocol": protocol}


def protocol_in(path: Path) -> Provenance | None:
    """What the images in a file of `generate` were made with; None for images from elsewhere."""
    return read_provenance(path) if path.is_file() and is_zipfile(path) and "protocol" in NpzFile(path) else None


def read_samples(path: Path) -> tuple[Tensor, Tensor]:
    """Read `arr_0` and `labels` of an .npz file unchanged; UserError if the file or one of them is missing."""
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
    """A table with aligned columns for a terminal; floats have six significant digits."""
    cells = [[f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def _begin(config: EvaluationOptions, warnings: Sequence[str]) -> Process:
    """Check the options, and warn of those without effect."""
    config.validate()
    process = Process.from_environment()
    if process.is_first:
        for line in warnings:
            print(f"warning: {line}", file=sys.stderr)
    return process


def _finish(results: Results, rows: Sequence[Sequence[str | float]], output: Path, show: bool) -> Results:
    write_json(output, results)
    if show:
        print(text_table(rows))
        print(f"results written to {output}")
    return results


def _extractors(config: EvaluationOptions, reference: Reference, device: torch.device) -> list[FeatureExtractor]:
    """The extractors that the options request, checked against the reference before anything is computed."""
    extractors: list[FeatureExtractor] = []
    if config.inception:
        inception = load_inception(config.inception_weights, device)
        reference.check_extractor(inception)
        extractors.append(inception)
    if config.enc_type is not None:
        if reference.source is None:
            raise UserError(
                f"--enc-type {config.enc_type}: {reference.path} holds no images from which to compute features"
            )
        extractors.append(load_encoder_extractor(config.enc_type, config.encoder_weights, device))
    return extractors


def _features_of_both(
    extractor: FeatureExtractor,
    samples: Samples,
    reference: Reference,
    config: EvaluationOptions,
    cache: FeatureCache,
    process: Process,
) -> FeatureSets | None:
    """The features of both sets by each extractor; None in processes other than the first."""
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


def _told(warnings: list[str], show: bool) -> list[str]:
    for line in warnings if show else ():
        print(f"warning: {line}", file=sys.stderr)
    return warnings


@dataclass(frozen=True)
class CheckpointSource:
    """The images that `generate` would write, made when they are requested.

    They depend only on the protocol and their index, so the cache key is known without making them, and images whose
    features are cached are not made.
    """

    config: GenerateConfig
    card: ModelCard
    provenance: Provenance
    device: torch.device

    def __len__(self) -> int:
        return self.config.num_fid_samples

    def key(self, part: range) -> str:
        return hashlib.sha256(f"{json.dumps(self.provenance)} {part}".encode()).hexdigest()

    def images(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """The images uint8 (n, H, W, 3) at these indices; UserError for an image that is not finite."""
        batches = torch.tensor(list(indices)).split(self.config.per_proc_batch_size)
        return np.concatenate([self._sampler.sample(batch.tolist(), self.labels[batch])[0] for batch in batches])

    @cached_property
    def labels(self) -> Tensor:
        return labels_of(self.config, self.card)

    @property
    def side(self) -> int:
        """The side of the images in pixels."""
        return self._sampler.image_side

    @cached_property
    def _sampler(self) -> ImageSampler:
        return ImageSampler.load(self.config, self.card, self.device)


def evaluate_checkpoint(config: EvaluateCheckpointConfig, *, is_part: bool = False) -> Results:
    """Evaluate the images that a checkpoint generates; otherwise like `evaluate`.

    is_part: whether this is part of a longer command, which then prints the results and warnings itself.
    """
    config.sampling.validate()
    process = _begin(config.evaluation, [] if is_part else config.warnings())
    sampling, card = resolved(config.drawn)
    sampling = sampling.effective()
    if sampling.compile:
        check_compiler(process.device)
    for line in newest_notes(config.sampling, sampling) if process.is_first and not is_part else ():
        print(line)
    for line in decoding_notes(sampling.vae, card.latent) if process.is_first and not is_part else ():
        print(f"warning: {line}", file=sys.stderr)
    source = CheckpointSource(sampling, card, provenance_of(sampling, card), process.device)
    name = sampling.name or default_name(source.provenance)
    output = config.evaluation.output or sampling.sample_dir / f"{name}.json"
    check_outputs(outputs_of(output, config.evaluation), {"--ckpt": sampling.ckpt} | inputs_of(config.evaluation))
    title = title_of(config.sampling.ckpt, sampling.ckpt)
    with _results_owned(output, process):
        if config.evaluation.extractor is not None:
            if not process.is_first:
                return {}
            images = torch.from_numpy(source.images(range(len(source))))
            return _finish_digits(
                images, source.labels, title, config.evaluation, output, show=not is_part, protocol=source.provenance
            )
        labels = None if sampling.unconditional else source.labels.numpy()
        samples = Samples(title, source, (source.side, source.side), labels, source.provenance)
        return _evaluate_samples(samples, config.evaluation, process, output, show=not is_part)
