"""The guard against losses and gradients that are not finite: such a step changes nothing, too many end the run.

The step is skipped on the device (`GuardedAdamW`), so that nothing waits for it; the host looks at what became of the
steps when metrics are due (`Guard`). Processes agree without a word: `spread` makes the gradient of a bad loss NaN, and
the sum of gradients carries that to all of them.
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
    """Fused AdamW that leaves weights and state as they are in steps for which `skip` is true."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options, fused=True)
        self.skip: Tensor | None = None  # () bool on the parameters' device

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; the fp16 scaler may have its own reason to skip it, in `found_inf` as here."""
        overflow = getattr(self, "found_inf", None)
        if self.skip is not None:
            skip = self.skip.float()
            self.found_inf = skip if overflow is None else torch.maximum(skip, overflow)
        result = super().step(closure)
        if self.skip is not None and overflow is None:
            del self.found_inf
        return result


def spread(loss: Tensor) -> Tensor:
    """The loss, with a gradient of NaN where it is not finite: an infinite loss can have a finite one."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


@dataclass(frozen=True)
class Fault:
    """A skipped step, and the samples that the network was given in it."""

    step: int
    fault: str  # what was not finite: "loss" or "gradient norm"
    rows: list[int]  # of the data set: first those whose own loss is not finite
    samples: int  # of the global batch

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.rows)) + (", ..." if self.samples > len(self.rows) else "")
        return f"step {self.step}: the {self.fault} is not finite; skipped. Rows of the data set: {shown}"

    def to_row(self) -> dict[str, Any]:
        """As a row of the metrics file."""
        return asdict(self)


class Guard:
    """Keeps what became of each step on the device until `review`, and counts the bad ones."""

    def __init__(self, accelerator: Accelerator, limit: int) -> None:
        """limit: so many bad steps in a row end the run."""
        self.accelerator, self.limit = accelerator, limit
        self.in_a_row: list[int] = []  # the bad steps up to the last reviewed one
        self._pending: list[tuple[int, Tensor, Tensor]] = []

    def add(self, step: int, loss: Tensor, norm: Tensor, rows: Tensor, row_losses: Tensor) -> None:
        """Note a step: its loss and gradient norm (), the rows of its samples and their own losses (B,)."""
        no_norm = ~norm.isfinite()
        flags = torch.stack([~loss.isfinite(), no_norm & ~self._scaler_adjusts(norm), no_norm])
        self._pending.append((step, flags, torch.stack([rows.to(norm.device), row_losses.isfinite()])))

    def review(self) -> tuple[list[bool], list[Fault]]:
        """For the steps since the last review: whether each was taken, the same on all processes; and the faults."""
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
        """UserError naming the steps, and the newest checkpoint below `run`, after too many bad ones in a row."""
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
        """Whether the fp16 scaler still has room: it finds its factor by overflows, which are no faults above 1."""
        scaler = self.accelerator.scaler
        if scaler is None:
            return torch.zeros_like(norm, dtype=torch.bool)
        factor = scaler.scale(torch.ones_like(norm))  # the only way to it that does not wait for the device
        assert isinstance(factor, Tensor)
        return factor >= 1
