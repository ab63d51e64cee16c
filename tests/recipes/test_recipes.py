"""Each recipe is read by the real parser, describes itself, and the measured one is the quickstart's."""

import dataclasses
import re
from pathlib import Path

import pytest

from stablevm import cli
from stablevm.commands.arguments import parse
from stablevm.commands.table import COMMANDS
from stablevm.networks.registry import network_config
from stablevm.quickstart import recipe
from stablevm.quickstart.config import QuickstartConfig
from stablevm.recipes.listing import FOLDER, about, recipe_names
from stablevm.training.config import TrainConfig
from stablevm.training.objectives import time_shift

BY_NAME = {command.name: command for command in COMMANDS}


def options(name, command, *words):
    return parse(BY_NAME[command], "test", ["--config", name, *words]).options


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_taken_by_its_commands_without_a_warning(name):
    train = options(name, "train", "--exp-name=run", "--data-dir=data", *weights(name))
    train.validate()
    assert train.warnings() == []
    generate = options(name, "generate", "--ckpt=x", *(["--guide-ckpt=y"] if name == "autoguidance" else []))
    generate.validate()
    assert [line for line in generate.warnings() if not line.startswith("--legacy guides the first three")] == []
    assert about(name).title and about(name).reaches and about(name).source


def weights(name):
    return ["--encoder-weights=x"] if name == "digits" else []


@pytest.mark.parametrize("name", ["lightningdit", "repa-e", "rae", "reg", "haste", "deltafm", "jit", "meanflow"])
def test_a_recipe_of_the_literature_says_that_it_was_not_run(name):
    what = about(name)
    assert what.note.startswith("Not run at this size.") and "not measured here" in what.source


@pytest.mark.parametrize(
    ("name", "shape"),
    [("lightningdit", (32, 16, 16)), ("repa-e", (32, 16, 16)), ("rae", (768, 16, 16)), ("jit", (3, 256, 256))],
)
def test_a_recipes_network_takes_its_latents(name, shape):
    train = options(name, "train", "--exp-name=run", "--data-dir=data")
    model = network_config(train.model, input_size=shape[1], in_channels=shape[0], num_classes=1000)
    assert model.grid_size == 16
    assert time_shift(train, shape) == pytest.approx(48**0.5 if name == "rae" else 1)


def test_the_published_command_is_a_recipe():
    train = options("stablevm-va-repa", "train", "--exp-name=run", "--data-dir=data")
    given = {
        "mixed_precision": "fp16", "allow_tf32": True, "loss_type": "stablevm", "prefill_bank_fully": True,
        "max_train_steps": 2_000_000, "use_proj_loss": True, "proj_weight_schedule": "sigmoid", "resolution": 256,
    }  # fmt: skip
    at_our_default = {"model": "SiT-XL/2", "bank_capacity_per_class": 256, "proj_k": 20.0, "proj_tau": 0.7}
    other = {
        field.name: getattr(train, field.name)
        for field in dataclasses.fields(train)
        if field.name not in ("exp_name", "data_dir") and getattr(train, field.name) != field.default
    }
    assert other == given
    assert all(getattr(train, name) == value for name, value in at_our_default.items())


def test_the_measured_recipe_is_the_quickstarts():
    quick = recipe.train_config(QuickstartConfig(steps=2000))
    own = {name: getattr(quick, name) for name in ("exp_name", "output_dir", "data_dir", "encoder_weights")}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in own.items()]
    assert options("digits", "train", *words) == quick
    quick = recipe.generate_config(QuickstartConfig(), Path("run"), recipe.HEADLINE)
    words = [f"--ckpt={quick.ckpt}", f"--sample-dir={quick.sample_dir}", f"--name={quick.name}"]
    assert options("digits", "generate", *words) == quick


def test_recipes_are_listed_and_shown(capsys):
    assert cli.main(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{name}\n" in f"\n{shown}" for name in recipe_names()) and "Source: Yu et al., 2024" in shown
    assert cli.main(["recipes", "repa"]) == 0
    assert capsys.readouterr().out == (FOLDER / "repa.toml").read_text()
    assert cli.main(["recipes", "reap"]) == 2
    assert re.search("recipe reap: expected one of autoguidance, .*; the nearest is repa", capsys.readouterr().err)


def test_a_recipe_trains(tmp_path, capsys):
    """The measured one, on two steps of the digits; without alignment, whose encoder is trained for a minute."""
    assert cli.main(["prepare", "digits", "-q", str(tmp_path / "data")]) == 0
    smaller = ["--max-train-steps=2", "--batch-size=4", "--bank-capacity-per-class=2", "--lr-warmup-steps=0"]
    words = [f"--data-dir={tmp_path / 'data'}", f"--output-dir={tmp_path}", "--exp-name=run", "--report-to=none"]
    assert cli.main(["train", "--config=digits", "--no-use-proj-loss", *words, *smaller]) == 0
    saved = TrainConfig.read(tmp_path / "run")
    assert (saved.weighting, saved.learning_rate, saved.max_train_steps) == ("logit_normal", 3e-3, 2)
    drawn = ["--num-fid-samples=4", "--num-steps=2", f"--sample-dir={tmp_path}", "--name=drawn"]
    assert cli.main(["generate", "--config=digits", f"--ckpt={tmp_path / 'run'}", *drawn]) == 0
    assert (tmp_path / "drawn.npz").is_file()
