"""The posterior mean over references: stablevm's kernel against the plain broadcast formula, in one process.

python benchmarks/posterior.py [--samples 64] [--references 256] [--dimensions 4096]
"""

from dataclasses import dataclass

import torch
import tyro
from common import describe_machine, peak_bytes, seconds
from torch import Tensor

from stablevm.interpolant import LINEAR
from stablevm.posterior import posterior


@dataclass(frozen=True)
class Sizes:
    """Compare both forms in three arrangements of the references."""

    samples: int = 64
    references: int = 256
    dimensions: int = 4096
    classes: int = 10


def broadcast(x0: Tensor, noise: Tensor, t: Tensor, references: Tensor) -> Tensor:
    """`softmax(-|x_t - alpha b|^2 / (2 sigma^2))` weights over (B or 1, n, d) references, written down plainly."""
    at = LINEAR.coefficients(t[:, None])
    x_t = at.alpha * x0 + at.sigma * noise
    logits = -(x_t[:, None] - at.alpha[..., None] * references).square().sum(-1) / (2 * at.sigma.square())
    return (logits.softmax(-1)[..., None] * references).sum(1)


def main(sizes: Sizes) -> None:
    stream = torch.Generator().manual_seed(0)
    rows, n, d = sizes.samples, sizes.references, sizes.dimensions
    bank = torch.randn(sizes.classes, n, d, generator=stream)
    own = torch.randn(rows, n, d, generator=stream)
    groups = torch.arange(rows) % sizes.classes
    slot = torch.arange(rows) % n
    keep = slot[:, None] != torch.arange(n)
    noise, t = torch.randn(rows, d, generator=stream), torch.rand(rows, generator=stream) * 0.98 + 0.01
    arrangements = {
        "one set for all samples": (bank[0][slot], bank[0], None, lambda: bank[:1]),
        f"bank of {sizes.classes} classes": (bank[groups, slot], bank, groups, lambda: bank[groups]),
        "one set per sample": (own[torch.arange(rows), slot], own, None, lambda: own),
    }
    print(f"{rows} samples x {n} references x {d} values, float32; {describe_machine()}")
    print(f"{'references':26}{'broadcast':>20}{'stablevm':>20}{'faster':>9}{'memory':>9}{'largest difference':>20}")
    for name, (x0, references, chosen, plain) in arrangements.items():
        ours = lambda: posterior(LINEAR, x0, noise, t, references, groups=chosen, keep=keep)  # noqa: B023, E731
        theirs = lambda: broadcast(x0, noise, t, plain())  # noqa: B023, E731
        time_ours, time_theirs = seconds(ours), seconds(theirs)
        memory_ours, memory_theirs = peak_bytes(ours), peak_bytes(theirs)
        difference = (x0 - ours().offset - theirs()).abs().max().item()
        print(
            f"{name:26}{time_theirs * 1e3:9.1f} ms{memory_theirs / 2**20:5.0f} MiB{time_ours * 1e3:9.1f} ms"
            f"{memory_ours / 2**20:5.0f} MiB{time_theirs / time_ours:8.1f}x{memory_ours / memory_theirs:9.3f}"
            f"{difference:20.1e}"
        )


if __name__ == "__main__":
    main(tyro.cli(Sizes))
