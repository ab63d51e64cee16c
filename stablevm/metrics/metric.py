"""The definition of a metric, for tables, plots and reports, and the two sets of features that it compares."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from stablevm.choices import Arithmetic
from stablevm.metrics.adm_distances import membership_adm
from stablevm.metrics.neighbours import COVERAGE_K, Membership, Neighbourhood, membership, neighbourhood
from stablevm.metrics.statistics import AnyMoments, chunk_scores, moments_of


@dataclass(frozen=True)
class FeatureSets:
    """The features of the samples and of the reference, by one extractor."""

    extractor: str
    published: bool  # whether it is the published Inception; only then is a distance called FID
    samples: dict[str, Tensor]  # "pool", perhaps "spatial" and "logits": (N, width) each
    reference: dict[str, Tensor]  # the same for the reference; empty where it holds no images
    stored: Mapping[str, AnyMoments]  # the reference's statistics by kind of features; empty where it has none
    arithmetic: Arithmetic
    device: torch.device
    section: str = "encoder"  # of the results

    @cached_property
    def moments(self) -> dict[str, AnyMoments]:
        """The reference's moments by kind of features: the stored ones if there are any, else those of its images."""
        if self.stored:
            return {kind: self.stored[kind] for kind in self.samples if kind in self.stored}
        return {kind: moments_of(self.reference[kind]) for kind in self.samples if kind in self.reference}

    @cached_property
    def membership(self) -> Membership | None:
        """Which points lie in the other set's balls, with further results of the distances if they are exact.

        None where the reference holds no images.
        """
        if "pool" not in self.reference:
            return None
        real, fake = self.reference["pool"], self.samples["pool"]
        if self.arithmetic == "adm":
            return membership_adm(real, fake, device=self.device)
        find = neighbourhood if len(real) > COVERAGE_K else membership
        return find(real, fake, device=self.device)

    @property
    def neighbourhood(self) -> Neighbourhood | None:
        """The membership if it is a Neighbourhood, for which distances are exact and images enough; else None."""
        found = self.membership
        return found if isinstance(found, Neighbourhood) else None

    @cached_property
    def chunks(self) -> list[float]:
        """The Inception score of each chunk; empty where there are no logits."""
        return chunk_scores(self.samples["logits"]) if "logits" in self.samples else []


Values = Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """A metric of two sets of features; `metrics.table` lists them all.

    name: its key in the results. title: its name in tables and figures.
    meaning: its explanation in tables, in which {statistics} and {images} are replaced by names of the reference; or a
    function from the results to that text.
    better: "lower" or "higher"; None where neither is better.
    panel: metrics with the same panel are plotted together.
    values: computes the results from both sets: the number under `name`, and others that explain it; {} where it can't
    be computed.
    published: True if only features of the published Inception have this metric, False if only those of other networks.
    whole_set: whether it is computed for the whole set only, not for subsets.
    decimals: how many tables show; files hold all digits.
    """

    name: str
    title: str
    meaning: str | Callable[[Values], str]
    better: Literal["lower", "higher"] | None
    panel: str
    values: Callable[[FeatureSets], dict[str, Any]]
    published: bool | None = None
    whole_set: bool = False
    decimals: int = 3

    def shown(self, values: Values) -> str:
        """The value with its decimals, as tables show it."""
        return f"{values[self.name]:.{self.decimals}f}"

    def row(self, values: Values, statistics: str, images: str) -> tuple[str, str, str]:
        """The row of a table: title, value and explanation."""
        meaning = self.meaning if isinstance(self.meaning, str) else self.meaning(values)
        text = meaning.replace("{statistics}", statistics).replace("{images}", images)
        return self.title, self.shown(values), text + (f"; {self.better} is better" if self.better else "")
