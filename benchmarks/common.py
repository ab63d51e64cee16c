"""Helpers for all benchmarks: the device, timing and memory."""

import time
from collections.abc import Callable, Mapping
from typing import Literal

import torch

from stablevm.support.machine import CPU, synchronize

DeviceName = Literal["auto", "cpu", "cuda"]
Run = Callable[[], object]
MEBIBYTE, GIBIBYTE = 2**20, 2**30


def choose_device(name: DeviceName) -> torch.device:
    """The device called `name`; "auto" is a GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def medians(sides: Mapping[str, Run], *, repeats: int = 7, device: torch.device = CPU) -> dict[str, float]:
    """The median seconds of each side over `repeats`, after one run to warm up.

    The sides take turns, so that other work on the machine affects them equally.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(1 + repeats):
        for name, run in sides.items():
            times[name].append(timed(run, device))
    return {name: sorted(each[1:])[repeats // 2] for name, each in times.items()}


def seconds(run: Run, *, repeats: int = 7, device: torch.device = CPU) -> float:
    """The median seconds of one side, as `medians`."""
    return medians({"": run}, repeats=repeats, device=device)[""]


def timed(run: Run, device: torch.device = CPU) -> float:
    """The seconds of one run, until the device has finished its work."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def peak_bytes(run: Run, device: torch.device = CPU) -> int:
    """The peak memory that torch allocated on the device during `run`, in addition to that before."""
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    held = peak = 0
    for change in _memory_changes(run):
        held += change
        peak = max(peak, held)
    return peak


def allocated_bytes(run: Run, device: torch.device = CPU) -> int:
    """The sum of all memory that torch allocated on the device during `run`, even if it was freed."""
    if device.type == "cuda":
        before = torch.cuda.memory_stats(device)["allocated_bytes.all.allocated"]
        run()
        return torch.cuda.memory_stats(device)["allocated_bytes.all.allocated"] - before
    return sum(change for change in _memory_changes(run) if change > 0)


def _memory_changes(run: Run) -> list[int]:
    """The bytes that torch allocated (positive) and freed (negative) on the CPU, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def copy_bandwidth(device: torch.device, size: int = 2 * GIBIBYTE) -> float:
    """The bytes per second, read and written, when copying `size` bytes: the practical speed of the memory."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device=device)
