"""The demo without its page: what the controls request, and the command below a picture, which makes it again."""

import shlex

import numpy as np
import pytest
import torch
from PIL import Image

from stablevm import cli
from stablevm.demo.config import DemoConfig
from stablevm.demo.studio import ALL_CLASSES, BATCH, NO_CLASS, SAMPLERS, Controls, Studio
from stablevm.support.errors import UserError
from tests.helpers.checkpoints import save_checkpoint, tiny_card


@pytest.fixture
def studio(tmp_path):
    """A function that opens a checkpoint with this label dropout, in a folder whose name needs quotes."""

    def open_checkpoint(label_dropout=0.1):
        folder = save_checkpoint(tmp_path / "a run's", tiny_card(label_dropout=label_dropout))
        return Studio(DemoConfig(ckpt=folder), torch.device("cpu"))

    return open_checkpoint


@pytest.mark.parametrize(
    "controls",
    [
        Controls(steps=3, guidance=1.5, guidance_high=0.6, images=2 * BATCH + 4, seed=3),
        Controls("SDE, stochastic Heun", steps=4, classes="2", images=3),
        Controls("StableVS, Euler", steps=5, guidance=2, classes=NO_CLASS, images=2),
        Controls("ODE, dopri5 (finds its own steps)", images=4),
    ],
    ids=lambda controls: controls.sampler,
)
def test_the_command_makes_the_picture_again(studio, controls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = studio().generate(controls)
    program, command, *options = shlex.split(made.command)
    assert (program, command) == ("stablevm", "generate") and cli.generate(options) == 0
    (picture,) = tmp_path.glob("samples/*.png")
    again = np.asarray(Image.open(picture)).astype(int)
    assert again.shape == made.picture.shape and np.abs(again - made.picture).max() <= 1  # rounding


def test_every_sampler_makes_images(studio):
    opened = studio()
    for sampler in SAMPLERS:
        assert len(set(opened.generate(Controls(sampler, steps=4, images=4)).picture.ravel())) > 2


def test_a_runs_folder_stands_for_its_newest_checkpoint(tmp_path):
    for step in ("5", "10"):
        save_checkpoint(tmp_path / "checkpoints" / step, tiny_card())
    studio = Studio(DemoConfig(ckpt=tmp_path), torch.device("cpu"))
    assert studio.request(Controls(steps=2)).ckpt == tmp_path / "checkpoints" / "10"


def test_progress_grows_to_one(studio):
    told = []
    studio().generate(Controls("ODE, Euler", steps=5, images=2 * BATCH), told.append)
    assert told == sorted(told) and told[-1] == 1 and len(told) > 10


def test_what_was_not_trained_is_not_offered(studio):
    both, no_null, no_classes = studio(), studio(0.0), studio(1.0)
    assert both.can_guide and not no_null.can_guide and not no_classes.can_guide
    values = [[value for _, value in each.class_choices()] for each in (both, no_null, no_classes)]
    classes = ["0", "1", "2", "3"]
    assert values == [[ALL_CLASSES, *classes, NO_CLASS], [ALL_CLASSES, *classes], [NO_CLASS]]


def test_refusals(studio):
    with pytest.raises(UserError, match=r"^sampler 'DDIM': expected one of ODE, Euler; "):
        studio().generate(Controls("DDIM"))
    with pytest.raises(UserError, match="--num-steps 1"):
        studio().generate(Controls("SDE, Euler-Maruyama", steps=1))
    with pytest.raises(UserError, match=r"--cfg-scale 1\.5"):
        studio(0.0).generate(Controls(guidance=1.5))
    with pytest.raises(UserError, match="--port 0: expected a number from 1 to 65535"):
        DemoConfig(ckpt="x", port=0).validate()
