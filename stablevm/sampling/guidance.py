"""The velocity of a class-conditional network, with classifier-free guidance in an interval of time."""

from typing import Literal

import torch
from torch import Tensor, nn

from stablevm.interpolant import Interpolant

Precision = Literal["fp32", "bf16", "fp16"]
_AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class GuidedVelocity:
    """`v = v_null + scale (v_cond - v_null)` for `low <= t <= high`, and `v_cond` outside (Ho and Salimans, 2022,
    "Classifier-free diffusion guidance"; Kynkaanniemi et al., 2024, for the interval).

    model(x (B, ...), t (B,), labels (B,)) predicts the velocity (`prediction` "v") or the data ("x"), in float32 or
    under autocast to `precision`, whatever surrounds the call. Its answer comes back as a velocity in the dtype of the
    state. Both halves of a guided evaluation are one batch; `scale` 1 is no guidance at all. `evaluations` counts the
    network evaluations per image so far: one per call, two where guidance was on.
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
        precision: Precision = "fp32",
    ) -> None:
        self.model = model
        self.path = path
        self.prediction = prediction
        self.labels = labels
        self.null_labels = torch.full_like(labels, null_class)
        self.scale, self.low, self.high = scale, low, high
        self.precision = precision
        self.evaluations = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self.scale == 1 or not self.low <= t <= self.high:
            return self._predict(x, t, self.labels)
        both = self._predict(torch.cat([x, x]), t, torch.cat([self.labels, self.null_labels]))
        conditional, null = both.chunk(2)
        return null + self.scale * (conditional - null)

    def _predict(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.evaluations += len(labels) // len(self.labels)
        times = torch.full((len(x),), float(t), dtype=torch.float32, device=x.device)
        dtype = _AUTOCAST_DTYPES[self.precision]
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
            output = self.model(x.float(), times, labels)
        source: Literal["velocity", "x0"] = "velocity" if self.prediction == "v" else "x0"
        return self.path.convert(output.to(x.dtype), x, t, source, "velocity")
