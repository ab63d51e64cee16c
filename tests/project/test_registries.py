"""What is registered by a word: each word that an option takes leads to something, and nothing else does."""

import json
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest

from stablevm.networks.registry import NETWORKS, build_network, network_config
from stablevm.networks.snapshot import load_card, load_model
from stablevm.support.errors import UserError
from stablevm.training.config import TrainConfig
from stablevm.training.objectives import OBJECTIVES
from tests.helpers.checkpoints import save_checkpoint, tiny_card


def test_every_loss_type_has_an_objective():
    assert tuple(OBJECTIVES) == get_args(get_type_hints(TrainConfig)["loss_type"])


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.config.kind)
def test_every_name_of_a_network_is_built_by_its_kind(network):
    assert network.config.__dataclass_params__.frozen and "kind" not in {field.name for field in fields(network.config)}
    config = network_config(network.names[-1], input_size=8, in_channels=1, num_classes=2)
    assert type(config) is network.config
    model = build_network(config)
    assert model.config == config and network.config.label_table in model.state_dict()
    assert len(model.state_dict()[network.config.label_table]) == 3


def test_a_name_that_no_network_has():
    with pytest.raises(UserError, match=r"model DiT-B: expected one of SiT-XL/1, .*JiT-XXS/4; the nearest is SiT-B/8$"):
        network_config("DiT-B", input_size=8, in_channels=1, num_classes=2)


def test_a_card_names_its_kind_of_network_and_one_without_is_a_sit(tmp_path):
    card = tiny_card()
    path = save_checkpoint(tmp_path, card) / "model.json"
    written = json.loads(path.read_text())
    assert written["model"]["kind"] == "sit" and load_card(tmp_path) == card
    del written["model"]["kind"]  # as version 0.1 wrote it
    path.write_text(json.dumps(written))
    assert load_card(tmp_path) == card
    assert type(load_model(tmp_path, card)).__name__ == "SiT"
    for other, shown in (("unet", '"unet"'), (3, "3"), ([], "")):
        path.write_text(json.dumps(written | {"model": written["model"] | {"kind": other}}))
        with pytest.raises(UserError, match=rf"model.kind: .*{shown}.*, expected one of sit, lightning_dit, jit; "):
            load_card(tmp_path)
