"""The README's commands, at small size, as a reader would paste them."""

import json
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
    "--max-train-steps 1000": "--max-train-steps 6",
    "checkpoints/0001000": "checkpoints/0000006",
    "--num-fid-samples 500": "--num-fid-samples 30",
    "--lr-warmup-steps 100": "--lr-warmup-steps 2",
}
SMALLER_AS_PUBLISHED = {
    long.replace(" 1000", "=1000").replace(" 100", "=100"): short for long, short in SMALLER.items()
}
SMALLER_TOY = "--updates=4 --eval-every=2 --eval-samples=20 --variance-samples=10"


def blocks(language, page=README):
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def smaller(commands, replacements):
    for long, short in replacements.items():
        assert long in commands
        commands = commands.replace(long, short)
    return commands


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
    shorter = {"--max-train-steps 1000": "--max-train-steps 2", "--lr-warmup-steps 100": "", "0001000": "0000002"}
    for long, short in shorter.items():
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
def test_commands_by_hand_and_as_published(tmp_path):
    table = paste(smaller(blocks("bash")[2], SMALLER), tmp_path)
    assert "accuracy" in table and (tmp_path / "samples" / "digits.npz").is_file()
    (published,) = blocks("bash", (ROOT / "docs" / "migrating.md").read_text())
    replacements = {
        **SMALLER_AS_PUBLISHED,
        "--num-steps=250": "--num-steps=5",
        "velocity\n": f"velocity {SMALLER_TOY}\n",
    }
    said = paste(smaller(published, {**replacements, "--only_plot": f"--only_plot {SMALLER_TOY}"}), tmp_path)
    assert "accuracy" in said and "stable_vm (1)" in said
    assert (tmp_path / "samples" / "published.npz").is_file()
    assert (tmp_path / "plots" / "divergence-velocity.png").is_file()


@pytest.mark.slow
def test_commands_of_two_processes(tmp_path):
    commands = smaller(blocks("bash")[3], {long: short for long, short in SMALLER.items() if "warmup" not in long})
    paste("stablevm prepare digits data/digits", tmp_path)
    paste(commands, tmp_path)
    assert (tmp_path / "samples" / "two.npz").is_file()
    rows = [json.loads(line) for line in (tmp_path / "exps" / "two" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 6


@pytest.mark.slow
def test_toy_command(tmp_path):
    said = paste(f"{blocks('bash')[4].strip()} {SMALLER_TOY}", tmp_path)
    assert "cfm (1)" in said and "stable_vm (1)" in said
    assert (tmp_path / "plots" / "divergence-velocity.png").is_file()


@pytest.mark.parametrize("ids", [", ids=rows", ""])
def test_the_loop_needs_ids(ids, stream):
    """Forty points that come again in twenty epochs: with `ids` the targets are exact, without they are biased."""
    points, draws, targets = torch.randn(40, 2, generator=stream), [], []
    epochs = [torch.randperm(40, generator=stream).split(8) for _ in range(20)]
    names = {"loader": [(points[rows], torch.zeros_like(rows), rows) for epoch in epochs for rows in epoch]}

    def model(x_t, t, labels):
        draws.append((x_t, t))
        return torch.zeros_like(x_t)

    loop = blocks("python")[0].replace("num_classes=10, capacity=256, shape=(4, 32, 32)", "1, 256, shape=(2,)")
    loop = loop.replace(", ids=rows", ids).replace("    ...\n", "    targets.append(draw.target)\n")
    exec(loop, names | {"model": model, "targets": targets})
    errors = []
    for (x_t, t), target in list(zip(draws, targets, strict=True))[-10:]:
        squared = (x_t[:, None] - (1 - t[:, None, None]) * points).square().sum(2).double()
        weights = (-squared / (2 * t[:, None].double() ** 2)).softmax(1).float()
        errors.append((target - (x_t - weights @ points) / t[:, None])[t > 0.1].square().mean())
    error = torch.stack(errors).mean().item()
    assert error < 1e-11 if ids else error > 2e-4  # measured: 4e-14 and 6e-4


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("http") or (ROOT / target.partition("#")[0]).exists(), target
