"""What is judged and what it is judged by: sets of images with what is known about them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stablevm.errors import UserError
from stablevm.evaluation.features import ArraySource, ImageSource
from stablevm.evaluation.inception import PUBLISHED_NAME, InceptionExtractor
from stablevm.evaluation.neighbours import PRECISION_RECALL_K
from stablevm.evaluation.npz import IMAGES, Archive
from stablevm.evaluation.statistics import Moments


@dataclass(frozen=True)
class Samples:
    """Generated images; `labels` are their classes, int64 (N,), where they are known."""

    title: str
    source: ImageSource
    size: tuple[int, int]  # height and width in pixels
    labels: NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True)
class Reference:
    """A reference file: images, stored statistics of Inception's features, or both."""

    path: Path
    source: ArraySource | None
    labels: NDArray[np.int64] | None
    stored: dict[str, Moments]
    protocol: dict[str, Any]

    @property
    def images_text(self) -> str:
        return "none" if self.source is None else f"{len(self.source):,} reference images"

    def statistics_text(self, stored: bool) -> str:
        """What a Fréchet distance is to."""
        if not stored:
            return f"the statistics of {self.images_text}"
        count = self.protocol.get("statistics_of")
        return "the file's stored statistics" + (f" of {count:,} images" if count else "")

    @property
    def class_names(self) -> list[str]:
        return self.protocol.get("class_names", [])

    def check_extractor(self, extractor: InceptionExtractor) -> None:
        """UserError where the stored statistics are of another network's features."""
        if not self.stored:
            return
        made_with = self.protocol.get("extractor_fingerprint")
        if made_with is None and extractor.published:
            return
        if made_with != extractor.fingerprint:
            made_by = self.protocol.get("extractor", PUBLISHED_NAME)
            raise UserError(
                f"{self.path}: its statistics are of {made_by}, this command has {extractor.name}; give the weights "
                "that the file was made with, or make a reference with these"
            )


def open_samples(path: Path) -> Samples:
    """UserError for what is no .npz file of images."""
    archive = Archive(path)
    images = archive.images()
    return Samples(str(path), ArraySource(images), images.shape[1:3], archive.labels(len(images)))


def open_reference(path: Path) -> Reference:
    """UserError for what is no reference file."""
    if path.is_dir():
        raise UserError(f"--reference {path}: a folder; make a file of it with: stablevm reference {path} -o ref.npz")
    archive = Archive(path, "make one with stablevm reference")
    kinds = {"pool": archive.moments(""), "spatial": archive.moments("_s")}
    stored = {kind: moments for kind, moments in kinds.items() if moments is not None}
    if len(stored) == 1:
        present, absent = ("mu", "mu_s") if "pool" in stored else ("mu_s", "mu")
        raise UserError(f"{path}: holds {present} but no {absent}; give a file with both, or with images alone")
    if IMAGES not in archive and not stored:
        raise UserError(
            f"{path}: holds neither {IMAGES} (images) nor mu (statistics); make one with stablevm reference"
        )
    if IMAGES not in archive:
        return Reference(path, None, None, stored, archive.protocol())
    images = archive.images()
    return Reference(path, ArraySource(images), archive.labels(len(images)), stored, archive.protocol())


def check_comparable(samples: Samples, reference: Reference) -> None:
    """UserError for sets too small to compare, and for images of different sizes."""
    sets = [("samples", len(samples), samples.title)]
    if reference.source is not None:
        sets.append(("reference", len(reference.source), str(reference.path)))
        size = reference.source.array.shape[1:3]
        if size != samples.size:
            raise UserError(
                f"{samples.title}: images of {samples.size[0]} x {samples.size[1]} pixels, but the reference "
                f"{reference.path} has {size[0]} x {size[1]}; bring both to one size"
            )
    for what, count, where in sets:
        if count <= PRECISION_RECALL_K:
            raise UserError(
                f"{where}: {count} {what} images, too few for a covariance and for nearest neighbours; "
                f"give at least {PRECISION_RECALL_K + 1}, thousands for stable numbers"
            )
