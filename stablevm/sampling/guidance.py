"""The velocity of a class-conditional network, with classifier-free guidance in an interval of time."""

from typing import Literal

import torch
from torch import Tensor, nn

from stablevm.interpolant import Interpolant
from stablevm.precision import DTYPES, autocast
from stablevm.sampling.settings import Precision

LEGACY_CHANNELS = 3  # the published samplers of DiT and SiT guide these and leave the others to the class alone


class GuidedVelocity:
    """`v = v_null + scale (v_cond - v_null)` for `low <= t <= high`, and `v_cond` outside (Ho and Salimans, 2022,
    "Classifier-free diffusion guidance"; Kynkaanniemi et al., 2024, for the interval).

    model(x (B, ...), t (B,), labels (B,)) predicts the velocity (`prediction` "v") or the data ("x"), in float32 or
    under autocast to `precision`, whatever surrounds the call. Its answer comes back as a velocity in the dtype of the
    state. Both halves of a guided evaluation are one batch; `scale` 1 is no guidance at all. `legacy` guides the first
    three channels only. `evaluations` is the number of network evaluations per image so far: one per call, two
    where guidance was on; a mean over the images, where they were evaluated at different times.
    """

    def __init__(
        self,
        model: nn.Module,
        path: Interpolant,
        prediction: Literal["v", "x"],
        labels: Tensor,
        null_class: int,
        *,
        scale: float = 1.0,
        low: float = 0.0,
        high: float = 1.0,
        legacy: bool = False,
        precision: Precision = "fp32",
    ) -> None:
        self.model = model
        self.path = path
        self.prediction = prediction
        self.labels = labels
        self.null_class = null_class
        self.scale, self.low, self.high, self.legacy = scale, low, high, legacy
        self.precision = precision
        self.rows_evaluated = 0

    @property
    def evaluations(self) -> float:
        return self.rows_evaluated / len(self.labels)

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        """The velocity at x (n, ...) and t, a scalar or (n,). `rows` int64 (n,) are the images that x belongs to."""
        labels = self.labels if rows is None else self.labels[rows]
        times = t.to(x.device).expand(len(x))
        if self.scale == 1:
            return self._predict(x, times, labels)
        guided = ((self.low <= times) & (times <= self.high)).nonzero().flatten()
        null_labels = torch.full_like(labels[guided], self.null_class)
        both = self._predict(
            torch.cat([x, x[guided]]), torch.cat([times, times[guided]]), torch.cat([labels, null_labels])
        )
        velocity, null = both.split([len(x), len(guided)])
        channels = LEGACY_CHANNELS if self.legacy else None
        null, conditional = null[:, :channels], velocity[guided, :channels]
        velocity[guided, :channels] = null + self.scale * (conditional - null)
        return velocity

    def _predict(self, x: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        self.rows_evaluated += len(x)
        with autocast(x.device, DTYPES[self.precision]):
            output = self.model(x.float(), times.float(), labels)
        source: Literal["velocity", "x0"] = "velocity" if self.prediction == "v" else "x0"
        return self.path.convert(output.to(x.dtype), x, times, source, "velocity")
