"""`stablevm benchmark` at a tiny size: what it measures, writes and refuses."""

import json
from dataclasses import replace
from statistics import median

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from stablevm import cli
from stablevm.bank import ClassBank
from stablevm.profiling.config import OBJECTIVES
from stablevm.profiling.measure import Measurement, fill, operations_per_image
from stablevm.profiling.random_data import IMAGENET_IMAGES, RandomDataset
from stablevm.profiling.results import PHASES, Results
from stablevm.training.engine import Engine
from stablevm.training.launch import make_accelerator
from tests.helpers import runs

TINY = (
    "--model=SiT-XXS/2",
    "--bank-capacity-per-class=4",
    "--batch-size=4",
    "--steps=5",
    "--warmup=1",
    "--mixed-precision=no",
    "--enc-type=vit_tiny_patch16_224",
    "--encoder-depth=1",
)
RANDOM = ("--resolution=32", "--num-classes=10")


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)


def run(folder, *options):
    return cli.main(["benchmark", f"--output-dir={folder}", *TINY, *options])


def test_all_trainings_on_random_data(tmp_path, capsys):
    assert run(tmp_path, *RANDOM) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "steps.json").read_text())
    assert [row["name"] for row in found["measurements"]] == list(OBJECTIVES)
    for row in found["measurements"]:
        aligned = "repa" in row["name"]
        assert set(row["seconds"]) == set(PHASES) - (set() if aligned else {"encoder"})
        assert all(value >= 0 for value in row["seconds"].values()) and len(row["step_seconds"]) == 5
        assert row["images_per_second"] == pytest.approx(4 / median(row["step_seconds"])) and row["parts"] == 1
        assert f"{row['images_per_second']:.3g}" in said
    plain, _, repa, ours = found["measurements"]
    assert repa["operations"] == ours["operations"] > plain["operations"]
    assert said.count("stablevm draws") == 2
    assert Image.open(tmp_path / "steps.png").size[0] == 2000


def test_a_data_set_of_the_users(tmp_path, capsys):
    data = runs.write_data(tmp_path / "data")
    assert run(tmp_path / "out", "--objectives=stablevm+va-repa", f"--data-dir={data}", "--enc-type=digits") == 0
    found, said = json.loads((tmp_path / "out" / "steps.json").read_text()), capsys.readouterr().out
    (row,) = found["measurements"]
    assert row["seconds"]["encoder"] > 0 and "stablevm draws" not in said
    assert "epochs of 40" in said and found["options"]["data_dir"] == str(data)


def test_more_accumulation_where_memory_is_short(tmp_path, capsys, monkeypatch):
    step = Engine.train_step

    def short_of_memory(engine, *arguments):
        if engine.config.gradient_accumulation_steps < 4:
            raise torch.OutOfMemoryError("no room")
        return step(engine, *arguments)

    monkeypatch.setattr(Engine, "train_step", short_of_memory)
    assert run(tmp_path / "auto", *RANDOM, "--objectives=si") == 0
    assert json.loads((tmp_path / "auto" / "steps.json").read_text())["measurements"][0]["parts"] == 4
    assert "si: out of memory; trying 2 accumulation steps" in capsys.readouterr().err
    AcceleratorState._reset_state(reset_partial_state=True)
    assert run(tmp_path / "given", *RANDOM, "--objectives=si", "--gradient-accumulation-steps=2") == 2
    assert "--batch-size 4: si does not fit into the GPU's memory; lower it, or give" in capsys.readouterr().err


def test_what_was_measured_before_an_error_is_reported(tmp_path, capsys, monkeypatch):
    step = Engine.train_step

    def interrupted(engine, *arguments):
        if engine.config.loss_type == "stablevm":
            raise KeyboardInterrupt
        return step(engine, *arguments)

    monkeypatch.setattr(Engine, "train_step", interrupted)
    assert run(tmp_path / "out", *RANDOM) == 130
    assert [row["name"] for row in json.loads((tmp_path / "out" / "steps.json").read_text())["measurements"]] == ["si"]
    captured = capsys.readouterr()
    assert "images/s" in captured.out and "interrupted; run the same command again to start over" in captured.err


def test_options_without_effect_are_reported(tmp_path, capsys):
    assert run(tmp_path, *RANDOM, "--objectives=si") == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert told == [
        f"warning: {option} has no effect with --objectives si"
        for option in ("--enc-type vit_tiny_patch16_224", "--encoder-depth 1", "--bank-capacity-per-class 4")
    ]


@pytest.mark.parametrize(
    "option, message",
    [
        ("--objectives=si,cfm", "--objectives si,cfm: expected some of si, stablevm, si+repa"),
        ("--objectives=si,si", "--objectives si,si: one is named twice"),
        ("--steps=7", "--steps 7: expected a positive multiple of 5"),
        ("--resolution=40", "--resolution 40: expected a positive multiple of 16"),
        ("--encoder-depth=3", "--encoder-depth 3: SiT-XXS/2 has 2 blocks; give 1 to 2"),
        ("--enc-type=nobody", "--enc-type nobody: expected one of"),
        ("--enc-type=digits", "--enc-type digits: it gives"),
        ("--data-dir=nowhere", "--num-classes 10: expected none with --data-dir"),
        (f"--output-dir={__file__}", "expected a folder"),
        (
            "--gradient-accumulation-steps=3",
            "--batch-size 4: expected a multiple of 1 processes x 3 accumulation steps",
        ),
    ],
)
def test_mistakes_are_reported_before_anything_is_measured(tmp_path, capsys, option, message):
    assert run(tmp_path / "out", *RANDOM, option) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert not (tmp_path / "out").exists()


def test_operations_are_those_of_the_papers(tmp_path):
    """DiT-S/2 has 6.06 billion multiplications and additions per image (Peebles and Xie, 2023, table 4)."""
    config = runs.config(tmp_path, model="SiT-S/2", loss_type="si")
    engine = Engine(config, RandomDataset(1000, 256), make_accelerator(config), [])
    assert operations_per_image(engine) == pytest.approx(3 * 2 * 6.06e9, rel=0.01)


def test_the_bank_is_full_of_rows_of_the_right_class():
    data = RandomDataset(num_classes=7, resolution=16)
    bank = ClassBank(7, 5, (2,))
    fill(bank, data.labels())
    assert bank.counts.tolist() == [5] * 7
    assert (data.labels()[bank.ids] == torch.arange(7)[:, None]).all()
    assert len(bank.ids.unique()) == 35


def test_the_report_does_its_sums():
    def measured(name, draw):
        seconds = {"draw": draw, "forward": 0.1, "backward": 0.3}
        return Measurement(name, 40, 1, seconds, [sum(seconds.values())], gpu_gib=1.5, host_gib=2.0, operations=1e10)

    plain, ours = measured("si", 0.1), measured("stablevm", 0.105)
    results = Results("a machine", "a network", {}, IMAGENET_IMAGES, product_rate=4e12, measurements=[plain, ours])
    assert plain.images_per_second == pytest.approx(80) and plain.rate == pytest.approx(8e11)
    hours = 80 * IMAGENET_IMAGES / 80 / 3600
    first = next(line for line in results.table().splitlines() if line.startswith("si "))
    assert first.split() == ["si", "80", "500.0", "0.8", "20%", "1.50", "2.00", f"{hours:.0f}", f"{10 * hours:,.0f}"]
    assert results.extra(plain, ours) == pytest.approx(0.01)
    fast = replace(plain, batch_size=4000, operations=1e11)
    row = Results("", "", {}, 1, 1e15, [fast]).table().splitlines()[5]
    assert row.split()[1:5] == ["8,000", "500.0", "800", "80%"]
    assert "stablevm draws 5.00 ms longer than si: 1.00% of its step" in results.table()
