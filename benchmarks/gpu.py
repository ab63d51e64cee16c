"""Everything that only a GPU can tell, in one command of at most eight minutes on one H100 or H200.

    python benchmarks/gpu.py OUTPUT_FOLDER [--small]

It needs no network, no data and neither diffusers nor wandb. The parts are independent programs in order of worth, each
with a limit of its own; OUTPUT_FOLDER/gpu.json, gpu.txt and one log for each part are written after every part, so that
a run that is cut off still tells. --small rehearses all parts at tiny sizes, on a CPU too.
"""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from stablevm.support.files import write_json, write_text
from stablevm.support.machine import describe_machine

ROOT = Path(__file__).parents[1]
SHOWN_LINES = 40  # of a log, in the JSON file
STEPS = "steps.json"  # what `stablevm benchmark` writes


@dataclass(frozen=True)
class Part:
    """One program: what it is run for, its seconds at most, and its arguments at full size and at small size."""

    name: str
    question: str
    limit: int
    command: tuple[str, ...]
    small: tuple[str, ...]

    def arguments(self, folder: Path, *, small: bool) -> list[str]:
        words = (*self.command, *(self.small if small else ()))
        return [sys.executable, *(word.format(folder=folder, root=ROOT) for word in words)]


def _benchmark(*options: str) -> tuple[str, ...]:
    return ("-m", "stablevm", "benchmark", *options, "--output-dir", "{folder}")


# Later options have priority, so the small sizes override.
_TINY_STEPS = (
    *("--model", "SiT-XXS/2", "--batch-size", "2", "--steps", "5", "--warmup", "1", "--num-classes", "2"),
    *("--bank-capacity-per-class", "2", "--resolution", "64", "--num-workers", "0", "--mixed-precision", "no"),
)
_ALIGNED = (*_TINY_STEPS, "--enc-type", "vit_tiny_patch16_224", "--encoder-depth", "1")
_FEW = ("--steps", "10", "--warmup", "3")

PARTS = (
    Part(
        "device-tests", "do draws, bank, training and sampling agree with the CPU?", 75,
        ("-m", "pytest", "-q", "-m", "cuda", "{root}/tests/device"), (),
    ),
    Part(
        "step", "SiT-XL/2, batch 256, bf16, StableVM and VA-REPA", 75,
        _benchmark("--objectives", "stablevm+va-repa", *_FEW), _ALIGNED,
    ),
    Part(
        "step-compiled", "the same with compiled blocks", 120,
        _benchmark("--objectives", "stablevm+va-repa", "--compile", *_FEW), (*_ALIGNED, "--no-compile"),
    ),
    Part("step-si", "flow matching without alignment", 60, _benchmark("--objectives", "si", *_FEW), _TINY_STEPS),
    Part(
        "target", "the target with references, as is and by the Triton kernel, against its floor of memory traffic", 45,
        (
            "{root}/benchmarks/posterior.py", "--samples", "256", "--references", "256", "--dimensions", "4096",
            "--classes", "1000", "--memory-limit", "40",
        ),
        (
            "--samples", "4", "--references", "8", "--dimensions", "16", "--classes", "2", "--close", "8", "16",
            "--repeats", "1",
        ),
    ),
    Part(
        "sampling", "250 steps of the SDE with guidance to 0.7", 60,
        ("{root}/benchmarks/sampling.py", "--model", "SiT-XL/2", "--images", "16"),
        ("--model", "SiT-XXS/2", "--side", "8", "--images", "2", "--num-steps", "4"),
    ),
    Part(
        "step-fp16", "50 steps in float16 with its scaler", 75,
        _benchmark("--objectives", "si", "--mixed-precision", "fp16", "--steps", "50"), _TINY_STEPS,
    ),
    Part(
        "evaluation", "statistics and distances of 50,000 features", 60,
        ("{root}/benchmarks/evaluation.py", "--no-peers"), ("--samples", "64", "--reference", "64"),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Measure this machine's GPU."""

    folder: tyro.conf.Positional[Path]
    """Folder for gpu.json, gpu.txt and the logs."""
    small: bool = False
    """Tiny sizes without limits, to rehearse on a CPU."""
    limit: int = 480
    """Seconds in all."""
    parts: tuple[str, ...] = tuple(part.name for part in PARTS)
    """Names of the parts to run."""


def run(part: Part, options: Options, seconds: float | None) -> dict[str, Any]:
    """The outcome of a part, which is ended after `seconds`, if they are limited."""
    folder, log = options.folder / part.name, options.folder / f"{part.name}.log"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    started = time.perf_counter()
    with log.open("w") as output:
        try:
            command = part.arguments(folder, small=options.small)
            status: int | str = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=options.folder, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            status = f"ended after {seconds:.0f} s"
    steps = folder / STEPS
    return {
        "question": part.question,
        "status": status,
        "seconds": round(time.perf_counter() - started, 1),
        "steps": json.loads(steps.read_text()) if steps.exists() else None,
        "log": log.read_text(errors="replace").splitlines()[-SHOWN_LINES:],
    }


def table(machine: str, results: dict[str, dict[str, Any]]) -> str:
    """The outcomes as text: a line for each part, then the last lines of its log."""
    lines = [machine, ""]
    lines += [f"{name:14} {found['status']!s:>6} {found['seconds']:7.1f} s  {found['question']}"
              for name, found in results.items()]  # fmt: skip
    for name, found in results.items():
        lines += ["", f"== {name}", *found["log"]]
    return "\n".join(lines) + "\n"


def main(options: Options) -> int:
    options = Options(**(asdict(options) | {"folder": options.folder.resolve()}))
    options.folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.small:
        print("error: this machine has no GPU that torch can use; --small rehearses on the CPU", file=sys.stderr)
        return 2
    machine, results = describe_machine(device), {}
    end = time.perf_counter() + (math.inf if options.small else options.limit)
    for part in (each for each in PARTS if each.name in options.parts):
        left = end - time.perf_counter()
        if left <= 0:
            break
        results[part.name] = run(part, options, None if options.small else min(part.limit, left))
        write_json(options.folder / "gpu.json", {"machine": machine, "parts": results})
        write_text(options.folder / "gpu.txt", table(machine, results))
        print(f"{part.name}: status {results[part.name]['status']}, {results[part.name]['seconds']} s", flush=True)
    print((options.folder / "gpu.txt").read_text())
    # A rehearsal has no device tests to run: pytest ends with 5 where it selects none.
    return int(any(found["status"] not in (0, 5) for found in results.values()))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
