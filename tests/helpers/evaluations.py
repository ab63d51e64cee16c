"""Images to evaluate, and what an evaluation says of bad ones."""

import pytest
from PIL import Image

from stablevm.evaluation.evaluate import evaluate
from stablevm.support.errors import UserError
from tests.helpers import inception
from tests.helpers.data_sets import one_line

COUNT, SIDE = 26, 12
REAL, FAKE = (inception.smooth_images(COUNT, SIDE, seed).numpy() for seed in (1, 2))


def refusal(config):
    results = config.samples.with_suffix(".json")
    before = results.read_bytes() if results.exists() else None
    with pytest.raises(UserError) as error:
        evaluate(config)
    assert (results.read_bytes() if results.exists() else None) == before
    return one_line(error)


def save_images(folder, images):
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:02d}.png")
    return folder
