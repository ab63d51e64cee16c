"""The whole quickstart at small size: its files, resuming, and what it refuses."""

import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stablevm import cli
from stablevm.quickstart import recipe

pytestmark = pytest.mark.slow
STEPS = 8
# The command as a process of its own, with as few samples as `smaller` leaves in this one.
FEW_SAMPLES = """
import sys
from stablevm import cli
from stablevm.quickstart import recipe
recipe.NUM_SAMPLES, recipe.EXTRACTOR_STEPS = 40, 40
sys.exit(cli.quickstart())
"""


@pytest.fixture(scope="module", autouse=True)
def smaller():
    """A short extractor training and few samples: what is tested here is the staircase, not the quality."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "EXTRACTOR_STEPS", 40)
        patch.setattr(recipe, "NUM_SAMPLES", 40)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, smaller):
    folder = tmp_path_factory.mktemp("quickstart") / "out"
    assert cli.quickstart(["--output-dir", str(folder), "--steps", str(STEPS)]) == 0
    return folder


def test_summary_and_report(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert {"accuracy", "frechet_test", "frechet_floor", "seconds", "protocol"} <= summary.keys()
    assert summary["protocol"]["steps"] == STEPS and summary["frechet_floor"] > 0
    report = (finished / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 3 + 2 + 2 and 'src="http' not in report
    text = re.sub("<[^>]+>", "", report)
    assert "stablevm train" in text and "--loss-type stablevm" in text and "--exp-name si" in text
    for told in (
        "StableVM, guidance 1.5, t <= 0.4",
        "CFM, no guidance",
        "Why guidance stops at t = 0.4",
        "This is one seed",
    ):
        assert told in html.unescape(text), told
    for link in re.findall(r'href="([^"]+)"', report):
        assert link.startswith("https://arxiv.org/") or (finished / link).is_file(), link


def test_both_methods_are_trained_and_evaluated_alike(finished):
    """All of the two runs' options but what the methods need, and samples of the same seed and guidance."""
    ours, plain = (json.loads((finished / arm / "config.json").read_text()) for arm in ("stablevm", "si"))
    assert {name for name in ours if ours[name] != plain[name]} <= {
        "exp_name", "loss_type", "bank_capacity_per_class", "prefill_bank_fully"
    }  # fmt: skip
    summary = json.loads((finished / "summary.json").read_text())
    compared = summary["comparison"]["CFM"]
    assert compared.keys() == summary["by_guidance"].keys() - {"guidance 1.5"}
    assert all(found["num_samples"] == 40 for found in (*compared.values(), *summary["by_guidance"].values()))
    assert summary["frechet_test"] == summary["by_guidance"]["guidance 1.5, t <= 0.4"]["frechet_test"]
    assert summary["processor_seconds"] > 0 and summary["seconds"] > 0


def test_again_changes_nothing_but_the_report(finished, capsys):
    weights = finished / "stablevm" / "checkpoints" / f"{STEPS:07d}" / "ema.safetensors"
    before = weights.stat().st_mtime_ns
    assert cli.quickstart(["--output-dir", str(finished), "--steps", str(STEPS)]) == 0
    assert weights.stat().st_mtime_ns == before
    assert len(capsys.readouterr().out.strip().split("\n\n")[-1].split("\n")) == 5


@pytest.mark.parametrize("options", [["--seed", "1"], ["--loss-type", "si"], ["--steps", "9"]])
def test_another_quickstart_is_refused(finished, options, capsys):
    before = sorted(finished.rglob("*"))
    assert cli.quickstart(["--output-dir", str(finished), "--steps", str(STEPS), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --output-dir") and error.count("\n") == 1
    assert sorted(finished.rglob("*")) == before


def test_foreign_folder_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    assert cli.quickstart(["--output-dir", str(tmp_path)]) == 2
    assert "holds other files" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_killed_in_training_it_resumes(finished, tmp_path):
    folder = tmp_path / "out"
    for part in ("data", "extractor"):  # saves their time
        shutil.copytree(finished / part, folder / part)
    claim = json.loads((finished / "quickstart.json").read_text()) | {"steps": 60}
    (folder / "quickstart.json").write_text(json.dumps(claim))
    command = [sys.executable, "-c", FEW_SAMPLES, "--output-dir", str(folder), "--steps", "60", "--no-compare"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = folder / "stablevm" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, first)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 128 + signal.SIGTERM
    assert not (folder / "summary.json").exists() and list((folder / "stablevm" / "checkpoints").iterdir())
    second = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr[-2000:]
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 60
    assert json.loads((folder / "summary.json").read_text())["seconds"] > 0


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def test_flow_matching_alone(finished, tmp_path: Path):
    folder = tmp_path / "out"
    for part in ("data", "extractor"):
        shutil.copytree(finished / part, folder / part)
    claim = json.loads((finished / "quickstart.json").read_text()) | {"steps": 2, "loss_type": "si"}
    (folder / "quickstart.json").write_text(json.dumps(claim))
    assert cli.quickstart(["--output-dir", str(folder), "--steps", "2", "--loss-type", "si", "--no-compare"]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["protocol"]["loss_type"] == "si" and summary["comparison"] == {}
    assert not (folder / "stablevm").exists() and "This is one seed" not in (folder / "report.html").read_text()
