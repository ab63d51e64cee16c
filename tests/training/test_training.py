"""Whole runs: the same numbers however they are split or resumed; and what each option does."""

import json
import operator
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from stablevm.data.dataset import PreparedDataset
from stablevm.networks.sit import SiT
from stablevm.networks.snapshot import load_card
from stablevm.sampling.config import GenerateConfig
from stablevm.sampling.generation import generate
from stablevm.sampling.guidance import sample_latents
from stablevm.support import rng
from stablevm.training import evaluation
from stablevm.training.objectives import AnchorPlan, objective_streams
from stablevm.training.step import StepRunner
from stablevm.training.terms import Alignment
from tests.helpers import runs

ROOT = Path(__file__).parents[2]
OBJECTIVES = {
    "si": {"loss_type": "si"},
    "stablevm, bank": {"loss_type": "stablevm", "prefill_bank_fully": True},
    "stablevm, batch": {"loss_type": "stablevm", "bank_anchors": "batch"},
    "stablevm, aligned": {"loss_type": "stablevm", "proj_tau": 0.5, **runs.ALIGNED},
    "si, aligned": {"loss_type": "si", "proj_weight_schedule": "sigmoid", **runs.ALIGNED},
}
EACH_OBJECTIVE = pytest.mark.parametrize("objective", OBJECTIVES)


@pytest.fixture(scope="module")
def whole(root):
    """The uninterrupted run of each objective."""
    return {name: runs.run(runs.config(root, f"whole-{name}", **options)) for name, options in OBJECTIVES.items()}


def by_time(folder):
    """The metrics of each row that are separated by time."""
    rows = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if "/t=" in name} for row in rows]


@EACH_OBJECTIVE
def test_three_and_three_steps_are_six(objective, root, whole):
    settings = runs.config(root, f"resumed-{objective}", **OBJECTIVES[objective])
    runs.run(replace(settings, max_train_steps=3))
    folder = runs.run(settings)
    assert runs.losses(folder) == pytest.approx(runs.losses(whole[objective]), abs=1e-6)
    runs.assert_same_checkpoint(folder, whole[objective])


def test_an_earlier_step_leads_to_the_same_end(root):
    options = {"checkpointing_steps": 2, "lr_schedule": "cosine", "lr_warmup_steps": 3, "loss_type": "stablevm"}
    settings = runs.config(root, "forked", **options)
    folder = runs.run(settings)
    expected = runs.losses(folder)
    shutil.copytree(folder / "checkpoints", root / "first" / "checkpoints")
    runs.run(replace(settings, resume_step=2))
    assert runs.losses(folder) == pytest.approx(expected, abs=1e-6)
    runs.assert_same_checkpoint(folder, root / "first")


@EACH_OBJECTIVE
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_changes_nothing(objective, parts, root, whole):
    settings = runs.config(root, f"{parts}-{objective}", gradient_accumulation_steps=parts, **OBJECTIVES[objective])
    assert runs.losses(runs.run(settings)) == pytest.approx(runs.losses(whole[objective]), abs=1e-5)


@pytest.mark.parametrize(
    "objective, options",
    [
        ("si", {"num_workers": 2}),
        ("si, aligned", {"num_workers": 2}),
        ("stablevm, aligned", {"num_workers": 2}),
        ("stablevm, bank", {"prefill_batch_size": 3, "prefill_workers": 2}),
        ("stablevm, bank", {"bank_on_gpu": False}),
        ("si", {"checkpointing_steps": 1, "sampling_steps": 1}),
    ],
)
def test_how_a_run_works_is_not_what_it_learns(objective, options, root, whole):
    name = f"how-{objective}-{'-'.join(options)}"
    folder = runs.run(runs.config(root, name, **{**OBJECTIVES[objective], **options}))
    assert runs.losses(folder) == runs.losses(whole[objective])
    runs.assert_same_checkpoint(folder, whole[objective])


def test_attention_without_the_fused_kernel(root, whole):
    folder = runs.run(runs.config(root, "plain-attention", fused_attn=False))
    assert runs.losses(folder) == pytest.approx(runs.losses(whole["si"]), abs=1e-5)


def test_rows_are_means_over_their_steps(root, whole):
    folder = runs.run(runs.config(root, "means", log_steps=4))
    each = runs.losses(whole["si"])
    assert runs.losses(folder) == pytest.approx([sum(each[:4]) / 4, sum(each[4:]) / 2], abs=1e-6)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 6]


@pytest.fixture(scope="module")
def by_two(root):
    """The run of each objective by two processes."""
    settings = {name: runs.config(root, f"two-{name}", **options) for name, options in OBJECTIVES.items()}
    file = root / "by-two.json"
    file.write_text(json.dumps([runs.as_arguments(each) for each in settings.values()]))
    done = subprocess.run(
        [*runs.TWO_PROCESSES, "-m", "tests.helpers.each_run", file],
        cwd=ROOT, env=runs.ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return settings


@pytest.mark.slow
@EACH_OBJECTIVE
def test_two_processes_are_one(objective, by_two, whole):
    settings = by_two[objective]
    assert runs.losses(settings.folder) == pytest.approx(runs.losses(whole[objective]), abs=1e-5)
    for row, expected in zip(by_time(settings.folder), by_time(whole[objective]), strict=True):
        assert row == pytest.approx(expected, rel=1e-3), "means over the samples of both processes"


@pytest.mark.slow
def test_the_published_launcher_joins_two_processes(root, whole):
    settings = runs.config(root, "launched", **OBJECTIVES["stablevm, aligned"])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--cpu", ROOT / "train.py"]
    done = subprocess.run([*launch, *runs.as_arguments(settings)], env=runs.ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert runs.losses(settings.folder) == pytest.approx(runs.losses(whole["stablevm, aligned"]), abs=1e-5)


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
    plain = {"step", "loss", "velocity_loss", "grad_norm", "effective_sample_size", "lr", "images_per_second"}
    phases = {f"seconds/{phase}" for phase in ("data_wait", "draw", "forward", "backward", "optimizer", "ema", "other")}
    assert {name for name in row if "/t=" not in name} == plain | phases | {"memory/host_peak_gib"}
    assert row["images_per_second"] == pytest.approx(8 / sum(row[name] for name in phases), rel=1e-6)
    samples = GenerateConfig(
        ckpt=folder / "checkpoints" / "0000006", num_fid_samples=6, num_steps=2, sample_dir=root / "samples", name="x"
    )
    assert generate(samples).is_file()


@pytest.mark.parametrize(
    ("chance", "scale", "labels"), [(0.0, 1.0, {0, 1, 2}), (0.1, 1.5, {0, 1, 2}), (1.0, 1.0, {3})], ids=str
)
def test_previews_ask_for_what_was_trained(chance, scale, labels, root, monkeypatch):
    asked = []

    def draw(model, card, wanted, *others, guidance):
        asked.append((card.label_dropout, guidance.cfg_scale, set(wanted.tolist())))
        return sample_latents(model, card, wanted, *others, guidance=guidance)

    monkeypatch.setattr(evaluation, "sample_latents", draw)
    folder = runs.run(runs.config(root, f"chance-{chance}", cfg_prob=chance, sampling_steps=1, max_train_steps=1))
    assert asked == [(chance, scale, labels)]
    with Image.open(folder / "samples" / "step-0000001.png") as grid:
        width = 6 * (64 + 2) + 2  # images of 8 x 8, enlarged
        assert grid.width > width + 10 if chance < 1 else grid.width == width, "names of classes, where there are any"
    assert load_card(folder / "checkpoints" / "0000001").label_dropout == chance


def test_without_any_alignment_weight_training_continues(root):
    folder = runs.run(runs.config(root, "no-weight", proj_tau=1e-9, **runs.ALIGNED))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row["alignment_loss"] == 0 and row["loss"] == row["velocity_loss"] for row in rows)


def test_encoders_see_no_image_without_weight(root, monkeypatch):
    seen = []

    def features(self, encoder, images):
        seen.append(len(images))
        return see(self, encoder, images)

    see = Alignment.features
    monkeypatch.setattr(Alignment, "features", features)
    runs.run(runs.config(root, "half-weight", proj_tau=0.5, **runs.ALIGNED))
    assert 0 < sum(seen) < 6 * 8
    seen.clear()
    runs.run(runs.config(root, "never-weight", proj_tau=1e-9, **runs.ALIGNED))
    assert sum(seen) == 0


def test_workers_read_the_images_of_the_banks_anchors(root, whole, monkeypatch):
    """Also after a resume, and the process that trains reads none."""

    def read_by_a_worker(self, rows):
        assert torch.utils.data.get_worker_info() is not None
        return read(self, rows)

    read = PreparedDataset.images
    monkeypatch.setattr(PreparedDataset, "images", read_by_a_worker)
    settings = runs.config(root, "ahead", num_workers=1, **OBJECTIVES["stablevm, aligned"])
    runs.run(replace(settings, max_train_steps=2))
    assert runs.losses(runs.run(settings)) == runs.losses(whole["stablevm, aligned"])


def test_images_of_other_anchors_are_noticed(root, monkeypatch):
    monkeypatch.setattr(AnchorPlan, "__iter__", lambda self: iter([[0] * 8] * 6))
    with pytest.raises(RuntimeError, match="not those whose images were read"):
        runs.run(runs.config(root, "wrong-plan", **OBJECTIVES["stablevm, aligned"]))


@pytest.mark.parametrize("objective", ["si", "stablevm, bank", "stablevm, batch"])
def test_without_alignment_no_image_is_read(objective, root, whole, tmp_path):
    shutil.copytree(root / "data", tmp_path / "data")
    for path in (tmp_path / "data").glob("images-*"):
        path.unlink()
    folder = runs.run(runs.config(root, f"blind-{objective}", **OBJECTIVES[objective], data_dir=tmp_path / "data"))
    assert runs.losses(folder) == runs.losses(whole[objective])


def test_metrics_by_time_are_parts_of_the_whole(root):
    """Weighted by how many samples a bin has, its means add up to the whole's; an empty bin is left out."""
    folder = runs.run(runs.config(root, "binned", log_steps=6, loss_type="stablevm", prefill_bank_fully=True))
    (row,) = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    streams = [objective_streams(0, step, range(8)) for step in range(6)]
    times = torch.cat([(rng.rand((8, 2), stream), rng.rand((8,), stream))[1] for stream in streams])
    counts = times.mul(10).long().bincount(minlength=10).tolist()
    names = [f"t={number / 10:.1f}-{(number + 1) / 10:.1f}" for number in range(10)]
    for metric in ("velocity_loss", "effective_sample_size"):
        bins = [row.get(f"{metric}/{name}", 0.0) for name in names]
        assert [bool(value) for value in bins] == [bool(count) for count in counts]
        assert sum(map(operator.mul, bins, counts)) / 48 == pytest.approx(row[metric], rel=1e-6)


def test_phases_with_alignment(whole):
    rows = [json.loads(line) for line in (whole["si, aligned"] / "metrics.jsonl").read_text().splitlines()]
    assert all(row["seconds/encoder"] > 0 for row in rows)


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_as_asked_while_training(allowed, root, monkeypatch):
    seen = set()

    def watched(self, *arguments):
        seen.add((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return step(self, *arguments)

    step = StepRunner.run
    monkeypatch.setattr(StepRunner, "run", watched)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    runs.run(runs.config(root, f"tf32-{allowed}", allow_tf32=allowed, max_train_steps=2, loss_type="stablevm"))
    assert seen == {(allowed, allowed)}
    assert before == (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)


def test_epochs_end_a_run(root, whole):
    """40 samples in batches of 8."""
    folder = runs.run(runs.config(root, "one-epoch", epochs=1))
    assert runs.losses(folder) == runs.losses(whole["si"])[:5]


NEEDS_COMPILER = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler here")


@pytest.mark.slow
@NEEDS_COMPILER
def test_compiled_blocks_compute_the_same(root, whole):
    """A run may change between compiled and not: its checkpoints are the same in names and, to rounding, in values."""
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = runs.config(root, "compiled", compile=True, sampling_steps=2)
    runs.run(replace(compiled, max_train_steps=2))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs
    runs.run(replace(compiled, max_train_steps=4, compile=False))
    folder = runs.run(compiled)
    assert runs.losses(folder) == pytest.approx(runs.losses(whole["si"]), abs=1e-5)
    one, two = runs.saved(folder, 6), runs.saved(whole["si"], 6)
    for part in one:
        assert one[part].keys() == two[part].keys()
        for name, value in one[part].items():
            assert torch.allclose(value, two[part][name], atol=1e-4), (part, name)


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
    {"proj_weight_schedule": "sigmoid", "proj_k": 2.0}, {"enc_type": "digits,digits"},
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
        encoders = options.get("enc_type", "digits").count(",") + 1
        options = {**options, "encoder_weights": ",".join([str(root / "encoder.safetensors")] * encoders)}
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


def test_zero_does_not_clip(plain_losses):
    assert plain_losses({"max_grad_norm": 0.0}) == plain_losses({"max_grad_norm": 1e9})


def test_moving_average_starts_at_the_first_weights(root):
    """After one step the warm-up's decay is 1/10."""
    folder = runs.run(runs.config(root, "first-step", max_train_steps=1, ema_decay=0.9999))
    card = load_card(folder / "checkpoints" / "0000001")
    first, parts = SiT(card.model, rng.generator(0, "weights")).state_dict(), runs.saved(folder, 1)
    for name, value in parts["ema"].items():
        assert torch.allclose(value, 0.1 * first[name] + 0.9 * parts["model"][name], atol=1e-6), name


def test_moving_average_follows_its_decay(root, whole):
    slow = runs.run(runs.config(root, "slow", ema_decay=0.1))
    assert runs.losses(slow) == runs.losses(whole["si"])
    name = "final_layer.linear.weight"

    def gap(folder):
        parts = runs.saved(folder, 6)
        return (parts["ema"][name] - parts["model"][name]).norm()

    assert gap(slow) < gap(whole["si"])
