"""Precision and recall (Kynkäänniemi et al., 2019): the share of each set that lies near the other."""

from typing import Any

from stablevm.metrics.metric import FeatureSets, Metric, Values
from stablevm.metrics.neighbours import PRECISION_RECALL_K

_ARITHMETIC = {"exact": "exact", "adm": "float16 distances as in ADM's script"}


def _precision(sets: FeatureSets) -> dict[str, Any]:
    return {} if sets.membership is None else {"precision": sets.membership.precision}


def _recall(sets: FeatureSets) -> dict[str, Any]:
    if sets.membership is None:
        return {}
    how = {"precision_recall": sets.arithmetic, "neighbours": PRECISION_RECALL_K}
    return {"recall": sets.membership.recall} | how


def _precision_meaning(values: Values) -> str:
    return f"share of samples near one of {{images}}; {_ARITHMETIC[values.get('precision_recall', 'exact')]}"


PRECISION = Metric("precision", "precision", _precision_meaning, "higher", "shares", _precision)
RECALL = Metric("recall", "recall", "share of {images} near a sample", "higher", "shares", _recall)
