"""`convert` and `encode` in the native layout: first shards of images, then the latents of their rows.

A shard covers `SHARD_LENGTH` consecutive images of the source, without those that can't be read. Its rows do not depend
on other shards, so shards can be made in any order, by any process.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stablevm.data.listing import WORK_FOLDER
from stablevm.data.manifest import MANIFEST_FILE, Manifest, Shard
from stablevm.data.png import encode_png
from stablevm.data.shards import ShardDataset
from stablevm.networks.autoencoder import full_name, latent_spec_of
from stablevm.preparation.config import ConvertShardsConfig, EncodeShardsConfig
from stablevm.preparation.crops import Cropper, make_cropper, merged
from stablevm.preparation.encoding import make_encoder
from stablevm.preparation.joining import ShardJob, ShardRecord, shard_groups
from stablevm.preparation.outcome import REPORT_FILE, Report, conclude, make_report, tell
from stablevm.preparation.source import Source
from stablevm.preparation.sources import select
from stablevm.preparation.work import (
    Job,
    begin,
    begin_step,
    check_apart,
    clear,
    encoding_part_length,
    shared,
    sweep,
)
from stablevm.support.cards import card_of
from stablevm.support.errors import UserError
from stablevm.support.locks import owned
from stablevm.support.options import as_typed
from stablevm.support.processes import Process

_IMAGES, _LATENTS = "images", "latents"  # names of the two steps


def convert(config: ConvertShardsConfig) -> int:
    """Crop the images of a source into shards, and return the exit status; `encode` completes the data set."""
    config.validate()
    process = Process.from_environment()
    check_apart(config.source, config.dest)
    source = select(config)
    tell(source, process)
    cropper = make_cropper(config, source)
    width, height = cropper.result_size
    if width != height:
        raise UserError(f"{config.dest}: shards hold squares, the images would be {width} x {height}; crop them")
    plan = {
        "step": "shards",
        **cropper.plan,
        "compress": config.compress,
        "side": width,
        "class names": list(source.class_names),
    }
    if config.part != ConvertShardsConfig.part:
        plan["part"] = config.part  # for whoever asks whether two data sets share images
    with owned(config.dest):
        report = begin(config.dest, plan, process) or _convert(config, source, cropper, plan, process)
    return conclude(report, config.dest, "converted", process)


def _convert(
    config: ConvertShardsConfig, source: Source, cropper: Cropper, plan: dict[str, Any], process: Process
) -> Report | None:
    job = Job("convert", config.dest / WORK_FOLDER / _IMAGES, shard_groups(len(source)), process)
    shards = ShardJob(job, config.dest, {"images": image_tensors(config.compress)})
    for part, outcomes in job.run(cropper, config.batch_size, config.num_workers, shards.is_done):
        cropped = merged(outcomes)
        index = torch.tensor(cropped.indices, dtype=torch.int64)
        rows = {"index": index, "labels": torch.from_numpy(source.labels)[index]}
        shards.write(part, rows | pack_images(cropped.images, plan["side"], config.compress), cropped.problems)
    shards.join(wait=True)
    if not process.is_first:
        return None
    report = make_report(plan, source, (problem for record in shards.records() for problem in record.problems))
    report.write(config.dest)
    sweep(config.dest)
    return report


def encode(config: EncodeShardsConfig) -> int:
    """Encode the images in shards, which completes the data set, and return the exit status."""
    config.validate()
    process = Process.from_environment()
    folder = config.data_dir
    if not (folder / REPORT_FILE).exists():
        raise UserError(f"{folder}: holds no converted shards, or their conversion was interrupted; run convert first")
    with owned(folder):
        report = _encode(config, folder, process)
    return conclude(report, folder, "in the data set", process, earlier="convert")


def _encode(config: EncodeShardsConfig, folder: Path, process: Process) -> Report:
    report = Report.read(folder)
    if report.plan.get("step") != "shards":
        raise UserError(
            f"{folder}: was not made by stablevm prepare convert; use preprocessing/dataset_tools.py encode"
        )
    if (folder / MANIFEST_FILE).exists():
        _check_same(config, Manifest.read(folder))
        if process.is_first:
            _tidy(folder, config.keep_images)
    else:
        with shared(folder, folder / MANIFEST_FILE, process):
            _Encoding(config, report.plan, process).run()
    return report


@dataclass(frozen=True)
class _Converted:
    """The facts that encoding needs from the plan in the report of the conversion."""

    class_names: tuple[str, ...]
    side: int
    transform: str
    compress: bool

    @classmethod
    def of(cls, plan: dict[str, Any], folder: Path) -> "_Converted":
        """Read the facts from a plan; UserError for a plan that `convert` can't have made."""
        spoken = {field.name: field.name.replace("_", " ") for field in fields(cls)}
        values = {name: plan[key] for name, key in spoken.items() if key in plan}
        return card_of(cls, values, f"{folder / REPORT_FILE}: plan", remedy="convert again into a new folder")


class _Encoding:
    """Encoding the rows of shards of images as latents."""

    def __init__(self, config: EncodeShardsConfig, plan: dict[str, Any], process: Process) -> None:
        self.config, self.process, self.folder = config, process, config.data_dir
        converted = _Converted.of(plan, self.folder)
        latent = latent_spec_of(config.vae, converted.side)
        settings = {"vae": latent.autoencoder_id, "precision": config.precision, "flip": config.flip}
        begin_step(self.folder / WORK_FOLDER / _LATENTS, {**settings, "batch size": config.batch_size})
        self.images = ShardRecord.read_all(self.folder / WORK_FOLDER / _IMAGES)
        self.manifest = Manifest(
            class_names=converted.class_names,
            resolution=converted.side,
            crop=converted.transform,
            latent=latent,
            has_flips=config.flip,
            has_images=True,
            precision=config.precision,
            compressed=converted.compress,
            shards=tuple(Shard(record.rows, None, record.files["images"]) for record in self.images if record.rows),
        )
        self.dataset = ShardDataset(self.folder, self.manifest)
        self.dataset.check_images()
        self.encoder = make_encoder(latent, config.precision, process)

    def run(self) -> None:
        config = self.config
        ends = np.cumsum([record.rows for record in self.images]).tolist()
        groups = [range(end - record.rows, end) for record, end in zip(self.images, ends, strict=True)]
        length = encoding_part_length(config.batch_size)
        job = Job("encode", self.folder / WORK_FOLDER / _LATENTS, groups, self.process, length)
        shards = ShardJob(job, self.folder, {"latents": tuple(self.manifest.tensors("latents"))})
        labels = torch.tensor([label for record in self.images for label in record.labels])
        index = self.dataset.image_index()
        for part, batches in job.run(self.dataset.images, config.batch_size, config.num_workers, shards.is_done):
            rows = slice(part.start, part.stop)
            moments = self._moments(batches, index[rows])
            shards.write(part, {"index": index[rows], "labels": labels[rows], **moments}, [])
        shards.join(wait=True)
        if self.process.is_first:
            self._finish(shards.records(), labels)

    def _moments(self, batches: Iterator[Tensor], index: Tensor) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {"moments": [], "moments_flip": []}
        for pixels, numbers in zip(batches, index.split(self.config.batch_size), strict=True):
            names = [f"image {number}" for number in numbers.tolist()]
            found["moments"].append(self.encoder(pixels, names).half())
            if self.config.flip:
                found["moments_flip"].append(self.encoder(pixels.flip(-1), names).half())
        return {name: torch.cat(parts) for name, parts in found.items() if parts}

    def _finish(self, latents: list[ShardRecord], labels: Tensor) -> None:
        """Write the manifest, which makes the folder a data set, then remove files that only the work needed."""
        keep = self.config.keep_images
        shards = tuple(
            Shard(record.rows, record.files["latents"], images.files["images"] if keep else None)
            for images, record in zip(self.images, latents, strict=True)
            if record.rows
        )
        counts = tuple(torch.bincount(labels, minlength=len(self.manifest.class_names)).tolist())
        compressed = keep and self.manifest.compressed
        complete = replace(self.manifest, has_images=keep, compressed=compressed, class_counts=counts, shards=shards)
        complete.write(self.folder)
        _tidy(self.folder, keep)


def _tidy(folder: Path, keep_images: bool) -> None:
    """Remove what a complete data set does not need, also after an earlier command was killed doing so."""
    for path in [] if keep_images else folder.glob("images-*.safetensors"):
        path.unlink()
    clear(folder)


def _check_same(config: EncodeShardsConfig, manifest: Manifest) -> None:
    """Raise UserError if the complete data set does not match the options."""
    found = (manifest.latent.autoencoder, manifest.precision, manifest.has_flips, manifest.has_images)
    vae = manifest.latent.autoencoder if manifest.latent.is_by(config.vae) else full_name(config.vae)
    asked = (vae, config.precision, config.flip, config.keep_images)
    for name, theirs, ours in zip(("vae", "precision", "flip", "keep_images"), found, asked, strict=True):
        if theirs != ours:
            raise UserError(
                f"{config.data_dir}: is complete, encoded with {as_typed(name, theirs)}; this command says "
                f"{as_typed(name, ours)}: give the earlier one, or convert into another folder"
            )


def image_tensors(compress: bool) -> tuple[str, ...]:
    return ("index", "png", "sizes") if compress else ("index", "images")


def pack_images(images: list[np.ndarray], side: int, compress: bool) -> dict[str, Tensor]:
    """The tensors of a shard for uint8 images (H, W, 3)."""
    if not compress:
        planes = np.empty((len(images), 3, side, side), np.uint8)
        for row, image in enumerate(images):
            planes[row] = image.transpose(2, 0, 1)
        return {"images": torch.from_numpy(planes)}
    contents = [encode_png(image) for image in images]
    return {
        "png": torch.frombuffer(bytearray(b"".join(contents)), dtype=torch.uint8)
        if contents
        else torch.empty(0).byte(),
        "sizes": torch.tensor(list(map(len, contents)), dtype=torch.int64),
    }
