"""Beginning with another checkpoint's weights: what is taken over, what starts from scratch, and what does not fit."""

import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from stablevm import cli
from stablevm.networks.sit_config import SiTConfig
from stablevm.networks.snapshot import save
from stablevm.support.errors import UserError
from stablevm.training.weights import initial_weights
from tests.helpers import runs
from tests.helpers.checkpoints import random_weights, tiny_card
from tests.helpers.data_sets import one_line

LABEL_TABLE = SiTConfig.label_table
TWO_CLASSES = (torch.arange(20) % 2, ("left", "right"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    runs.write_data(folder / "data")
    runs.write_data(folder / "two", *TWO_CLASSES)
    runs.write_encoder(folder / "encoder.safetensors")
    return folder


@pytest.fixture(scope="module")
def earlier(root):
    """A checkpoint of three classes, without projectors."""
    return runs.run(runs.config(root, "earlier", max_train_steps=2)) / "checkpoints" / "0000002"


def tuned(root, name, earlier, **options):
    """Both sets of weights after one step at a rate near zero, which are those that the run started with."""
    settings = runs.config(root, name, init_from=earlier, learning_rate=1e-30, max_train_steps=1, **options)
    folder = runs.run(settings) / "checkpoints" / "0000001"
    return {part: load_file(folder / f"{part}.safetensors") for part in ("ema", "model")}


def same(value, expected):
    return torch.allclose(value, expected, rtol=1e-6, atol=1e-25)


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_begins_with_the_weights_of_the_checkpoint(weights, root, earlier):
    start = load_file(earlier / f"{weights}.safetensors")
    for part in tuned(root, f"same-{weights}", earlier, init_weights=weights).values():
        assert part.keys() == start.keys()
        assert all(same(value, start[name]) for name, value in part.items())


def test_other_classes_and_new_projectors_start_from_scratch(root, earlier, capfd):
    start = load_file(earlier / "ema.safetensors")
    found = tuned(root, "two", earlier, data_dir=root / "two", seed=5, **runs.ALIGNED)["ema"]
    for name in start.keys() - {LABEL_TABLE}:
        assert same(found[name], start[name]), name
    assert found[LABEL_TABLE].shape == (3, 64) and same(found[LABEL_TABLE][2], start[LABEL_TABLE][3])
    assert not same(found[LABEL_TABLE][:2], start[LABEL_TABLE][:2])
    assert all(found[name].std() > 0 for name in found if re.match(r"projectors.*weight", name))
    said = capfd.readouterr().out
    assert (
        "labels start from scratch: 2 classes, none of them among the 3 by name; the null class is taken over" in said
    )
    assert "projectors start from scratch: the checkpoint has none" in said


def test_fine_tuning_is_deterministic_and_resumes_without_the_checkpoint(root, earlier, tmp_path):
    shutil.copytree(earlier, tmp_path / "copy")
    options = {"init_from": tmp_path / "copy", "data_dir": root / "two", "loss_type": "stablevm"}
    whole = runs.run(runs.config(root, "tuned-whole", **options))
    assert runs.losses(whole) != runs.losses(runs.run(runs.config(root, "random", **(options | {"init_from": None}))))
    settings = runs.config(root, "tuned-parts", **options)
    runs.run(replace(settings, max_train_steps=3))
    shutil.rmtree(tmp_path / "copy")
    assert runs.losses(runs.run(settings)) == pytest.approx(runs.losses(whole), abs=1e-6)


ALIGNED = {"projector_dims": (5, 6), "projector_kind": "mlp", "encoder_depth": 1}


@pytest.mark.parametrize("change, kept", [({}, True), ({"projector_dims": (5,)}, False), ({"encoder_depth": 2}, False)])
def test_projectors_are_taken_over_where_they_fit(change, kept, tmp_path):
    save(tmp_path, theirs := tiny_card(**ALIGNED), {"ema": random_weights(theirs, 1)})
    ours = tiny_card(**(ALIGNED | change))
    fresh = random_weights(ours, 2)
    start, lines = initial_weights(tmp_path, "ema", ours, fresh)
    name = "projectors.0.0.weight"
    assert torch.equal(start[name], load_file(tmp_path / "ema.safetensors")[name] if kept else fresh[name])
    assert start.keys() == fresh.keys() and ("projectors start from scratch" in " ".join(lines)) == (not kept)


CARD = tiny_card()
DIFFERENCES = {
    "depth is 2, this run's is 3": replace(CARD, model=replace(CARD.model, depth=3)),
    "hidden size is 64, this run's is 128": replace(CARD, model=replace(CARD.model, hidden_size=128)),
    "patch size is 4, this run's is 2": replace(CARD, model=replace(CARD.model, patch_size=2)),
    "qk norm is False, this run's is True": replace(CARD, model=replace(CARD.model, qk_norm=True)),
    "in channels is 1, this run's is 3": replace(
        CARD, model=replace(CARD.model, in_channels=3), latent=replace(CARD.latent, shape=(3, 8, 8))
    ),
    "latent's scale is 1.0, this run's is 0.5": replace(CARD, latent=replace(CARD.latent, scale=0.5)),
    "path type is linear, this run's is cosine": replace(CARD, path_type="cosine"),
    "prediction is v, this run's is x": replace(CARD, prediction="x"),
}


@pytest.mark.parametrize("expected", DIFFERENCES)
def test_other_differences_are_refused(expected, tmp_path):
    save(tmp_path, CARD, {"ema": random_weights(CARD, 1)})
    with pytest.raises(UserError, match=f"--init-from .*: its {expected}; give") as error:
        initial_weights(tmp_path, "ema", DIFFERENCES[expected], {})
    one_line(error)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"init_from": "nowhere"}, "nowhere: no such folder; give that of a checkpoint"),
        ({"path_type": "cosine"}, "its path type is linear"),
    ],
)
def test_a_refused_start_writes_nothing(options, expected, root, earlier, capsys):
    settings = runs.config(root, "refused", **({"init_from": earlier} | options))
    runs.AcceleratorState._reset_state(True)
    assert cli.train(runs.as_arguments(settings)) == 2
    assert expected in capsys.readouterr().err and not settings.folder.exists()


def test_another_start_is_another_run(root, earlier, capsys):
    settings = runs.config(root, "earlier", max_train_steps=2, init_from=earlier)
    runs.AcceleratorState._reset_state(True)
    assert cli.train(runs.as_arguments(settings)) == 2
    assert "no --init-from" in capsys.readouterr().err


def begun(theirs, ours):
    """The cards of a checkpoint and of a run that begins with it, of classes of these names."""
    known = replace(tiny_card(num_classes=len(theirs)), class_names=theirs)
    card = replace(tiny_card(num_classes=len(ours)), class_names=ours)
    return known, card


@pytest.mark.parametrize(
    ("theirs", "ours", "rows", "told"),
    [
        (("cat", "dog", "owl"), ("ant", "cat", "dog"), {1: 0, 2: 1},
         "labels: taken over by name 2 of 3 (cat, dog); from scratch 1 of 3 (ant); the null class is taken over"),
        (("cat", "dog"), ("dog", "cat"), {0: 1, 1: 0}, "taken over by name 2 of 2 (dog, cat); the null class"),
        (("cat", "dog"), ("dog", "eel", "cat"), {0: 1, 2: 0}, "from scratch 1 of 3 (eel)"),
        (("cat", "cat", "dog"), ("cat", "dog"), {1: 2}, "taken over by name 1 of 2 (dog); from scratch 1 of 2 (cat)"),
        (("cat", "dog"), ("ant", "eel", "owl"), {}, "from scratch: 3 classes, none of them among the 2 by name"),
        (("0", "1"), ("cat", "dog"), {0: 0, 1: 1}, "taken over by their numbers: only one side names its classes"),
        (("0", "1"), ("cat", "dog", "owl"), {}, "labels start from scratch"),
        (("0", "1"), ("0", "1", "2"), {0: 0, 1: 1}, "taken over by name 2 of 3 (0, 1); from scratch 1 of 3 (2)"),
    ],
)  # fmt: skip
def test_rows_of_the_label_table_are_matched_by_class_name(theirs, ours, rows, told, tmp_path):
    known, card = begun(theirs, ours)
    save(tmp_path, known, {"ema": random_weights(known, 1)})
    found, fresh = random_weights(known, 1)[LABEL_TABLE], random_weights(card, 2)
    start, lines = initial_weights(tmp_path, "ema", card, fresh)
    assert any(told in line for line in lines), lines
    for label in range(len(ours)):
        expected = found[rows[label]] if label in rows else fresh[LABEL_TABLE][label]
        assert torch.equal(start[LABEL_TABLE][label], expected), label
    assert torch.equal(start[LABEL_TABLE][len(ours)], found[len(theirs)])


def test_the_same_names_need_no_line(tmp_path):
    known, card = begun(("cat", "dog"), ("cat", "dog"))
    save(tmp_path, known, {"ema": random_weights(known, 1)})
    start, lines = initial_weights(tmp_path, "ema", card, random_weights(card, 2))
    assert len(lines) == 1 and torch.equal(start[LABEL_TABLE], random_weights(known, 1)[LABEL_TABLE])
