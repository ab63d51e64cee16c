"""Where the time of a step goes."""

import time

import torch


class PhaseClock:
    """Seconds of each phase of the steps, every moment in exactly one phase: a phase ends where the next begins.

    On a GPU the ends are events in its queue, looked at only in `read`: a phase then lasts until the GPU has done its
    work, and what the host does meanwhile, such as reading data, costs only what the GPU has to wait for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._ends: list[tuple[str, float | torch.cuda.Event]] = [("", self._now())]

    def end(self, phase: str) -> None:
        """The time since the last end belonged to `phase`."""
        self._ends.append((phase, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds per phase that ended since the last reading, in order of appearance; waits for the GPU."""
        seconds: dict[str, float] = {}
        _, before = self._ends[0]
        for phase, now in self._ends[1:]:
            seconds[phase] = seconds.get(phase, 0.0) + _seconds(before, now)
            before = now
        del self._ends[:-1]
        return seconds

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(before: float | torch.cuda.Event, now: float | torch.cuda.Event) -> float:
    if isinstance(before, torch.cuda.Event):
        assert isinstance(now, torch.cuda.Event)
        now.synchronize()
        return before.elapsed_time(now) / 1000
    assert isinstance(now, float)
    return now - before
