"""A checkpoint's card and weights: what is wrong with them is one line that names the folder."""

import json
from dataclasses import replace

import pytest

from stablevm.networks.snapshot import CARD_FILE, load_card, load_model, save
from stablevm.support.errors import UserError
from tests.helpers.checkpoints import random_weights, save_checkpoint, tiny_card
from tests.helpers.data_sets import one_line


def without_latent(card):
    del card["latent"]


def with_an_unknown_field(card):
    card["model"]["colour"] = "blue"


def of_another_version(card):
    card["format_version"] = 99


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_latent, r"model\.json: latent: missing; use another checkpoint"),
        (with_an_unknown_field, r"model\.colour: unknown to this version"),
        (of_another_version, "format version 99, this program reads 1"),
    ],
)
def test_damaged_cards(damage, message, tmp_path):
    folder = save_checkpoint(tmp_path, tiny_card())
    card = json.loads((folder / CARD_FILE).read_text())
    damage(card)
    (folder / CARD_FILE).write_text(json.dumps(card))
    with pytest.raises(UserError, match=f"^checkpoint: {folder}/.*{message}") as error:
        load_card(folder)
    one_line(error)


def test_weights_that_are_not_finite(tmp_path):
    card = tiny_card()
    weights = random_weights(card, 0)
    weights["pos_embed"][0, 0, 0] = float("nan")
    save(tmp_path, card, {"ema": weights})
    with pytest.raises(
        UserError, match=r"ema.safetensors: .*pos_embed.* is not finite; use an earlier checkpoint"
    ) as error:
        load_model(tmp_path, card)
    one_line(error)


def test_weights_of_another_network(tmp_path):
    folder = save_checkpoint(tmp_path, tiny_card(num_classes=4))
    with pytest.raises(UserError, match=r"tensors of ema.safetensors do not fit the SiT-XXS/4") as error:
        load_model(folder, tiny_card(num_classes=5))
    one_line(error)


def test_a_card_tells_which_classes_were_trained(tmp_path):
    card = replace(tiny_card(num_classes=4), class_counts=(0, 7, 0, 2), label_dropout=0.1)
    assert load_card(save_checkpoint(tmp_path, card)) == card
    assert card.trained_classes == (1, 3)
    assert tiny_card(num_classes=4).trained_classes == (0, 1, 2, 3)  # not told


def test_cards_of_earlier_versions_are_read_and_resumed(tmp_path):
    card = replace(tiny_card(), class_counts=(5, 5, 5, 5), label_dropout=0.1)
    folder = save_checkpoint(tmp_path, card)
    values = json.loads((folder / CARD_FILE).read_text())
    del values["class_counts"], values["label_dropout"]
    (folder / CARD_FILE).write_text(json.dumps(values))
    old = load_card(folder)
    assert old.class_counts is None and old.label_dropout is None
    assert old.agrees_with(card) and card.agrees_with(old)
    assert not replace(card, class_counts=(5, 5, 5, 4)).agrees_with(card)
    assert not replace(old, prediction="x").agrees_with(card)


def test_the_label_dropout_is_recorded_and_unknown_in_old_cards(tmp_path):
    folder = save_checkpoint(tmp_path, tiny_card(label_dropout=0.0))
    known = load_card(folder)
    assert known.label_dropout == 0.0 and not known.null_is_trained
    values = json.loads((folder / CARD_FILE).read_text())
    del values["label_dropout"]
    (folder / CARD_FILE).write_text(json.dumps(values))
    old = load_card(folder)
    assert old.label_dropout is None and old.null_is_trained and old.classes_are_trained
    assert known.agrees_with(old) and known.agrees_with(replace(known, step=3))
    assert not known.agrees_with(replace(known, label_dropout=0.1)) and not known.agrees_with(tiny_card(num_classes=5))


def test_a_folder_of_runs_names_them(tmp_path):
    for name in ("dogs", "cats"):
        save_checkpoint(tmp_path / "exps" / name / "checkpoints" / "0000020", tiny_card())
    (tmp_path / "exps" / "empty").mkdir()
    for folder, fault in {tmp_path / "exps": "not a checkpoint", tmp_path / "exps" / "pats": "no such folder"}.items():
        with pytest.raises(UserError, match=fault) as error:
            load_card(folder)
        assert one_line(error).endswith(f"; the runs in {tmp_path / 'exps'} are cats, dogs")
    with pytest.raises(UserError, match=r"it holds no model\.json\)$"):
        load_card(tmp_path)
