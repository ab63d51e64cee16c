"""What makes the numbers of an evaluation misleading."""

import torch
from torch import Tensor

from stablevm.evaluation.samples import Samples
from stablevm.metrics.metric import FeatureSets
from stablevm.metrics.statistics import short_chunk_warning

# Sorted is what has neighbours of one class this much more often than chance, and by this many standard deviations.
SORTED_EXCESS, SORTED_DEVIATIONS = 0.1, 6.0


def warnings_of(each: FeatureSets, samples: Samples) -> list[str]:
    """What makes numbers misleading, a line each."""
    lines = []
    width = each.samples["pool"].shape[1]
    if len(samples) <= width:
        lines.append(
            f"{len(samples):,} samples of {width:,} features: their covariance is singular and the Fréchet distance "
            "biased upwards; compare it with distances of equally many samples alone"
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
