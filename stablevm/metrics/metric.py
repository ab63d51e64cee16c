"""What a metric is, and the two sets of features that it compares: all that tables, plots and reports know of one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from stablevm.metrics.adm_distances import membership_adm
from stablevm.metrics.neighbours import COVERAGE_K, Membership, Neighbourhood, membership, neighbourhood
from stablevm.metrics.statistics import AnyMoments, chunk_scores, moments_of


@dataclass(frozen=True)
class FeatureSets:
    """One extractor's view of both sets; `stored` are the reference's statistics by kind of features, or empty."""

    extractor: str
    published: bool  # the published Inception's: only then is a distance called FID
    samples: dict[str, Tensor]  # "pool", perhaps "spatial" and "logits": (N, width) each
    reference: dict[str, Tensor]  # empty where the reference holds no images
    stored: Mapping[str, AnyMoments]
    arithmetic: Literal["exact", "adm"]
    device: torch.device
    section: str = "encoder"  # of the results

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

    @property
    def neighbourhood(self) -> Neighbourhood | None:
        """The membership where it holds all numbers: exact distances, and enough reference images."""
        found = self.membership
        return found if isinstance(found, Neighbourhood) else None

    @cached_property
    def chunks(self) -> list[float]:
        """The Inception score's; empty where there are no logits."""
        return chunk_scores(self.samples["logits"]) if "logits" in self.samples else []


Values = Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """A number about two sets of features, which `metrics.table` lists.

    values: from both sets to the number under `name`, with others that explain it; {} where it can't be computed.
    meaning: what a table says of it; {statistics} and {images} stand for what the reference is. A function gets the
    values. better: which way; None where neither is. panel: plotted together are those of one word, which are shares
    then. published: True
    for what only the published Inception's features are called, False for what only others' are. whole_set: it is
    computed once, not of subsets too.
    """

    name: str
    title: str
    meaning: str | Callable[[Values], str]
    better: Literal["lower", "higher"] | None
    panel: str
    values: Callable[[FeatureSets], dict[str, Any]]
    published: bool | None = None
    whole_set: bool = False

    def row(self, values: Values, statistics: str, images: str) -> tuple[str, str | float, str]:
        """The line of a table: its title, its value and what that means."""
        meaning = self.meaning if isinstance(self.meaning, str) else self.meaning(values)
        text = meaning.replace("{statistics}", statistics).replace("{images}", images)
        return self.title, values[self.name], text + (f"; {self.better} is better" if self.better else "")
