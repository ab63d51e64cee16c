"""The Inception score of samples, and the same score with the class probabilities of another network."""

from collections.abc import Callable
from typing import Any

from stablevm.metrics.metric import FeatureSets, Metric, Values
from stablevm.metrics.statistics import short_chunk_warning


def _score(name: str) -> Callable[[FeatureSets], dict[str, Any]]:
    def values(sets: FeatureSets) -> dict[str, Any]:
        chunks = sets.chunks
        if not chunks:
            return {}
        found: dict[str, Any] = {name: _mean(chunks), f"{name}_of_chunks": chunks}
        if short_chunk_warning(chunks, len(sets.samples["pool"])) is not None:
            found[f"{name}_of_whole_chunks"] = _mean(chunks[:-1])
        return found

    return values


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _meaning(name: str, text: str) -> Callable[[Values], str]:
    def meaning(values: Values) -> str:
        whole = values.get(f"{name}_of_whole_chunks")
        return text if whole is None else f"{text}, the last one short; without it {whole:.6g}"

    return meaning


INCEPTION_SCORE = Metric(
    "inception_score", "inception score", _meaning("inception_score", "over consecutive chunks of 5,000"), "higher",
    "score", _score("inception_score"), published=True, decimals=2,
)  # fmt: skip
OTHER_SCORE = Metric(
    "score", "score of another network", _meaning("score", "as the inception score, by another network"), "higher",
    "score", _score("score"), published=False, decimals=2,
)  # fmt: skip
