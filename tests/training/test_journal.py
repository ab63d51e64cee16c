"""Rows of metrics: exact means over samples and steps, phases that add up, no wait for the device between rows."""

import math
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from stablevm.training.guard import Guard
from stablevm.training.journal import Journal, means_by_time, sums_by_time
from stablevm.training.step import PhaseClock, StepMetrics
from tests.helpers import runs


def step(t, velocity, ess, **means):
    scalars = {name: torch.tensor(value) for name, value in means.items()}
    return StepMetrics(scalars, *(torch.tensor(values, dtype=torch.float32) for values in (t, velocity, ess)))


STEPS = [
    step([0.05, 0.05, 0.95], [1.0, 2.0, 5.0], [1.0, 3.0, 7.0], loss=1.0, grad_norm=4.0),
    step([0.05, 0.5, 1.0], [6.0, 4.0, 7.0], [2.0, 5.0, 9.0], loss=2.0, grad_norm=0.0),
]


def test_means_by_time_are_over_samples():
    """A bin's mean is not the mean of the steps' means; t = 1 belongs to the last bin; an empty one is left out."""
    assert means_by_time(sums_by_time(STEPS).tolist()) == {
        "effective_sample_size": 27 / 6,
        "velocity_loss/t=0.0-0.1": 3.0,
        "velocity_loss/t=0.5-0.6": 4.0,
        "velocity_loss/t=0.9-1.0": 6.0,
        "effective_sample_size/t=0.0-0.1": 2.0,
        "effective_sample_size/t=0.5-0.6": 5.0,
        "effective_sample_size/t=0.9-1.0": 8.0,
    }


def test_many_values_are_summed_exactly():
    """A float32 sum of so many would be wrong in the fourth digit."""
    steps = [step([0.25] * 100_000, [0.1] * 100_000, [1.0] * 100_000)] * 20
    mean = means_by_time(sums_by_time(steps).tolist())["velocity_loss/t=0.2-0.3"]
    assert mean == pytest.approx(torch.tensor(0.1).item(), rel=1e-12)


@pytest.mark.parametrize("edge", [0.1, 0.3, 0.6, 0.7])
def test_edges_belong_to_the_upper_bin(edge):
    means = means_by_time(sums_by_time([step([edge], [1.0], [1.0])]).tolist())
    (name,) = (key for key in means if key.startswith("velocity"))
    assert name == f"velocity_loss/t={edge:.1f}-{edge + 0.1:.1f}"


class Rows:
    """Trackers that keep what they are given."""

    def __init__(self):
        self.rows = []

    def log(self, number, values):
        self.rows.append((number, values))

    def event(self, row):
        self.rows.append(row)

    def close(self):
        self.rows.append("closed")


@pytest.fixture
def journal(tmp_path):
    runs.AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    guard = Guard(accelerator, limit=3)
    made = Journal(runs.config(tmp_path, batch_size=3), accelerator, Rows(), guard, step=0, total_steps=10)
    made.guard = guard
    yield made
    made.close()


def record(journal, number, metrics):
    """What the trainer does after a step."""
    rows = torch.arange(len(metrics.t))
    journal.guard.add(number, metrics.means["loss"], metrics.means["grad_norm"], rows, metrics.velocity_loss)
    journal.add(metrics)


def test_a_row(journal):
    for number, metrics in enumerate(STEPS, start=1):
        journal.clock.end("data_wait")
        time.sleep(0.01)
        journal.clock.end("network")
        record(journal, number, metrics)
    journal.flush(2, 1e-3)
    journal.flush(2, 1e-3)
    ((number, row),) = journal.trackers.rows
    assert (number, row["loss"], row["grad_norm"], row["lr"]) == (2, 1.5, 2.0, 1e-3)
    seconds = {name: value for name, value in row.items() if name.startswith("seconds/")}
    assert list(seconds) == ["seconds/data_wait", "seconds/network"] and seconds["seconds/network"] >= 0.01
    assert row["images_per_second"] == pytest.approx(3 / sum(seconds.values()), rel=1e-6)
    assert 0.05 < row["memory/host_peak_gib"] < 1000 and "memory/gpu_peak_gib" not in row
    assert row["velocity_loss/t=0.0-0.1"] == 3 and row["effective_sample_size"] == 4.5


def test_a_row_starts_from_zero(journal):
    for number, metrics in enumerate(STEPS, start=1):
        journal.clock.end("network")
        record(journal, number, metrics)
        journal.flush(number, 0.1)
    (_, first), (_, second) = journal.trackers.rows
    assert (first["loss"], second["loss"]) == (1, 2)
    assert "velocity_loss/t=0.5-0.6" not in first and "velocity_loss/t=0.9-1.0" in second


def test_a_skipped_step_counts_in_no_mean(journal):
    bad = step([0.05, 0.55], [math.nan, 2.0], [1.0, 1.0], loss=math.nan, grad_norm=math.nan)
    journal.clock.end("network")
    record(journal, 1, bad)
    journal.flush(1, 0.1)
    fault, (_, row) = journal.trackers.rows
    assert fault["step"] == 1 and fault["rows"] == [0, 1] and math.isnan(row["loss"])
    assert not any("t=" in name for name in row) and journal.take_means() == {}

    journal.clock.end("network")
    for number, metrics in enumerate([STEPS[0], bad], start=2):
        record(journal, number, metrics)
    journal.flush(3, 0.1)
    _, row = journal.trackers.rows[-1]
    assert row["loss"] == 1 and row["velocity_loss/t=0.0-0.1"] == 1.5
    assert journal.take_means() == {"loss": 1.0, "grad_norm": 4.0} and journal.take_means() == {}


def test_phases_share_all_of_the_time(monkeypatch):
    moments = iter([10.0, 11.0, 13.0, 16.0, 20.0, 25.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    clock = PhaseClock(torch.device("cpu"))
    for phase in ("a", "b", "a"):
        clock.end(phase)
    assert clock.read() == {"a": 4.0, "b": 2.0}
    clock.end("b")
    clock.end("c")
    assert clock.read() == {"b": 4.0, "c": 5.0}, "what came after the last end is in the next reading"
    assert clock.read() == {}


def test_on_a_gpu_events_are_looked_at_when_read(monkeypatch):
    calls, ticks = Counter(), iter(range(0, 1000, 250))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls["recorded"] += 1
            self.at = next(ticks)

        def synchronize(self):
            calls["waited"] += 1

        def elapsed_time(self, other):
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = PhaseClock(SimpleNamespace(type="cuda"))
    clock.end("draw")
    clock.end("network")
    assert calls == {"recorded": 3}
    assert clock.read() == {"draw": 0.25, "network": 0.25}  # events tell milliseconds
