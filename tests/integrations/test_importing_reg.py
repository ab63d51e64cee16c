"""REG's checkpoints: the imported network denoises image and class token as the published one does."""

import torch

from stablevm.networks.joint_state import joined, parted
from stablevm.sampling.guidance import sample_latents
from stablevm.solvers.settings import SamplerSettings
from stablevm.support.rng import RowGenerators, randn
from tests.helpers import published as pub
from tests.helpers.imported import REPA_ARGS, imported, inputs, training_file


def reg():
    return pub.built(pub.PublishedREG, projectors=(9,))


def test_the_imported_network_computes_the_same(tmp_path):
    network = reg()
    card, model = imported(training_file(network, REPA_ARGS, steps=400), tmp_path)
    assert (card.model.cls_token_dim, card.model.input_size, card.model.projector_dims) == (9, pub.SIDE, (9,))
    x, t, y = inputs()
    token = torch.randn(len(x), 9, generator=torch.Generator().manual_seed(3))
    expected = network(x, t, y, token)
    prediction, projected = model(joined(x, token), t, y, features=True)
    for found, wanted in zip(parted(prediction, x.shape[1:]), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(projected[0], network.projectors[0](network.seen[0]), rtol=1e-4, atol=1e-4)


def test_it_is_sampled_with_its_token(tmp_path):
    network, labels, steps = reg(), torch.tensor([1, 4]), 6
    card, model = imported(training_file(network, {**REPA_ARGS, "path_type": "linear"}, steps=400), tmp_path)
    noise = randn((2, 4 * 64 + 9), RowGenerators.for_keys("x", positions=range(2)))
    x, token = parted(noise, (4, 8, 8))
    for step in range(steps):
        image_v, token_v = network(x, torch.full((2,), 1 - step / steps), labels, token)
        x, token = x - image_v / steps, token - token_v / steps
    streams = RowGenerators.for_keys("x", positions=range(2))
    found, _ = sample_latents(model, card, labels, streams, SamplerSettings(mode="ode", num_steps=steps), "cpu")
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)
