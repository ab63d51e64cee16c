"""The README's commands, at small size, as a reader would paste them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from stablevm import cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SMALLER = {
    "--max-train-steps=1000": "--max-train-steps=6",
    "checkpoints/0001000": "checkpoints/0000006",
    "--num-fid-samples 500": "--num-fid-samples 30",
    "--num-steps=250": "--num-steps=5",
    "--lr-warmup-steps=100": "--lr-warmup-steps=2",
}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def paste(command, folder):
    """Run a block in a folder that looks like the checkout, with the running Python's commands first on the path."""
    for script in ("train.py", "generate.py", "evaluate.py", "gmm_exp.py"):
        if not (folder / script).exists():
            (folder / script).symlink_to(ROOT / script)
    tools = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_quickstart_command(tmp_path):
    install, run = blocks("bash")[0].strip().split(" && ")
    assert install == "pip install -e '.[all]'"
    paste(f"{run} --steps 6", tmp_path)
    assert (tmp_path / "quickstart" / "report.html").is_file()


def test_the_lines_for_images_of_ones_own(tmp_path, monkeypatch):
    """Of preprocessing/README.md: from pictures in two folders to a picture of samples."""
    page = (ROOT / "preprocessing" / "README.md").read_text()
    lines = page.split("## Your own data set in ten lines")[1].split("```")[1].replace("\\\n", "")
    for long, short in {"--max-train-steps 1000": "--max-train-steps 2", "0001000": "0000002"}.items():
        assert long in lines
        lines = lines.replace(long, short)
    monkeypatch.chdir(tmp_path)
    for number, kind in enumerate(("cat", "dog", "dog")):
        Path("pets", kind).mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40 + number, 50), 60).save(f"pets/{kind}/{number}.jpg")
    commands = [shlex.split(line, comments=True)[1:] for line in lines.splitlines() if line.startswith("stablevm")]
    assert [words[0] for words in commands] == ["prepare", "prepare", "data", "train", "generate"]
    for words in commands:
        more = ["--num-workers", "0"] if words[0] == "train" else ["--num-steps", "2"] if words[0] == "generate" else []
        assert cli.main([*words, *more]) == 0
    assert Path("samples/pets.png").is_file()


def test_continuous_integration_runs_the_test_command():
    install, check = blocks("bash")[1].strip().split(" && ")
    script = (ROOT / ".ci" / "run").read_text()
    assert install.removeprefix("pip install ") in script and f"\n{check}\n" in script


@pytest.mark.slow
def test_commands_by_hand(tmp_path):
    commands = blocks("bash")[2]
    for long, short in SMALLER.items():
        assert long in commands
        commands = commands.replace(long, short)
    table = paste(commands, tmp_path)
    assert "accuracy" in table and (tmp_path / "samples" / "digits.npz").is_file()


@pytest.mark.slow
def test_toy_commands(tmp_path):
    smaller = "--updates=4 --eval-every=2 --eval-samples=20 --variance-samples=10"
    commands = "".join(f"{line} {smaller}\n" for line in blocks("bash")[3].splitlines())
    assert "stable_vm (1)" in paste(commands, tmp_path)
    assert (tmp_path / "plots" / "divergence-velocity.png").is_file()


def test_three_lines_in_your_own_loop(stream):
    def model(x_t, t, labels):
        return x_t * t.reshape(-1, 1, 1, 1) + labels.reshape(-1, 1, 1, 1)

    names = {
        "latents": torch.randn(6, 4, 32, 32, generator=stream),
        "labels": torch.arange(6),
        "generator": stream,
        "model": model,
    }
    exec(blocks("python")[0], names)
    assert names["loss"].ndim == 0 and torch.isfinite(names["loss"])


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
