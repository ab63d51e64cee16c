"""What the tests of preparation share: a tiny source, and a tiny autoencoder."""

import pytest

from tests.helpers.preparing import GOOD
from tests.helpers.sources import write_source
from tests.helpers.tiny_vae import save_tiny_vae


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"), images=GOOD, classes=4, shortest=40, longest=90)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_tiny_vae(tmp_path_factory.mktemp("vae"))
