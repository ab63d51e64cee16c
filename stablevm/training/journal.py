"""Rows of metrics, kept on the device until one is due and then averaged over steps and processes; the progress bar."""

import resource
import sys
from collections import defaultdict
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from stablevm.training.clock import PhaseClock
from stablevm.training.config import TrainConfig
from stablevm.training.guard import Fault, Guard
from stablevm.training.main_process import on_main
from stablevm.training.step import StepMetrics
from stablevm.training.tracker import Trackers

T_BINS = 10  # equal parts of [0, 1] by which samples are told apart
GIB = 2**30
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in a unit of getrusage's ru_maxrss


class Journal:
    """Fed on every process; the main one, which alone has trackers, writes the rows."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        trackers: Trackers | None,
        guard: Guard,
        *,
        step: int,
        total_steps: int,
    ) -> None:
        self.trackers = trackers
        self._guard = guard
        self._sums: dict[str, float] = defaultdict(float)  # over the `_taken` steps since the last checkpoint
        self._taken = 0
        self.clock = PhaseClock(accelerator.device)
        self._config, self._accelerator = config, accelerator
        self._pending: list[StepMetrics] = []
        self._bar = tqdm(
            total=total_steps,
            initial=step,
            desc=config.exp_name,
            unit="step",
            disable=not accelerator.is_main_process,
            dynamic_ncols=True,
        )

    def add(self, metrics: StepMetrics) -> None:
        self._pending.append(metrics)
        self._bar.update()

    def flush(self, step: int, rate: float) -> None:
        """Write a row for the pending steps, of which `step` was the last, taken at `rate`. Waits for the device.

        All values are means over steps and processes; those by time are exact means over the samples of their bin.
        Skipped steps count in none of them, and are reported. UserError after too many in a row.
        """
        if not self._pending:
            return
        count = len(self._pending)
        taken, faults = self._guard.review()
        good = [metrics for metrics, was_taken in zip(self._pending, taken, strict=True) if was_taken]
        scalars = {name: [metrics.means[name].float() for metrics in good] for name in self._pending[0].means}
        nothing = torch.tensor(torch.nan, device=self._accelerator.device)
        means = torch.stack([torch.stack(values or [nothing]).mean() for values in scalars.values()]).double()
        table = sums_by_time(good) if good else means.new_zeros(3, T_BINS)
        seconds = {f"seconds/{phase}": total / count for phase, total in self.clock.read().items()}
        own = torch.cat([means, means.new_tensor([*seconds.values()]), table.flatten()])
        whole = self._accelerator.reduce(own, reduction="mean")
        assert isinstance(whole, Tensor)
        first, second, third = whole.tensor_split([len(scalars), len(scalars) + len(seconds)])
        row = dict(zip(scalars, first.tolist(), strict=True))
        row |= {"lr": rate, "images_per_second": self._config.batch_size / float(second.sum())}
        row |= dict(zip(seconds, second.tolist(), strict=True)) | self._memory() | means_by_time(third.view_as(table))
        for name in scalars if good else ():
            self._sums[name] += len(good) * row[name]
        self._taken += len(good)
        on_main(self._accelerator, lambda: self._write(step, row, faults))
        self._bar.set_postfix({"loss": f"{row['loss']:.4f}"}, refresh=False)
        self._pending.clear()
        self._guard.check(self._config.folder)

    def take_means(self) -> dict[str, float]:
        """Means of losses and norm over the steps flushed since the last call; empty when all were skipped."""
        means = {name: value / self._taken for name, value in self._sums.items()}
        self._sums.clear()
        self._taken = 0
        return means

    def _write(self, step: int, row: dict[str, float], faults: list[Fault]) -> None:
        assert self.trackers is not None
        for fault in faults:
            tqdm.write(f"warning: {fault}", file=sys.stderr)
            self.trackers.event(fault.to_row())
        self.trackers.log(step, row)

    def close(self) -> None:
        self._bar.close()
        if self.trackers is not None:
            self.trackers.close()

    def _memory(self) -> dict[str, float]:
        """GiB that the main process has held at most."""
        held = {"memory/host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / GIB}
        if self._accelerator.device.type == "cuda":
            held["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated(self._accelerator.device) / GIB
        return held


def sums_by_time(steps: Sequence[StepMetrics]) -> Tensor:
    """(3, T_BINS) float64: of each bin of t the number of samples, the sum of their velocity losses and that of their
    effective sample sizes.
    """
    t, *values = (
        torch.cat([getattr(step, name) for step in steps]) for name in ("t", "velocity_loss", "effective_sample_size")
    )
    bins = (t * T_BINS).long().clamp(max=T_BINS - 1)
    rows = torch.stack([torch.ones_like(t), *values]).double()
    return torch.zeros(len(rows), T_BINS, dtype=torch.float64, device=t.device).index_add_(1, bins, rows)


def means_by_time(table: Tensor) -> dict[str, float]:
    """Of `sums_by_time`, up to a factor: the mean effective sample size, and both means of each bin with a sample."""
    counts, velocity, ess = table.tolist()
    row = {"effective_sample_size": sum(ess) / sum(counts)} if any(counts) else {}
    for name, sums in (("velocity_loss", velocity), ("effective_sample_size", ess)):
        for number, (total, count) in enumerate(zip(sums, counts, strict=True)):
            if count:
                row[f"{name}/t={number / T_BINS:.1f}-{(number + 1) / T_BINS:.1f}"] = total / count
    return row
