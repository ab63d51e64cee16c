"""Metrics of a run: the JSON-lines file through kills and resumes, and the trackers."""

import json
import math
import time

import numpy as np
import pytest

from stablevm.support.errors import UserError
from stablevm.training.tracker import METRICS_FILE, Trackers, check_trackers, read_metrics

BIN = "velocity_loss/t=0.0-0.1"  # a name as the trainer gives them


def write(folder, steps, names=(), first_step=0):
    trackers = Trackers(folder, names, {"seed": 0, "folder": folder}, first_step)
    for step in steps:
        trackers.log(step, {"loss": step / 10})
    trackers.close()
    return folder / METRICS_FILE


def steps_in(path):
    return [row["step"] for row in read_metrics(path)]


def test_rows_are_on_the_disk_at_once(tmp_path):
    trackers = Trackers(tmp_path / "run", (), {})
    trackers.log(1, {"loss": 0.5, "lr": 1e-4})
    assert read_metrics(tmp_path / "run" / METRICS_FILE) == [{"step": 1, "loss": 0.5, "lr": 1e-4}]
    trackers.close()


def test_resuming_appends(tmp_path):
    write(tmp_path, [1, 2, 3])
    assert steps_in(write(tmp_path, [4, 5], first_step=3)) == [1, 2, 3, 4, 5]


def test_rows_after_the_checkpoint_are_taken_off(tmp_path):
    write(tmp_path, range(1, 8))
    assert steps_in(write(tmp_path, [5, 6], first_step=4)) == [1, 2, 3, 4, 5, 6]
    assert steps_in(write(tmp_path, [1])) == [1]


@pytest.mark.parametrize("cut", [1, 5, 15])
def test_a_half_written_last_line_is_ignored(tmp_path, cut):
    path = write(tmp_path, [1, 2, 3])
    path.write_bytes(path.read_bytes()[:-cut])
    assert steps_in(path) == [1, 2]
    assert steps_in(write(tmp_path, [3, 4], first_step=2)) == [1, 2, 3, 4]


def test_an_empty_file_has_no_rows(tmp_path):
    path = write(tmp_path, [])
    assert path.read_bytes() == b"" and read_metrics(path) == []


def test_what_json_cannot_hold_becomes_null(tmp_path):
    trackers = Trackers(tmp_path, (), {})
    trackers.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.0})
    trackers.close()
    text = (tmp_path / METRICS_FILE).read_text()
    assert text == '{"step": 1, "a": null, "b": null, "c": null, "d": 0.0}\n'
    assert json.loads(text) == read_metrics(tmp_path / METRICS_FILE)[0]


def test_tensorboard_gets_numbers_and_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = Trackers(tmp_path, ["tensorboard"], {"seed": 3, "name": None, "folder": tmp_path})
    trackers.log(10, {"loss": 0.25})
    trackers.log(20, {"loss": 0.125, BIN: 0.75})
    picture = np.zeros((4, 6, 3), dtype=np.uint8)
    picture[1, 2] = (255, 128, 0)
    trackers.image(20, "samples", picture)
    trackers.close()
    written = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(row.step, row.value) for row in written.Scalars("loss")] == [(10, 0.25), (20, 0.125)]
    assert [(row.step, row.value) for row in written.Scalars(BIN)] == [(20, 0.75)]
    (image,) = written.Images("samples")
    assert (image.step, image.height, image.width) == (20, 4, 6)
    assert steps_in(tmp_path / METRICS_FILE) == [10, 20]


def test_wandb_gets_numbers_and_pictures(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trackers = Trackers(tmp_path, ["wandb"], {"batch_size": 3, "path": tmp_path, "name": None})
    trackers.log(1, {"loss": 0.5, BIN: 0.25})
    trackers.image(1, "samples", np.zeros((4, 4, 3), np.uint8))
    trackers.close()
    (record,) = {path.resolve() for path in tmp_path.rglob("*.wandb")}
    deadline = time.monotonic() + 20  # wandb's own process may write the last of the file after `finish`
    while BIN.encode() not in record.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert b"loss" in record.read_bytes() and BIN.encode() in record.read_bytes()
    assert len(list(tmp_path.rglob("samples*.png"))) == 1


def test_without_trackers_there_is_only_the_file(tmp_path):
    write(tmp_path, [1])
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


def test_a_damaged_line_stops_nothing_and_is_kept_aside(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    bad = [b"{", b"[1]", b'{"step": "x"}', b"\xff\x00", b'{"step": ' + b"7" * 5000 + b"}", b"[" * 100_000]
    path.write_bytes(b'{"step": 1, "loss": 2}\n' + b"".join(line + b"\n" for line in bad) + b'{"step": 2}\n{"ste')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    Trackers(tmp_path, [], {}, first_step=5).close()
    assert path.read_text() == '{"step": 1, "loss": 2}\n{"step": 2}\n'
    assert (tmp_path / "metrics.damaged").read_bytes().split(b"\n")[:-1] == bad
    assert "6 damaged lines, now in metrics.damaged" in capsys.readouterr().err
    Trackers(tmp_path, [], {}, first_step=5).close()
    assert capsys.readouterr().err == ""


def test_wandb_without_login_is_one_line_at_the_start(monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "login", lambda prompt: False)
    with pytest.raises(UserError, match=r"not logged in; run wandb login, set WANDB_MODE=offline") as error:
        check_trackers(["tensorboard", "wandb"])
    assert "\n" not in str(error.value)
    check_trackers(["tensorboard"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"])


def test_what_wandb_says_is_one_line(monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)

    def login(prompt):
        raise wandb.errors.UsageError("api_key not configured.\nCall it.")

    monkeypatch.setattr(wandb, "login", login)
    with pytest.raises(UserError, match=r"--report-to wandb: api_key not configured") as error:
        check_trackers(["wandb"])
    assert "\n" not in str(error.value)
