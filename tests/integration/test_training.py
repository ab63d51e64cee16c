"""Whole runs: the same numbers however they are split, interrupted or resumed; and what is refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import runs
import torch
from safetensors.torch import load_file

from stablevm import cli
from stablevm.sampling.config import GenerateConfig
from stablevm.sampling.generation import generate

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
OBJECTIVES = {
    "si": {"loss_type": "si"},
    "stablevm, bank": {"loss_type": "stablevm", "prefill_bank_fully": True},
    "stablevm, batch": {"loss_type": "stablevm", "bank_anchors": "batch"},
    "stablevm, aligned": {"loss_type": "stablevm", "proj_tau": 0.5, **runs.ALIGNED},
    "si, aligned": {"loss_type": "si", "proj_weight_schedule": "sigmoid", **runs.ALIGNED},
}
EACH_OBJECTIVE = pytest.mark.parametrize("objective", OBJECTIVES)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    runs.write_data(folder / "data")
    runs.write_encoder(folder / "encoder.safetensors")
    return folder


@pytest.fixture(scope="module")
def whole(root):
    """The uninterrupted run of each objective."""
    return {name: runs.run(runs.config(root, f"whole-{name}", **options)) for name, options in OBJECTIVES.items()}


def weights(folder, step):
    return {
        part: load_file(folder / "checkpoints" / f"{step:07d}" / f"{part}.safetensors") for part in ("ema", "model")
    }


@EACH_OBJECTIVE
def test_three_and_three_steps_are_six(objective, root, whole):
    settings = runs.config(root, f"resumed-{objective}", **OBJECTIVES[objective])
    runs.run(replace(settings, max_train_steps=3))
    folder = runs.run(settings)
    assert runs.losses(folder) == pytest.approx(runs.losses(whole[objective]), abs=1e-6)
    for part, tensors in weights(whole[objective], 6).items():
        for name, value in weights(folder, 6)[part].items():
            assert torch.equal(value, tensors[name]), (part, name)


@EACH_OBJECTIVE
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_changes_nothing(objective, parts, root, whole):
    settings = runs.config(root, f"{parts}-{objective}", gradient_accumulation_steps=parts, **OBJECTIVES[objective])
    assert runs.losses(runs.run(settings)) == pytest.approx(runs.losses(whole[objective]), abs=1e-5)


@pytest.mark.slow
@EACH_OBJECTIVE
def test_two_processes_are_one(objective, root, whole):
    settings = runs.config(root, f"two-{objective}", **OBJECTIVES[objective])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, ROOT / "train.py", *runs.as_arguments(settings)], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert runs.losses(settings.folder) == pytest.approx(runs.losses(whole[objective]), abs=1e-5)


def start(settings):
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", *runs.as_arguments(settings)],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_for_rows(settings, rows, process, seconds=60):
    metrics, deadline = settings.folder / "metrics.jsonl", time.monotonic() + seconds
    while not metrics.exists() or len(metrics.read_text().splitlines()) < rows:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=["kill", "term", "ctrl-c"])
def test_killed_and_run_again(number, root):
    options = {"max_train_steps": 400, "checkpointing_steps": 20, "loss_type": "stablevm"}
    uninterrupted = runs.run(runs.config(root, f"calm-{number}", **options))
    settings = runs.config(root, f"killed-{number}", **options)
    process = start(settings)
    wait_for_rows(settings, 45, process)
    process.send_signal(number)
    status = process.wait(60)
    if number == signal.SIGKILL:
        assert status == -signal.SIGKILL
    else:
        assert status == 128 + number
        steps = sorted(int(path.name) for path in (settings.folder / "checkpoints").iterdir())
        assert len(runs.losses(settings.folder)) == steps[-1] < 400, "the last finished step is saved"
    assert start(settings).wait(120) == 0
    rows = [json.loads(line) for line in (settings.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 401))
    assert [row["loss"] for row in rows] == pytest.approx(runs.losses(uninterrupted), abs=1e-6)


def test_resume_needs_no_other_option(root, whole, capsys):
    place = [f"--output-dir={root / 'exps'}", "--exp-name=whole-si"]
    assert cli.train([*place, "--resume", "--max_train_steps=8"]) == 0
    assert len(runs.losses(whole["si"])) == 8
    assert cli.train([*place, "--resume", "--batch-size=4"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--batch-size 8" in error and "--batch-size 4" in error
    assert cli.train([*place, "--resume-step=5", f"--data-dir={root / 'data'}"]) == 2


def test_what_a_run_leaves(root):
    settings = runs.config(
        root, "complete", sampling_steps=3, report_to="tensorboard", loss_type="stablevm", checkpointing_steps=2,
        checkpoints_kept=2,
    )  # fmt: skip
    folder = runs.run(settings)
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["step-0000003.png", "step-0000006.png"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["0000004", "0000006"]
    assert list((folder / "tensorboard").rglob("events.out.tfevents.*"))
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"step", "loss", "velocity_loss", "grad_norm", "effective_sample_size", "lr", "images_per_second"} == set(
        row
    )
    samples = GenerateConfig(
        ckpt=folder / "checkpoints" / "0000006", num_fid_samples=6, num_steps=2, sample_dir=root / "samples", name="x"
    )
    assert generate(samples).is_file()


def test_without_any_alignment_weight_training_goes_on(root):
    folder = runs.run(runs.config(root, "no-weight", proj_tau=1e-9, **runs.ALIGNED))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row["alignment_loss"] == 0 and row["loss"] == row["velocity_loss"] for row in rows)


EFFECTS = [
    {"weighting": "lognormal"}, {"weighting": "logit_normal"}, {"path_type": "cosine"}, {"prediction": "x"},
    {"cfg_prob": 0.9}, {"qk_norm": True}, {"seed": 1}, {"adam_beta1": 0.5}, {"adam_beta2": 0.5},
    {"adam_weight_decay": 0.5}, {"adam_epsilon": 0.1}, {"max_grad_norm": 0.01}, {"learning_rate": 1e-4},
    {"lr_schedule": "cosine"}, {"lr_warmup_steps": 4}, {"mixed_precision": "bf16"}, {"loss_type": "stablevm"},
    {"model": "SiT-XXS/4"}, {"num_classes": 5},
]  # fmt: skip
BANK_EFFECTS = [{"bank_anchors": "batch"}, {"bank_capacity_per_class": 4}, {"prefill_bank_fully": True}]
ALIGNMENT_EFFECTS = [
    {"proj_coeff": 2.0}, {"proj_tau": 0.3}, {"proj_weight_schedule": "sigmoid"}, {"proj_weight_schedule": "hard_high"},
    {"proj_weight_schedule": "cosine"}, {"proj_weight_schedule": "snr"}, {"proj_weight_schedule": "constant"},
    {"encoder_depth": 2}, {"use_irepa": True}, {"use_irepa": True, "irepa_gamma": 0.1},
    {"proj_weight_schedule": "sigmoid", "proj_k": 2.0},
]  # fmt: skip
ALL_EFFECTS = [
    *(({}, change) for change in EFFECTS),
    *(({"loss_type": "stablevm"}, change) for change in BANK_EFFECTS),
    *((runs.ALIGNED, change) for change in ALIGNMENT_EFFECTS),
]


@pytest.fixture(scope="module")
def plain_losses(root):
    """Losses of the first steps, computed once for each set of options."""
    known = {}

    def get(options):
        key = json.dumps(options, sort_keys=True)
        if key not in known:
            known[key] = runs.losses(runs.run(runs.config(root, f"plain-{len(known)}", max_train_steps=4, **options)))
        return known[key]

    return get


@pytest.mark.parametrize("base, change", ALL_EFFECTS, ids=lambda value: json.dumps(value))
def test_options_have_their_effect(base, change, plain_losses):
    assert plain_losses(base | change) != plain_losses(base)


def test_every_effect_is_its_own(plain_losses):
    found = [tuple(plain_losses(base | change)) for base, change in ALL_EFFECTS]
    assert len(set(found)) == len(found)


def test_moving_average_follows_its_decay(root, whole):
    slow = runs.run(runs.config(root, "slow", ema_decay=0.1))
    assert runs.losses(slow) == runs.losses(whole["si"])[:6]
    name = "final_layer.linear.weight"
    gap = {folder: (weights(folder, 6)["ema"][name] - weights(folder, 6)["model"][name]).norm() for folder in
           (slow, whole["si"])}  # fmt: skip
    assert gap[slow] < gap[whole["si"]]


def refusal(arguments, capsys, folder):
    """The one line of a refused command, which changes nothing."""
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert cli.train(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    return lines[0]


MISTAKES = {
    "unknown model": ({"model": "SiT-Z/2"}, "--model SiT-Z/2: expected one of SiT-XL/2"),
    "no data": ({"data_dir": Path("nowhere")}, "--data-dir nowhere: no such folder"),
    "too few classes": ({"num_classes": 2}, "--num-classes 2: .* has 3 classes"),
    "class without a sample": ({"num_classes": 5, "loss_type": "stablevm"}, r"no sample of 2 of 5 classes \(3, 4\)"),
    "resolution": ({"resolution": 256}, "--resolution 256: .* holds images of 8"),
    "batch": ({"gradient_accumulation_steps": 3}, "--batch-size 8: not a multiple of 1 processes x 3"),
    "depth": ({**runs.ALIGNED, "encoder_depth": 9}, "--encoder-depth 9: SiT-XXS/2 has 2 blocks"),
    "encoder": ({**runs.ALIGNED, "enc_type": "eyes"}, "eyes"),
    "nothing to resume": ({"resume": True}, "--resume: .* has no checkpoint"),
    "precision": ({"mixed_precision": "fp16"}, "--mixed-precision fp16: there is no GPU here"),
    "chance": ({"cfg_prob": 1.5}, r"--cfg-prob 1.5: expected a chance in \[0, 1\]"),
    "tracker": ({"report_to": "pigeon"}, "--report-to pigeon: expected of tensorboard, wandb, none"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake, root, capsys):
    options, expected = MISTAKES[mistake]
    runs.AcceleratorState._reset_state(True)
    line = refusal(runs.as_arguments(runs.config(root, "mistake", **options)), capsys, root)
    assert re.search(expected, line), line


def test_other_runs_and_files_are_left_alone(root, whole, capsys):
    other = runs.as_arguments(runs.config(root, "whole-si, aligned", **OBJECTIVES["si, aligned"], seed=3))
    line = refusal(other, capsys, root)
    assert "--seed 0" in line and "--seed 3" in line
    folder = root / "exps" / "holiday"
    folder.mkdir()
    (folder / "photo.txt").write_text("sunny")
    assert "holds files but no run" in refusal(runs.as_arguments(runs.config(root, "holiday")), capsys, root)


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


def test_unknown_options_are_refused(capsys):
    with pytest.raises(SystemExit) as end:
        cli.train(["--exp-name=x", "--data-dir=y", "--learning-speed=3"])
    assert end.value.code == 2 and "--learning-speed" in capsys.readouterr().err
