"""The samples and the reference of an evaluation, and warnings about sets that make metrics misleading."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablevm.evaluation.extractors import PUBLISHED_NAME, SPATIAL_WIDTH, WIDTH, InceptionExtractor
from stablevm.evaluation.npz import IMAGES, Archive, ArchiveCard
from stablevm.evaluation.sources import FolderSource, ImageSource, image_size
from stablevm.metrics.metric import FeatureSets
from stablevm.metrics.neighbours import PRECISION_RECALL_K
from stablevm.metrics.statistics import Moments, short_chunk_warning
from stablevm.preparation.crops import first_size
from stablevm.preparation.sources import open_source
from stablevm.support import rng
from stablevm.support.errors import UserError
from stablevm.support.text import printable

# Images count as sorted if neighbours share a class this much more often than by chance, and by this many deviations.
SORTED_EXCESS, SORTED_DEVIATIONS = 0.1, 6.0


@dataclass(frozen=True)
class Samples:
    """Generated images; labels: their classes (N,) int64, and protocol: what they were made with, if known."""

    title: str
    source: ImageSource
    size: tuple[int, int]  # height and width in pixels
    labels: NDArray[np.int64] | None
    protocol: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True)
class Reference:
    """A reference, which holds images, stored statistics of Inception's features by kind, or both."""

    path: Path
    source: ImageSource | None
    size: tuple[int, int] | None  # height and width of the images in pixels
    labels: NDArray[np.int64] | None
    stored: dict[str, Moments]
    card: ArchiveCard = field(default_factory=ArchiveCard)

    @property
    def images_text(self) -> str:
        return "none" if self.source is None else f"{len(self.source):,} reference images"

    def statistics_text(self, stored: bool) -> str:
        """The name of the statistics to which a Fréchet distance refers."""
        if not stored:
            return f"the statistics of {self.images_text}"
        count = self.card.statistics_of
        return "the file's stored statistics" + (f" of {count:,} images" if count else "")

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.card.class_names

    def check_extractor(self, extractor: InceptionExtractor) -> None:
        """Raise UserError if the stored statistics are those of another network's features."""
        if not self.stored:
            return
        made_with = self.card.extractor_fingerprint
        if made_with is None and extractor.published:
            return
        if made_with != extractor.fingerprint:
            made_by = printable(self.card.extractor or PUBLISHED_NAME)
            raise UserError(
                f"{self.path}: its statistics are of {made_by}, this command has {extractor.name}; give the weights "
                "that the file was made with, or make a reference with these"
            )


def open_samples(path: Path) -> Samples:
    """Open an .npz file, or a folder or ZIP archive of images of equal size; UserError for anything else.

    Classes of images in a folder are not read, because their numbers may differ from those of the reference.
    """
    if _is_pictures(path):
        source, _ = _pictures(path)
        return Samples(str(path), source, image_size(source), None)
    archive = Archive(path)
    images = archive.images()
    labels = archive.labels(len(images))
    return Samples(str(path), images, image_size(images), labels)


def open_reference(path: Path) -> Reference:
    """Open an .npz file, or a folder or ZIP archive of images of equal size; UserError for anything else."""
    if _is_pictures(path):
        try:
            source, labels = _pictures(path)
        except UserError as error:
            raise UserError(f"{error}; for a prepared data set: stablevm reference {path} -o ref.npz") from None
        names = source.source.class_names
        return Reference(path, source, image_size(source), labels, {}, ArchiveCard(class_names=names))
    archive = Archive(path, "make one with stablevm reference")
    kinds = {"pool": archive.moments("", WIDTH), "spatial": archive.moments("_s", SPATIAL_WIDTH)}
    stored = {kind: moments for kind, moments in kinds.items() if moments is not None}
    if "spatial" in stored and "pool" not in stored:
        raise UserError(f"{path}: holds mu_s but no mu; give a file with both, or with only images")
    if IMAGES not in archive and not stored:
        raise UserError(
            f"{path}: holds neither {IMAGES} (images) nor mu (statistics); make one with stablevm reference"
        )
    card = archive.card()
    if IMAGES not in archive:
        return Reference(path, None, None, None, stored, card)
    images = archive.images()
    return Reference(path, images, image_size(images), archive.labels(len(images)), stored, card)


def check_comparable(samples: Samples, reference: Reference) -> list[str]:
    """Lines about limitations of the comparison; UserError for sets that are too small to compare."""
    sets = [("samples", len(samples), samples.title)]
    if reference.source is not None:
        sets.append(("reference", len(reference.source), str(reference.path)))
    for what, count, where in sets:
        if count <= PRECISION_RECALL_K:
            raise UserError(
                f"{where}: {count} {what} images, too few for a covariance and for nearest neighbours; "
                f"give at least {PRECISION_RECALL_K + 1}, thousands for stable numbers"
            )
    lines = []
    if reference.size is not None and reference.size != samples.size:
        ours, theirs = (f"{height} x {width}" for height, width in (samples.size, reference.size))
        lines.append(
            f"{samples.title}: images of {ours} pixels, but the reference {reference.path} has {theirs}; both are "
            "scaled to the network's size, and the scaling counts as a difference"
        )
    if reference.stored and "spatial" not in reference.stored:
        lines.append(f"{reference.path}: holds mu and sigma, but no mu_s and sigma_s: no sFID")
    if reference.source is None:
        lines.append(f"{reference.path}: holds no {IMAGES} (images): no precision, recall and other metrics of images")
    return lines


def _is_pictures(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() == ".zip"


def _pictures(path: Path) -> tuple[FolderSource, NDArray[np.int64]]:
    """The images in a folder or an archive, all of the size of the first, and their classes.

    They are shuffled, always in the same way, because the Inception score is computed over consecutive images.
    """
    found = open_source(path)
    order = torch.randperm(len(found), generator=rng.generator("evaluation", "order")).numpy()
    shuffled = replace(found, names=[found.names[index] for index in order], labels=found.labels[order])
    return FolderSource(shuffled, "none", first_size(shuffled)), shuffled.labels


def warnings_of(each: FeatureSets, samples: Samples) -> list[str]:
    """Warnings about misleading metrics, one line each."""
    lines = []
    width = each.samples["pool"].shape[1]
    if len(samples) <= width:
        lines.append(
            f"{len(samples):,} samples of {width:,} features: their covariance is singular and the Fréchet distance "
            "biased upwards; compare it only with distances of equally many samples"
        )
    if "logits" in each.samples:
        known = samples.labels is not None
        labels = torch.from_numpy(samples.labels) if samples.labels is not None else each.samples["logits"].argmax(1)
        if (order := class_order(labels)) is not None:
            what = "their label" if known else "the class that the network sees"
            lines.append(
                f"{samples.title} looks sorted by class ({order[0]:.0%} of neighbours share {what}, {order[1]:.1%} by "
                "chance): the score is of consecutive chunks and comes out wrong; shuffle the images"
            )
        if (short := short_chunk_warning(each.chunks, len(each.samples["pool"]))) is not None:
            lines.append(short)
    return lines


def class_order(labels: Tensor) -> tuple[float, float] | None:
    """If images look sorted by class, how often neighbours in the file share a class, and how often by chance.

    None if the order looks shuffled, or there is only one class.
    """
    count = len(labels)
    if count < 2:
        return None
    sizes = torch.bincount(labels - labels.min()).double()
    chance = float((sizes * (sizes - 1)).sum()) / (count * (count - 1))
    found = float((labels[1:] == labels[:-1]).double().mean())
    deviation = (chance * (1 - chance) / (count - 1)) ** 0.5
    is_sorted = found - chance > max(SORTED_EXCESS, SORTED_DEVIATIONS * deviation)
    return (found, chance) if is_sorted else None
