"""Features of generated images against those of a reference: the numbers, named by the network they come from."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from stablevm.evaluation.adm_distances import membership_adm
from stablevm.evaluation.neighbours import PRECISION_RECALL_K, Membership, membership
from stablevm.evaluation.statistics import AnyMoments, frechet_distance, inception_score, moments_of

# Columns of a table: key in the results, name where the features are the published Inception's, name elsewhere.
FRECHET, SPATIAL, SCORE = "frechet", "spatial", "score"
PUBLISHED_KEYS = {FRECHET: "fid", SPATIAL: "sfid", SCORE: "inception_score"}
OTHER_KEYS = {FRECHET: "frechet_distance", SPATIAL: "spatial_frechet_distance", SCORE: "score"}
TITLES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "inception score",
    "frechet_distance": "Fréchet distance",
    "spatial_frechet_distance": "spatial Fréchet distance",
    "score": "score of another network",
    "precision": "precision",
    "recall": "recall",
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
        """The reference's: stored ones before those of its images."""
        kinds = [kind for kind in self.samples if kind != "logits"]
        return {kind: self.stored[kind] if self.stored else moments_of(self.reference[kind]) for kind in kinds}

    @cached_property
    def membership(self) -> Membership | None:
        return self.membership_of(self.samples["pool"])

    def membership_of(self, pool: Tensor) -> Membership | None:
        """Who is in whose balls; None where the reference holds no images."""
        if "pool" not in self.reference:
            return None
        find = membership if self.arithmetic == "exact" else membership_adm
        return find(self.reference["pool"], pool, device=self.device)

    def results(self) -> dict[str, Any]:
        """The numbers by name, and what they were computed from."""
        values: dict[str, Any] = {"extractor": self.extractor}
        for name, kind in ((FRECHET, "pool"), (SPATIAL, "spatial")):
            if kind in self.samples:
                values[self.keys[name]] = frechet_distance(moments_of(self.samples[kind]), self.moments[kind])
        if "logits" in self.samples:
            score, chunks = inception_score(self.samples["logits"])
            values |= {self.keys[SCORE]: score, f"{self.keys[SCORE]}_of_chunks": chunks}
        if self.membership is not None:
            values |= {"precision": self.membership.precision, "recall": self.membership.recall}
            values |= {"precision_recall": self.arithmetic, "neighbours": PRECISION_RECALL_K}
        return values


def result_rows(values: dict[str, Any], statistics: str, images: str) -> list[tuple[str, str | float, str]]:
    """Rows (measure, value, meaning) of one comparison's results; `statistics` and `images` say which were used."""
    arithmetic = {"exact": "exact", "adm": "float16 distances as in ADM's script"}
    meanings = {
        "fid": f"to {statistics}; lower is closer",
        "sfid": f"the same, of 2,023 spatial features; to {statistics}",
        "inception_score": "over consecutive chunks of 5,000; higher is better",
        "frechet_distance": f"to {statistics}; not FID",
        "spatial_frechet_distance": f"to {statistics}; not sFID",
        "score": "as the inception score, by another network",
        "precision": f"share of samples near one of {images}; {arithmetic[values.get('precision_recall', 'exact')]}",
        "recall": f"share of {images} near a sample",
    }
    return [(TITLES[key], values[key], meaning) for key, meaning in meanings.items() if key in values]


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
