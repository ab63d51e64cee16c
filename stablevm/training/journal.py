"""Rows of metrics, averaged over steps and processes, and the progress bar; values stay on the device until due."""

import math
import resource
import sys
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from stablevm.training.checkpoint import Progress, Sums
from stablevm.training.config import TrainConfig
from stablevm.training.console import Meter, warn
from stablevm.training.guard import Fault, Guard
from stablevm.training.launch import on_main
from stablevm.training.step import PhaseClock, StepMetrics
from stablevm.training.tracker import Trackers

T_BINS = 10  # equal intervals of time in [0, 1] by which samples are grouped
GIB = 2**30
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in a unit of getrusage's ru_maxrss


class Journal:
    """Collects metrics in every process; the main process, the only one with trackers, writes the rows."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        trackers: Trackers | None,
        guard: Guard,
        *,
        step: int,
        total_steps: int,
        progress: Progress | None = None,
        lines: bool = True,
    ) -> None:
        """progress: what an earlier command left open. lines: as for `Meter`."""
        progress = progress or Progress()
        self.trackers = trackers
        self._guard = guard
        self._row = progress.row
        self._sums = dict(progress.sums)  # over the `_taken` steps since the last checkpoint of the interval
        self._taken = progress.taken
        self.clock = PhaseClock(accelerator.device)
        self._config, self._accelerator = config, accelerator
        self._pending: list[StepMetrics] = []
        self._meter = Meter(
            config.exp_name, step=step, total_steps=total_steps, show=accelerator.is_main_process, lines=lines
        )

    def add(self, metrics: StepMetrics) -> None:
        self._pending.append(metrics)
        self._meter.advance()

    def collect(self) -> None:
        """Add the pending steps to the sums of the next row, which waits for the device.

        Skipped steps are left out of the sums, and reported.
        """
        if not self._pending:
            return
        taken, faults = self._guard.review()
        good = [metrics for metrics, was_taken in zip(self._pending, taken, strict=True) if was_taken]
        names, seconds = list(self._pending[0].means), self.clock.read()
        nothing = torch.zeros(len(names), dtype=torch.float64, device=self._accelerator.device)
        rows = [torch.stack([metrics.means[name].double() for name in names]) for metrics in good]
        sums = torch.stack(rows).sum(0) if rows else nothing
        table = sums_by_time(good) if good else sums.new_zeros(3, T_BINS)
        own = torch.cat([sums, sums.new_tensor([*seconds.values()]), table.flatten()])
        whole = self._accelerator.reduce(own, reduction="mean")
        assert isinstance(whole, Tensor)
        first, second, third = whole.tensor_split([len(names), len(names) + len(seconds)])
        scalars = dict(zip(names, first.tolist(), strict=True))
        phases = dict(zip(seconds, second.tolist(), strict=True))
        self._row.add(Sums(len(self._pending), len(good), scalars, phases, third.view_as(table).tolist()))
        for name, total in scalars.items() if good else ():
            self._sums[name] = self._sums.get(name, 0.0) + total
        self._taken += len(good)
        self._pending.clear()
        if faults:
            on_main(self._accelerator, lambda: self._report(faults))

    def flush(self, step: int, rate: float) -> None:
        """Write a row for the steps since the last row, up to `step`, which was taken at the learning rate `rate`.

        All values are means over steps and processes; those by time are means over the samples in their interval.
        UserError after too many skipped steps in a row.
        """
        self.collect()
        sums, self._row = self._row, Sums()
        if not sums.steps:
            return
        row = {name: total / sums.taken if sums.taken else math.nan for name, total in sums.scalars.items()}
        row |= {"lr": rate, "images_per_second": self._config.batch_size * sums.steps / sum(sums.seconds.values())}
        row |= {f"seconds/{phase}": total / sums.steps for phase, total in sums.seconds.items()} | self._memory()
        row |= means_by_time(sums.by_time)
        on_main(self._accelerator, lambda: self._write(step, row))
        losses = {name: row[name] for name in sums.scalars if name not in ("loss", "grad_norm")}
        self._meter.report(step, losses, row["images_per_second"])
        self._guard.check(self._config.folder)

    def take_means(self) -> dict[str, float]:
        """The means of losses and norm over the steps since the last call; empty if all were skipped."""
        means = {name: value / self._taken for name, value in self._sums.items()}
        self._sums.clear()
        self._taken = 0
        return means

    def progress(self, means: dict[str, float]) -> Progress:
        """The unfinished sums, including pending steps, for a checkpoint that is compared by `means`."""
        self.collect()
        return Progress(self._row, dict(self._sums), self._taken, means, list(self._guard.in_a_row))

    def _report(self, faults: list[Fault]) -> None:
        assert self.trackers is not None
        for fault in faults:
            warn(str(fault))
            self.trackers.event(fault.to_row())

    def _write(self, step: int, row: dict[str, float]) -> None:
        assert self.trackers is not None
        self.trackers.log(step, row)

    def close(self) -> None:
        self._meter.close()
        if self.trackers is not None:
            self.trackers.close()

    def _memory(self) -> dict[str, float]:
        """The peak memory of the main process, in GiB."""
        held = {"memory/host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / GIB}
        if self._accelerator.device.type == "cuda":
            held["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated(self._accelerator.device) / GIB
        return held


def sums_by_time(steps: Sequence[StepMetrics]) -> Tensor:
    """Sums for each interval of t, (3, T_BINS) float64: the number of samples, their velocity losses, and their
    effective sample sizes.
    """
    t, *values = (
        torch.cat([getattr(step, name) for step in steps]) for name in ("t", "velocity_loss", "effective_sample_size")
    )
    bins = (t * T_BINS).long().clamp(max=T_BINS - 1)
    rows = torch.stack([torch.ones_like(t), *values]).double()
    return torch.zeros(len(rows), T_BINS, dtype=torch.float64, device=t.device).index_add_(1, bins, rows)


def means_by_time(table: Sequence[Sequence[float]]) -> dict[str, float]:
    """The mean effective sample size, and both means of each interval with samples, from `sums_by_time`."""
    counts, velocity, ess = table
    row = {"effective_sample_size": sum(ess) / sum(counts)} if any(counts) else {}
    for name, sums in (("velocity_loss", velocity), ("effective_sample_size", ess)):
        for number, (total, count) in enumerate(zip(sums, counts, strict=True)):
            if count:
                row[f"{name}/t={number / T_BINS:.1f}-{(number + 1) / T_BINS:.1f}"] = total / count
    return row
