"""Features of generated images against those of a reference: the numbers, named by the network they come from."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from stablevm.metrics.adm_distances import membership_adm
from stablevm.metrics.kernel_distance import kernel_distance
from stablevm.metrics.neighbours import (
    COVERAGE_K,
    PRECISION_RECALL_K,
    Membership,
    Neighbourhood,
    membership,
    neighbourhood,
)
from stablevm.metrics.statistics import (
    AnyMoments,
    chunk_scores,
    frechet_distance,
    moments_of,
    short_chunk_warning,
)

# Columns of a table: key in the results, name where the features are the published Inception's, name elsewhere.
FRECHET, SPATIAL, SCORE, KERNEL = "frechet", "spatial", "score", "kernel"
PUBLISHED_KEYS = {FRECHET: "fid", SPATIAL: "sfid", SCORE: "inception_score", KERNEL: "kid"}
OTHER_KEYS = {
    FRECHET: "frechet_distance",
    SPATIAL: "spatial_frechet_distance",
    SCORE: "score",
    KERNEL: "kernel_distance",
}
TITLES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "inception score",
    "frechet_distance": "Fréchet distance",
    "spatial_frechet_distance": "spatial Fréchet distance",
    "score": "score of another network",
    "kid": "KID",
    "kernel_distance": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "memorisation": "memorisation",
}
# Sorted is what has neighbours of one class this much more often than chance, and by this many standard deviations.
SORTED_EXCESS, SORTED_DEVIATIONS = 0.1, 6.0


@dataclass(frozen=True)
class Comparison:
    """One extractor's view of both sets; `stored` are the reference's statistics by kind of features, or empty."""

    extractor: str
    published: bool  # the published Inception's: only then is a distance called FID
    samples: dict[str, Tensor]  # "pool", perhaps "spatial" and "logits": (N, width) each
    reference: dict[str, Tensor]  # empty where the reference holds no images
    stored: Mapping[str, AnyMoments]
    arithmetic: Literal["exact", "adm"]
    device: torch.device

    @property
    def keys(self) -> dict[str, str]:
        return PUBLISHED_KEYS if self.published else OTHER_KEYS

    @cached_property
    def moments(self) -> dict[str, AnyMoments]:
        """The reference's by kind of features: stored ones before those of its images, never some of each."""
        if self.stored:
            return {kind: self.stored[kind] for kind in self.samples if kind in self.stored}
        return {kind: moments_of(self.reference[kind]) for kind in self.samples if kind in self.reference}

    @cached_property
    def membership(self) -> Membership | None:
        """Who is in whose balls, and what else distances tell; None where the reference holds no images."""
        if "pool" not in self.reference:
            return None
        real, fake = self.reference["pool"], self.samples["pool"]
        if self.arithmetic == "adm":
            return membership_adm(real, fake, device=self.device)
        find = neighbourhood if len(real) > COVERAGE_K else membership
        return find(real, fake, device=self.device)

    @cached_property
    def chunks(self) -> list[float]:
        """The Inception score's; empty where there are no logits."""
        return chunk_scores(self.samples["logits"]) if "logits" in self.samples else []

    @property
    def short_chunk(self) -> str | None:
        """What to say of a last chunk that is shorter than the others."""
        return short_chunk_warning(self.chunks, len(self.samples["pool"]))

    def results(self, *, kernel: bool = True) -> dict[str, Any]:
        """The numbers by name, and what they were computed from.

        The kernel distance is the only one that takes time of its own, and no subset changes what it is on average.
        """
        values: dict[str, Any] = {"extractor": self.extractor}
        for name, kind in ((FRECHET, "pool"), (SPATIAL, "spatial")):
            if kind in self.moments:
                values[self.keys[name]] = frechet_distance(moments_of(self.samples[kind]), self.moments[kind])
        if self.chunks:
            score = self.keys[SCORE]
            values |= {score: _mean(self.chunks), f"{score}_of_chunks": self.chunks}
            if self.short_chunk is not None:
                values[f"{score}_of_whole_chunks"] = _mean(self.chunks[:-1])
        if kernel and "pool" in self.reference:
            distance, deviation = kernel_distance(self.reference["pool"], self.samples["pool"], device=self.device)
            values |= {self.keys[KERNEL]: distance, f"{self.keys[KERNEL]}_deviation": deviation}
        if self.membership is not None:
            values |= {"precision": self.membership.precision, "recall": self.membership.recall}
            values |= {"precision_recall": self.arithmetic, "neighbours": PRECISION_RECALL_K}
        if isinstance(self.membership, Neighbourhood):
            found = self.membership
            values |= {"density": found.density, "coverage": found.coverage, "memorisation": found.memorisation}
        return values


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def result_rows(values: dict[str, Any], statistics: str, images: str) -> list[tuple[str, str | float, str]]:
    """Rows (measure, value, meaning) of one comparison's results; `statistics` and `images` say which were used."""
    arithmetic = {"exact": "exact", "adm": "float16 distances as in ADM's script"}
    meanings = {
        "fid": f"to {statistics}; lower is closer",
        "sfid": f"the same, of 2,023 spatial features; to {statistics}",
        "inception_score": f"over consecutive chunks of 5,000{_whole_chunks(values)}; higher is better",
        "frechet_distance": f"to {statistics}; not FID",
        "spatial_frechet_distance": f"to {statistics}; not sFID",
        "score": f"as the inception score, by another network{_whole_chunks(values)}",
        "kid": f"kernel distance to {images}, unbiased; lower is closer",
        "kernel_distance": f"to {images}, cubic kernel, unbiased; not KID; lower is closer",
        "precision": f"share of samples near one of {images}; {arithmetic[values.get('precision_recall', 'exact')]}",
        "recall": f"share of {images} near a sample",
        "density": f"how many of {images} hold a sample, over k = {COVERAGE_K}; 1 for real ones, higher is denser",
        "coverage": f"share of {images} that hold a sample, k = {COVERAGE_K}; higher is better, 0.97 for real ones",
        "memorisation": "share of samples nearer to a reference image than 99 of 100 of those are to another; 0.01 for "
        "new images",
    }
    return [(TITLES[key], values[key], meaning) for key, meaning in meanings.items() if key in values]


def _whole_chunks(values: dict[str, Any]) -> str:
    whole = [value for name, value in values.items() if name.endswith("_of_whole_chunks")]
    return f", the last one short; without it {whole[0]:.6g}" if whole else ""


def class_order(labels: Tensor) -> tuple[float, float] | None:
    """Where images look sorted by class: how often neighbours in the file share a class, and how often by chance.

    None where the order is as good as shuffled, or there is one class only.
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
