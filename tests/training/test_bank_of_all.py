"""`--bank-capacity-per-class all`: every latent is a reference, for classes of any size; no checkpoint holds it."""

import re
from collections import namedtuple
from dataclasses import replace

import psutil
import pytest
import torch

from stablevm import cli
from stablevm.data.opening import open_dataset
from stablevm.support import rng
from stablevm.support.errors import UserError
from stablevm.training.engine import model_config
from stablevm.training.objectives import make_bank, make_objective, prefill
from tests.helpers import runs

ALL = {"loss_type": "stablevm", "bank_capacity_per_class": "all"}
COUNTS = [20, 3, 17]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("all")
    labels = torch.arange(3).repeat_interleave(torch.tensor(COUNTS))
    runs.write_data(folder / "data", labels[torch.randperm(40, generator=torch.Generator().manual_seed(6))])
    runs.write_encoder(folder / "encoder.safetensors")
    return folder


def filled(root, **options):
    config = runs.config(root, **(ALL | options))
    dataset = open_dataset(config.data_dir)
    objective = make_objective(config, model_config(config, dataset), dataset, torch.device("cpu"))
    prefill(objective.bank, dataset, config, show=True)
    return objective, dataset


def test_every_latent_is_held_once(root):
    objective, dataset = filled(root)
    bank, labels = objective.bank, dataset.labels()
    assert bank.counts.tolist() == COUNTS and bank.capacity == 20
    for label, count in enumerate(COUNTS):
        assert bank.ids[label, :count].sort().values.equal((labels == label).nonzero().squeeze(1))
    means = dataset.latent.means(dataset.moments(range(40)))
    gap = bank.entries[0] - means[bank.ids[0]]
    assert 0.003 < gap.std() < 0.03, "draws of deviation 0.01, not the means"


def test_targets_are_those_of_the_whole_class(root):
    """Against the softmax over all of the anchor's class, written down plainly."""
    objective, _ = filled(root, cfg_prob=0.0)
    streams = rng.RowGenerators.for_keys("draw", positions=range(30))
    draw = objective.draw(
        torch.empty(30, 1, 8, 8), torch.zeros(30, dtype=torch.int64), streams,
        slots=torch.full((30,), objective.bank.discarded_slot), pool_generator=rng.generator("pool"),
    )  # fmt: skip
    for i in range(30):
        label, t = draw.labels[i], draw.t[i].double()
        members = objective.bank.entries[label, : COUNTS[label]].flatten(1).double()
        x_t = draw.x_t[i].flatten().double()
        weights = (-(x_t - (1 - t) * members).square().sum(1) / (2 * t**2)).softmax(0)
        mean = weights @ members
        expected = (x_t - (1 - t) * mean) / t - mean
        torch.testing.assert_close(draw.target[i].flatten().double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("anchors", ["bank", "batch"])
def test_a_resumed_run_fills_it_again(anchors, root):
    whole = runs.run(runs.config(root, f"whole-{anchors}", **ALL, bank_anchors=anchors))
    settings = runs.config(root, f"parts-{anchors}", **ALL, bank_anchors=anchors)
    runs.run(replace(settings, max_train_steps=3))
    folder = runs.run(settings)
    assert runs.losses(folder) == pytest.approx(runs.losses(whole), abs=1e-6)
    assert len(list(folder.rglob("ema.safetensors"))) == 2 and not list(folder.rglob("bank.safetensors"))


def test_the_option_changes_the_run(root):
    kinds = [{"bank_anchors": "bank"}, {"bank_anchors": "batch"}, {"bank_capacity_per_class": 20}]
    found = [runs.losses(runs.run(runs.config(root, f"kind-{n}", **(ALL | kind)))) for n, kind in enumerate(kinds)]
    assert all(found.count(losses) == 1 for losses in found)


def test_with_alignment(root):
    assert len(runs.losses(runs.run(runs.config(root, "aligned", **ALL, **runs.ALIGNED)))) == 6


def test_more_than_the_machine_holds_is_refused_with_the_numbers(root, monkeypatch):
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(80_000_000_000))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    config = runs.config(root, **ALL)
    counts, shape = torch.full((1000,), 1300), (4, 32, 32)
    expected = (
        "--bank-capacity-per-class all: 1,000 classes of up to 1,300 latents take 21.30 GB in each of 4 processes, "
        "this machine has 80.00 GB free; give 1220 or less"
    )
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        make_bank(config, counts, shape, torch.device("cpu"))


def test_the_command_takes_the_word(root, capsys):
    settings = runs.config(root, "word", **ALL, max_train_steps=1)
    runs.AcceleratorState._reset_state(True)
    assert cli.train(runs.as_arguments(settings)) == 0
    told = "all the data, 3 classes x 20 slots, 0.02 MB in each process, in the host's memory; anchors from the bank"
    assert f"bank       {told}\n" in capsys.readouterr().out
    assert cli.train([*runs.as_arguments(settings), "--bank-capacity-per-class=every"]) == 2
    assert "--bank-capacity-per-class every: expected" in capsys.readouterr().err
