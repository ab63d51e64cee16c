"""Published files that are imported, and the difference between their outputs and those of our networks."""

import argparse
from collections import OrderedDict

import torch

from stablevm.integrations.config import ImportConfig
from stablevm.integrations.importing import import_checkpoint
from stablevm.networks.snapshot import load_card, load_model
from tests.helpers import published as pub

TOLD = {"path_type": "linear", "prediction": "v"}
REPA_ARGS = {"path_type": "cosine", "prediction": "v", "encoder_depth": 1, "exp_name": "x", "resolution": 64}


def training_file(network, args, **more):
    """As the projects' training scripts write it; the model's weights are others than the average's."""
    other = OrderedDict((key, 0.9 * value) for key, value in network.state_dict().items())
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]}
    return {"model": other, "ema": network.state_dict(), "opt": optimizer, "args": argparse.Namespace(**args), **more}


def imported(content, folder, **options):
    torch.save(content, folder / "published.pt")
    import_checkpoint(ImportConfig(folder / "published.pt", folder / "ours", **options))
    card = load_card(folder / "ours")
    return card, load_model(folder / "ours", card)


def inputs():
    stream = torch.Generator().manual_seed(3)
    x = torch.randn(6, pub.CHANNELS, pub.SIDE, pub.SIDE, generator=stream)
    t = torch.cat([torch.tensor([0.0, 1.0]), torch.rand(4, generator=stream)])
    return x, t, torch.tensor([0, 1, 2, 3, 4, pub.CLASSES])


def difference(network, model, *, reverse):
    """The largest, over the size of the output."""
    x, t, y = inputs()
    expected = -network(x, 1 - t, y) if reverse else network(x, t, y)
    return ((model(x, t, y) - expected).abs().max() / expected.std()).item()
