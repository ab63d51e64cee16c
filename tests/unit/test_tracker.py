"""Metrics go to the file and to the trackers; a resumed run continues the file."""

import json

import numpy as np
import pytest

from stablevm.training.tracker import METRICS_FILE, Trackers, read_metrics


def rows(folder):
    return read_metrics(folder / METRICS_FILE)


def test_resuming_takes_later_rows_off(tmp_path):
    trackers = Trackers(tmp_path, [], {})
    for step in (1, 2, 3):
        trackers.log(step, {"loss": float(step)})
    trackers.close()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    resumed = Trackers(tmp_path, [], {}, first_step=2)
    resumed.log(3, {"loss": 30.0})
    resumed.close()
    assert rows(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 30.0}]


def test_values_that_json_lacks_become_null(tmp_path):
    trackers = Trackers(tmp_path, [], {})
    trackers.log(1, {"loss": float("nan"), "norm": float("inf")})
    trackers.close()
    assert rows(tmp_path) == [{"step": 1, "loss": None, "norm": None}]
    assert json.loads((tmp_path / METRICS_FILE).read_text().splitlines()[0])["loss"] is None


@pytest.mark.parametrize("name, files", [("tensorboard", "events.out.tfevents.*"), ("wandb", "*.wandb")])
def test_trackers_get_numbers_and_pictures(name, files, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    if name == "wandb":
        pytest.importorskip("wandb")
    trackers = Trackers(tmp_path, [name], {"batch_size": 3, "path": tmp_path, "name": None})
    trackers.log(1, {"loss": 0.5})
    trackers.image(1, "samples", np.zeros((4, 4, 3), np.uint8))
    trackers.close()
    assert list(tmp_path.rglob(files))
