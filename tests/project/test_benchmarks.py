"""The scripts in benchmarks/ run, at sizes too small for meaningful figures."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.helpers import runs

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RUNS = {
    "activations": ("--model=SiT-XXS/2", "--side=8", "--batch-size=2", "--repeats=1"),
    "assembly": ("{folder}", "--images=8", "--side=8"),
    "bank": ("--classes=4", "--capacity=8", "--batch=8", "--shape", "1", "4", "4", "--repeats=1"),
    "evaluation": ("--samples=64", "--reference=64", "--no-peers"),
    "loader": ("--rows=64", "--large-rows=64", "--image-rows=16", "--batch=16", "--workers", "0", "--repeats=1"),
    "meanflow_mixture": ("--seeds=1", "--updates=2", "--powers", "0.5", "--batches=2", "--output={folder}/all.json"),
    "posterior": (
        *("--samples", "4", "--references", "8", "--dimensions", "16", "--dtypes", "float32", "--classes=2"),
        *("--close", "8", "16", "--repeats=1"),
    ),
    "preparation": ("--images=8", "--classes=2"),
    "sampling": ("--model=SiT-XXS/2", "--side=8", "--images=2", "--num-steps=4"),
    "training_step": ("--model=SiT-XXS/2", "--steps=6", "--batch-size=2", "--no-compiled"),
    "waiting": ("--busy", "1", "--ways", "one", "--rounds=1", "--steps=2"),
}


def scripts():
    return sorted(path.stem for path in BENCHMARKS.glob("*.py"))


@pytest.mark.parametrize("name", scripts())
def test_it_says_how_it_is_run(name):
    text = (BENCHMARKS / f"{name}.py").read_text()
    if name != "common":
        assert f"python benchmarks/{name}.py" in text.split('"""')[1]


@pytest.fixture
def fresh_accelerator():
    """No precision of an Accelerator stays in the process, before or after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", sorted(RUNS))
@pytest.mark.usefixtures("fresh_accelerator")
def test_it_runs(name, tmp_path, monkeypatch, capsys):
    script = BENCHMARKS / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(script), *(part.format(folder=tmp_path) for part in RUNS[name])])
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    runpy.run_path(str(script), run_name="__main__")
    assert "torch " in capsys.readouterr().out


@pytest.mark.slow
def test_the_kernel_of_the_target_agrees_with_float64_in_tritons_interpreter():
    pytest.importorskip("triton")
    environment = runs.ENVIRONMENT | {"TRITON_INTERPRET": "1"}
    for script, *options in (("target_kernel", "--device=cpu"), ("posterior", *RUNS["posterior"], "--device=cpu")):
        command = [sys.executable, BENCHMARKS / f"{script}.py", *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("agrees" if script == "target_kernel" else " triton") in done.stdout


@pytest.mark.slow
def test_the_gpu_script_is_rehearsed_on_the_cpu(tmp_path):
    """Tiny sizes, so that on a GPU nothing but the device is new; `test_it_runs` rehearses the other parts."""
    parts = ("device-tests", "step", "step-compiled", "sampling")
    done = subprocess.run(
        [BENCHMARKS / "gpu.sh", tmp_path, "--small", "--parts", *parts],
        env=runs.ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert done.returncode == 0, {name: part["log"] for name, part in found.items() if part["status"]}
    assert tuple(found) == parts and all(found[name]["steps"] for name in found if name.startswith("step"))
    assert "stablevm+va-repa" in done.stdout and "network evaluations per image" in done.stdout


def test_the_gpu_script_wants_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    done = subprocess.run([BENCHMARKS / "gpu.sh", tmp_path / "none"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: this machine has no GPU")
