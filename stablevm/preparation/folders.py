"""`convert` and `encode` in the layout of REPA: one file per image, paired by name, in a folder or an archive.

`images/00000/img00000012.png` is image 12 of the source, even if images before it could not be read. Its latent is
`vae-sd/00000/img-mean-std-00000012.npy`, float32 (2C, h, w). Each folder has a dataset.json with names and classes.
"""

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stablevm.data.listing import LISTING_FILE, WORK_FOLDER, format_listing
from stablevm.data.png import encode_png
from stablevm.data.repa import latent_name
from stablevm.networks.autoencoder import latent_spec_of
from stablevm.preparation.config import ConvertConfig, EncodeConfig
from stablevm.preparation.crops import Cropped, Cropper, first_size, make_cropper
from stablevm.preparation.encoding import BatchEncoder, make_encoder
from stablevm.preparation.outcome import Report, conclude, make_report, tell
from stablevm.preparation.source import Source, printable
from stablevm.preparation.sources import open_source, select
from stablevm.preparation.targets import Files, Target, target_of
from stablevm.preparation.work import (
    PART_LENGTH,
    Job,
    check_apart,
    encoding_part_length,
    shared,
)
from stablevm.support.errors import UserError
from stablevm.support.processes import Process

IMAGES_PER_FOLDER = 1000


def convert(config: ConvertConfig) -> int:
    """Crop the images of a source into PNG files, and return the exit status."""
    config.validate()
    process = Process.from_environment()
    check_apart(config.source, config.dest)
    source = select(config)
    tell(source, process)
    cropper = make_cropper(config, source)
    plan = {"step": "convert", **cropper.plan}
    target = target_of(config.dest)
    with target.lock():
        report = target.begin(plan, process)
        if report is None:
            with shared(target.home, target.marker, process):
                report = _convert(config, target, cropper, plan, process)
    return conclude(report, config.dest, "converted", process)


def _convert(
    config: ConvertConfig, target: Target, cropper: Cropper, plan: dict[str, Any], process: Process
) -> Report | None:
    source = cropper.source
    job = _job("convert", target, len(source), process)
    for part, outcomes in job.run(_PngMaker(cropper, target), config.batch_size, config.num_workers, _has_record(job)):
        _record(target, job.path(part), outcomes)
    if not process.is_first:
        return None
    names = [png_name(index) for index in range(len(source))]
    facts = {"resolution": list(cropper.result_size), "crop": cropper.transform}
    return _finish(job, target, plan, source, names, facts)


def encode(config: EncodeConfig) -> int:
    """Encode converted images as latents, one .npy file each, and return the exit status."""
    config.validate()
    process = Process.from_environment()
    check_apart(config.source, config.dest)
    source = open_source(config.source).first(config.max_images)
    tell(source, process)
    _latent_names(source)  # a clash of names is an error before anything is done
    size = first_size(source)
    if size[0] != size[1]:
        raise UserError(f"{config.source}: its images are {size[0]} x {size[1]}; encode takes squares: convert them")
    latent = latent_spec_of(config.vae, size[0])
    cropper = Cropper(source, "none", size)
    plan = {"step": "encode", **cropper.plan, "vae": latent.autoencoder_id, "precision": config.precision,
            "batch size": config.batch_size}  # fmt: skip
    target = target_of(config.dest)
    with target.lock():
        report = target.begin(plan, process)
        if report is None:
            with shared(target.home, target.marker, process):
                encoder = make_encoder(latent, config.precision, process)
                report = _encode(config, target, cropper, encoder, plan, process)
    return conclude(report, config.dest, "encoded", process)


def _encode(
    config: EncodeConfig,
    target: Target,
    cropper: Cropper,
    encoder: BatchEncoder,
    plan: dict[str, Any],
    process: Process,
) -> Report | None:
    source, names = cropper.source, _latent_names(cropper.source)
    job = _job("encode", target, len(source), process, encoding_part_length(config.batch_size))
    for part, outcomes in job.run(cropper, config.batch_size, config.num_workers, _has_record(job)):
        _record(target, job.path(part), (_encoded(each, encoder, names, target) for each in outcomes))
    if not process.is_first:
        return None
    facts = {
        "resolution": list(cropper.size),
        "crop": source.facts.get("crop", "unknown"),
        "latent": encoder.autoencoder.latent.to_dict(),
        "precision": config.precision,
    }
    return _finish(job, target, plan, source, names, facts)


def png_name(index: int) -> str:
    return f"{index // IMAGES_PER_FOLDER:05d}/img{index:08d}.png"


Made = tuple[Files, list[dict[str, Any]]]  # the files for the record of a part, and the problems


@dataclass(frozen=True)
class _PngMaker:
    """Crops images in a worker and passes the files on; files in a folder are on disk when the call returns."""

    cropper: Cropper
    target: Target

    def __call__(self, indices: range) -> Made:
        cropped = self.cropper(indices)
        images = zip(cropped.indices, cropped.images, strict=True)
        return self.target.put({png_name(index): encode_png(image) for index, image in images}), cropped.problems


def _encoded(cropped: Cropped, encoder: BatchEncoder, names: list[str], target: Target) -> Made:
    files = {}
    if cropped.indices:
        images = torch.from_numpy(np.stack(cropped.images)).permute(0, 3, 1, 2)
        moments = encoder(images, [names[index] for index in cropped.indices]).numpy()
        for index, values in zip(cropped.indices, moments, strict=True):
            buffer = io.BytesIO()
            np.save(buffer, values)
            files[names[index]] = buffer.getvalue()
    return target.put(files), cropped.problems


def _record(target: Target, path: Path, outcomes: Iterable[Made]) -> None:
    """Write the file which records that a part is done."""
    files: dict[str, bytes] = {}
    problems: list[dict[str, Any]] = []
    for made, found in outcomes:
        files |= made
        problems += found
    target.record(path, files, problems)


def _job(title: str, target: Target, count: int, process: Process, part_length: int = PART_LENGTH) -> Job:
    return Job(title, target.home / WORK_FOLDER / "parts", [range(count)], process, part_length)


def _has_record(job: Job) -> Callable[[set[str], range], bool]:
    return lambda names, part: job.path(part).name in names


def _latent_names(source: Source) -> list[str]:
    names = [latent_name(name) for name in source.names]
    first: dict[str, str] = {}
    for latent, image in zip(names, source.names, strict=True):
        if printable(image) != image:
            raise UserError(
                f"{source.storage.root}: the name {printable(image)} is not UTF-8, which {LISTING_FILE} can't hold; "
                "rename it, or convert the images first"
            )
        if latent in first:
            raise UserError(
                f"{source.storage.root}: {first[latent]} and {image} would have the same latent, {latent}; "
                "rename one, or convert the images first"
            )
        first[latent] = image
    return names


def _finish(
    job: Job, target: Target, plan: dict[str, Any], source: Source, names: list[str], facts: dict[str, Any]
) -> Report:
    records = [job.path(part) for part in job.parts()]
    job.wait(records)
    report = make_report(plan, source, (each for record in records for each in target.problems(record)))
    skipped = {problem.index for problem in report.problems if problem.action == "skipped"}
    kept = ((names[index], int(source.labels[index])) for index in range(len(source)) if index not in skipped)
    target.finish(records, format_listing(kept, {"class_names": list(source.class_names), **facts}), report)
    return report
