"""How much StableVM averages where the network sees the encoder's class token too: effective sample sizes, by time.

References are weighed by image and token (docs/training.md), so fewer of them count. Draws of all digits against a bank
of all digits, with the token of the digits' extractor and without; no network is trained.

python benchmarks/cls_token.py FOLDER/train EXTRACTOR.safetensors [--draws 3]
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from stablevm.bank import ClassBank
from stablevm.data.opening import open_dataset
from stablevm.networks.encoders import load_encoder
from stablevm.networks.joint_state import joined
from stablevm.objective import StableVM

PARTS = 5  # of the times, whose means are shown
CHUNK = 256


@dataclass(frozen=True)
class References:
    """Compare effective sample sizes with and without a class token."""

    data: Annotated[Path, tyro.conf.Positional]
    """The digits that `stablevm prepare digits` wrote: FOLDER/train."""
    weights: Annotated[Path, tyro.conf.Positional]
    """The extractor that `stablevm extractor` trained."""
    draws: int = 3
    """Draws of all the data, with seeds from 0."""


def main(options: References) -> None:
    data = open_dataset(options.data)
    encoder = load_encoder("digits", grid_size=None, weights=options.weights, device="cpu")
    rows = torch.arange(len(data))
    latents, labels = data.latent.means(data.moments(rows)), data.labels()
    tokens = torch.cat([encoder.pooled(data.images(part)) for part in rows.split(CHUNK)])
    print(f"{len(data):,} samples, {options.draws} draws of each; tokens {tokens.mean():.2f} +- {tokens.std():.2f}")
    print(
        f"{'times':12}" + "".join(f"{f'{part / PARTS:.1f} to {(part + 1) / PARTS:.1f}':>18}" for part in range(PARTS))
    )
    for name, states in (("image", latents), ("with token", joined(latents, tokens))):
        t, sizes = drawn(states, labels, options.draws)
        parts = (t * PARTS).long().clamp(max=PARTS - 1)
        print(f"{name:12}" + "".join(f"{shown(sizes[parts == part]):>18}" for part in range(PARTS)))


def drawn(states: Tensor, labels: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Times and effective sample sizes (draws * N,)."""
    rows = torch.arange(len(states))
    bank = ClassBank(int(labels.max()) + 1, int(torch.bincount(labels).max()), tuple(states.shape[1:]))
    slots = bank.insert(states, labels, rows)
    objective = StableVM(bank, anchors="batch")
    found = [
        objective.draw(states, labels, torch.Generator().manual_seed(seed), ids=rows, slots=slots)
        for seed in range(draws)
    ]
    return torch.cat([draw.t for draw in found]), torch.cat([draw.ess for draw in found])


def shown(sizes: Tensor) -> str:
    return f"{sizes.mean():.2f} +- {sizes.std() / len(sizes) ** 0.5:.2f}"


if __name__ == "__main__":
    main(tyro.cli(References))
