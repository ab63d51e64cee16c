"""Commands that prepare a tiny source, and the contents of the folders that they write."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOLS = [sys.executable, str(ROOT / "preprocessing" / "dataset_tools.py")]
STABLEVM = [sys.executable, "-m", "stablevm"]
GOOD, SIDE = 60, 32


def convert(source, dest, *more, transform="center-crop-dhariwal"):
    words = ["convert", "--source", str(source), "--dest", str(dest), "--resolution", f"{SIDE}x{SIDE}"]
    return [*words, *(["--transform", transform] if transform else []), *more]


def encode(source, dest, vae, *more):
    return ["encode", "--source", str(source), "--dest", str(dest), "--vae", str(vae), "--num-workers", "0", *more]


def encode_shards(folder, vae, *more):
    return ["encode", "--data-dir", str(folder), "--vae", str(vae), "--num-workers", "0", *more]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run_quietly(arguments, **environment):
    return subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, **environment})


def refusal(capsys, command, arguments):
    assert command(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def raise_interrupt(*_):
    raise KeyboardInterrupt
