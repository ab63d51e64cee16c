"""The guard against losses and gradients that are not finite: such a step is skipped, and too many end the run.

The step is skipped on the device (`GuardedAdamW`), without waiting for it. The host checks the steps when metrics are
due (`Guard`). Processes agree without communicating: `spread` makes the gradient of a bad loss NaN, and the sum of
gradients carries this to all processes.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from stablevm.support.errors import UserError
from stablevm.training.checkpoint import saved_steps

ROWS_SHOWN = 5


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW that does not change weights and state in steps for which `skip` is true."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options, fused=True)
        self.skip: Tensor | None = None  # () bool on the parameters' device

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step, unless `skip` or the fp16 scaler's `found_inf` is true."""
        overflow = getattr(self, "found_inf", None)
        if self.skip is not None:
            skip = self.skip.float()
            self.found_inf = skip if overflow is None else torch.maximum(skip, overflow)
        result = super().step(closure)
        if self.skip is not None and overflow is None:
            del self.found_inf
        return result


def spread(loss: Tensor) -> Tensor:
    """The loss, whose gradient is NaN if it is not finite, because an infinite loss can have a finite gradient."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


@dataclass(frozen=True)
class Fault:
    """A skipped step, with the samples of its batch."""

    step: int
    fault: str  # what was not finite: "loss" or "gradient norm"
    rows: list[int]  # of the data set, beginning with those whose own loss is not finite
    samples: int  # of the global batch

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.rows)) + (", ..." if self.samples > len(self.rows) else "")
        return f"step {self.step}: the {self.fault} is not finite; skipped. Rows of the data set: {shown}"

    def to_row(self) -> dict[str, Any]:
        """The fault as a row of the metrics file."""
        return asdict(self)


class Guard:
    """Records the outcome of each step on the device until `review`, and counts bad steps."""

    def __init__(self, accelerator: Accelerator, limit: int) -> None:
        """limit: the number of bad steps in a row that ends the run."""
        self.accelerator, self.limit = accelerator, limit
        self.in_a_row: list[int] = []  # the bad steps up to the last reviewed one
        self._pending: list[tuple[int, Tensor, Tensor]] = []

    def add(self, step: int, loss: Tensor, norm: Tensor, rows: Tensor, row_losses: Tensor) -> None:
        """Record a step: its loss and gradient norm (), the rows of its samples and their own losses (B,)."""
        no_norm = ~norm.isfinite()
        flags = torch.stack([~loss.isfinite(), no_norm & ~self._scaler_adjusts(norm), no_norm])
        self._pending.append((step, flags, torch.stack([rows.to(norm.device), row_losses.isfinite()])))

    def review(self) -> tuple[list[bool], list[Fault]]:
        """Whether each step since the last review was taken, the same in all processes, and the faults."""
        if not self._pending:
            return [], []
        flags = self.accelerator.reduce(torch.stack([flags for _, flags, _ in self._pending]).float(), reduction="sum")
        assert isinstance(flags, Tensor)
        taken, faults = [], []
        for (step, _, samples), (loss, gradient, skipped) in zip(self._pending, flags.tolist(), strict=True):
            taken.append(not (loss or skipped))
            if loss or gradient:
                faults.append(self._fault(step, "loss" if loss else "gradient norm", samples))
                self.in_a_row.append(step)
            elif taken[-1] and len(self.in_a_row) < self.limit:
                self.in_a_row.clear()
        self._pending.clear()
        return taken, faults

    def check(self, run: Path) -> None:
        """Raise UserError, which names the steps and the newest checkpoint, after too many bad steps in a row."""
        if len(self.in_a_row) < self.limit:
            return
        steps, saved = ", ".join(map(str, self.in_a_row[: self.limit])), saved_steps(run)
        advice = (
            f"the newest checkpoint is of step {saved[-1]}; resume from it or, with --resume-step, from an earlier one"
            if saved
            else "there is no checkpoint yet; start over under another --exp-name with other options"
        )
        many = f"{self.limit} steps in a row (--max-bad-steps)"
        raise UserError(f"the loss or its gradient was not finite in {many}: {steps}; {advice}")

    def _fault(self, step: int, what: str, samples: Tensor) -> Fault:
        everywhere = self.accelerator.gather(samples.T.contiguous())
        assert isinstance(everywhere, Tensor)
        rows = sorted(everywhere.tolist(), key=lambda sample: sample[1])  # stable: within each kind as in the batch
        return Fault(step, what, [row for row, _ in rows[:ROWS_SHOWN]], len(rows))

    def _scaler_adjusts(self, norm: Tensor) -> Tensor:
        """Whether an overflow only lets the fp16 scaler lower its factor, which is not a fault while it is above 1."""
        scaler = self.accelerator.scaler
        if scaler is None:
            return torch.zeros_like(norm, dtype=torch.bool)
        factor = scaler.scale(torch.ones_like(norm))  # the only way to get it without waiting for the device
        assert isinstance(factor, Tensor)
        return factor >= 1
