"""The learning rate over the steps of a run."""

import math

from stablevm.training.config import TrainConfig

FINAL_SHARE = 0.05  # of the full rate, where a cosine ends


def rate_at(config: TrainConfig, step: int, total_steps: int) -> float:
    """The rate of step `step`, counted from 0, of a run of `total_steps`."""
    warmup = config.lr_warmup_steps
    rate = config.learning_rate * min(1.0, (step + 1) / warmup if warmup else 1.0)
    if config.lr_schedule == "constant":
        return rate
    progress = min(1.0, max(0, step - warmup) / max(1, total_steps - warmup))
    return rate * (FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress)))
