"""Bad input to a training run: one line that names it, status 2, and nothing changed on the disk."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stablevm import cli
from stablevm.networks.snapshot import load_card
from tests.helpers import runs

ROOT = Path(__file__).parents[2]


def refusal(arguments, capsys, folder):
    """The one line of a refused command, which changes no file (a lock comes and goes)."""

    def files():
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}

    capsys.readouterr()
    before = files()
    assert cli.train(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert files() == before
    return lines[0]


MISTAKES = {
    "unknown model": ({"model": "SiT-Z/2"}, "--model SiT-Z/2: expected one of SiT-XL/1"),
    "no data": ({"data_dir": Path("nowhere")}, "--data-dir nowhere: no such folder"),
    "too few classes": ({"num_classes": 2}, "--num-classes 2: .* has 3 classes"),
    "class without a sample": (
        {"num_classes": 5, "loss_type": "stablevm"},
        r"no sample of 2 of 5 classes \(3, 4\).*; lower --num-classes",
    ),
    "resolution": ({"resolution": 256}, "--resolution 256: .* holds images of 8"),
    "batch": ({"gradient_accumulation_steps": 3}, "--batch-size 8: expected a multiple of 1 processes x 3"),
    "depth": ({**runs.ALIGNED, "encoder_depth": 9}, "--encoder-depth 9: SiT-XXS/2 has 2 blocks"),
    "encoder": ({**runs.ALIGNED, "enc_type": "eyes"}, "eyes"),
    "encoder's file": ({**runs.ALIGNED, "encoder_weights": "nowhere.safetensors"}, "nowhere.safetensors"),
    "nothing to resume": ({"resume": True}, "--resume: .* has no checkpoint"),
    "precision": ({"mixed_precision": "fp16"}, "--mixed-precision fp16: there is no GPU here"),
    "chance": ({"cfg_prob": 1.5}, r"--cfg-prob 1.5: expected a probability in \[0, 1\]"),
    "warm-up": (
        {"lr_warmup_steps": 7},
        "--lr-warmup-steps 7: the run has 6 steps .--max-train-steps, --epochs.; give at most 6$",
    ),
    "warm-up and cosine": (
        {"lr_warmup_steps": 6, "lr_schedule": "cosine"},
        "--lr-warmup-steps 6: the run has 6 steps .*; give at most 5, .*--lr-schedule cosine",
    ),
    "tracker": ({"report_to": "pigeon"}, "--report-to pigeon: expected of tensorboard, wandb, none"),
}


def test_compiling_needs_a_compiler(root, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    runs.AcceleratorState._reset_state(True)
    line = refusal(runs.as_arguments(runs.config(root, "mistake", compile=True)), capsys, root)
    assert "--compile: found no C++ compiler (no-such-compiler)" in line


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake, root, capsys):
    options, expected = MISTAKES[mistake]
    runs.AcceleratorState._reset_state(True)
    line = refusal(runs.as_arguments(runs.config(root, "mistake", **options)), capsys, root)
    assert re.search(expected, line), line


def test_other_runs_and_files_are_left_alone(root, capsys):
    runs.run(runs.config(root, "mine", max_train_steps=1))
    other = runs.as_arguments(runs.config(root, "mine", max_train_steps=1, seed=3))
    line = refusal(other, capsys, root)
    assert "--seed 0" in line and "--seed 3" in line
    folder = root / "exps" / "holiday"
    folder.mkdir()
    (folder / "photo.txt").write_text("sunny")
    assert "holds files but not a run" in refusal(runs.as_arguments(runs.config(root, "holiday")), capsys, root)


def test_a_class_that_the_data_lacks(root, tmp_path, capsys):
    labels = torch.tensor([0, 2]).repeat(8)
    runs.write_data(tmp_path / "data", labels)
    settings = runs.config(root, "lacking", data_dir=tmp_path / "data", loss_type="stablevm")
    assert "classes numbered from 0 without gaps" in refusal(runs.as_arguments(settings), capsys, root)
    settings = runs.config(root, "lacking", data_dir=tmp_path / "data", max_train_steps=1, cfg_prob=0.2)
    assert len(runs.losses(runs.run(settings))) == 1, "flow matching needs no bank"
    assert "warning: " in (told := capsys.readouterr().err) and "no sample of 1 of 3 classes (one)" in told
    card = load_card(settings.folder / "checkpoints" / "0000001")
    assert card.class_counts == (8, 0, 8) and card.label_dropout == 0.2


@pytest.mark.parametrize("command", [["train.py"], ["-m", "stablevm", "train"]], ids=" ".join)
def test_the_real_command_ends_with_one_line(command, root):
    arguments = runs.as_arguments(runs.config(root, "real", data_dir=Path("nowhere")))
    done = subprocess.run([sys.executable, *command, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: --data-dir nowhere: no such folder")
    assert not (root / "exps" / "real").exists()


def test_damaged_data(root, tmp_path, capsys):
    runs.write_data(tmp_path / "data")
    shard = tmp_path / "data" / "latents-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    line = refusal(runs.as_arguments(runs.config(root, "damaged", data_dir=tmp_path / "data")), capsys, tmp_path)
    assert "latents-00000.safetensors" in line


def test_damaged_checkpoint(root, capsys):
    folder = runs.run(runs.config(root, "broken", max_train_steps=2))
    file = folder / "checkpoints" / "0000002" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert "model.safetensors is damaged" in refusal(runs.as_arguments(runs.config(root, "broken")), capsys, folder)
