"""The command `stablevm prepare pack`, from the layout of REPA to shards, which are few and fast to read."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stablevm.data.listing import WORK_FOLDER
from stablevm.data.manifest import Manifest, Shard, ShardKind
from stablevm.data.repa import RepaDataset
from stablevm.preparation.config import PackConfig
from stablevm.preparation.joining import ShardJob, ShardRecord, shard_groups
from stablevm.preparation.outcome import REPORT_FILE, Problem, Report, conclude
from stablevm.preparation.shards import image_tensors, pack_images
from stablevm.preparation.source import fingerprint, printable
from stablevm.preparation.work import Job, begin, clear, shared
from stablevm.support.errors import UserError
from stablevm.support.locks import owned
from stablevm.support.processes import Process

_BATCH = 16  # files handed to a worker at a time


def pack(config: PackConfig) -> int:
    """Pack latents, and images unless the options say otherwise, into shards, and return the exit status."""
    config.validate()
    process = Process.from_environment()
    dataset = RepaDataset(config.source, config.vae)
    if config.images:
        dataset.check_images()
    plan = {
        "step": "pack",
        "source": fingerprint(dataset.names, dataset.labels().tolist(), dataset.class_names),
        "images": config.images,
        "compress": config.compress,
        "latent": dataset.latent.to_dict(),
    }
    with owned(config.dest):
        report = begin(config.dest, plan, process)
        if report is None:
            with shared(config.dest, config.dest / REPORT_FILE, process):
                report = _pack(config, dataset, plan, process)
    return conclude(report, config.dest, "packed", process)


def _pack(config: PackConfig, dataset: RepaDataset, plan: dict[str, Any], process: Process) -> Report | None:
    manifest = Manifest(
        class_names=dataset.class_names,
        resolution=dataset.resolution,
        crop=dataset.crop,
        latent=dataset.latent,
        has_flips=False,
        has_images=config.images,
        precision=dataset.precision,
        compressed=config.images and config.compress,
    )
    kinds: dict[ShardKind, tuple[str, ...]] = {"latents": tuple(manifest.tensors("latents"))}
    if config.images:
        kinds["images"] = image_tensors(config.compress)
    job = Job("pack", config.dest / WORK_FOLDER / "rows", shard_groups(len(dataset)), process)
    shards = ShardJob(job, config.dest, kinds)
    reader = _Reader(dataset, config.images)
    labels, numbers = dataset.labels(), dataset.index()
    for part, outcomes in job.run(reader, _BATCH, config.num_workers, shards.is_done):
        rows = _merged(outcomes)
        kept = torch.tensor(rows.rows, dtype=torch.int64)
        moments = torch.cat(rows.moments) if rows.moments else torch.empty(0, *dataset.moments_shape).half()
        tensors = {"index": numbers[kept], "labels": labels[kept], "moments": moments}
        if config.images:
            tensors |= pack_images(rows.images, dataset.resolution, config.compress)
        shards.write(part, tensors, rows.problems)
    shards.join(wait=True)
    return _finish(config, dataset, manifest, plan, shards.records()) if process.is_first else None


def _finish(
    config: PackConfig, dataset: RepaDataset, manifest: Manifest, plan: dict[str, Any], records: list[ShardRecord]
) -> Report:
    """Write the manifest, which makes the folder a data set, and the report, which marks the work as complete."""
    problems = [problem for record in records for problem in record.problems]
    filled = [record for record in records if record.rows]
    if not filled:
        raise UserError(f"{config.source}: none of its {len(dataset):,} latents can be read: {problems[0].cause}")
    kept = np.concatenate([record.labels for record in filled])
    counts = np.bincount(kept, minlength=dataset.num_classes)
    found = tuple(Shard(record.rows, record.files["latents"], record.files.get("images")) for record in filled)
    complete = replace(manifest, class_counts=tuple(counts.tolist()), shards=found)
    complete.write(config.dest)
    report = Report(
        plan,
        complete.count,
        0,
        tuple(problems),
        class_names=complete.class_names,
        class_counts=complete.class_counts,
    )
    report.write(config.dest)
    clear(config.dest)
    return report


@dataclass
class _Rows:
    """The rows of one request that could be read, and the problems of the others."""

    rows: list[int] = field(default_factory=list)
    moments: list[Tensor] = field(default_factory=list)  # (1, 2C, h, w) each
    images: list[np.ndarray] = field(default_factory=list)  # (H, W, 3) each
    problems: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Reader:
    """Reads rows in a worker; a row is either complete or left out."""

    dataset: RepaDataset
    with_images: bool

    def __call__(self, indices: range) -> _Rows:
        rows = _Rows()
        for row in indices:
            try:
                moments = self.dataset.moments([row])
                if not moments.isfinite().all():
                    raise UserError(f"{self.dataset.names[row]}: holds values that are not finite")
                images = [self.dataset.images([row])[0].permute(1, 2, 0).numpy()] if self.with_images else []
            except UserError as error:
                name = printable(self.dataset.names[row])
                rows.problems.append(asdict(Problem(row, name, "skipped", str(error))))
                continue
            rows.rows.append(row)
            rows.moments.append(moments)
            rows.images += images
        return rows


def _merged(outcomes: Any) -> _Rows:
    whole = _Rows()
    for each in outcomes:
        for name in vars(whole):
            getattr(whole, name).extend(getattr(each, name))
    return whole
