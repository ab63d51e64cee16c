"""The posterior mean over a class's references: time, memory and error of stablevm and of three or four other methods.

python benchmarks/posterior.py [--samples 16 64 256] [--references 256 2048] [--dimensions 4096 16384] [--device auto]

    broadcast   the plain formula, over gathered (batch, references, dimensions) tensors
    per class   the same for the rows of each class in turn, as in the published code
    attention   torch's scaled_dot_product_attention for the rows of each class in turn, with the squares as its bias
    triton      the kernel of target_kernel.py, on a GPU (or with TRITON_INTERPRET=1, which says nothing about its time)

The error is the largest relative error of the velocity target over 16 rows at late times (where references other than
the anchor matter), compared with float64. The floor is the time to read the references of each class in the batch once,
at the speed with which memory is copied.
On an H200: --classes 1000 --memory-limit 40
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
import tyro
from common import (
    GIBIBYTE,
    MEBIBYTE,
    DeviceName,
    choose_device,
    copy_bandwidth,
    medians,
    peak_bytes,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stablevm.interpolant import LINEAR
from stablevm.posterior import posterior
from stablevm.support.machine import describe_machine

WIDE_VALUES = 2**31  # batch x references x dimensions from which there is only one repetition
CHECKED_ROWS = 16


@dataclass(frozen=True)
class Grid:
    """Compare the methods over all combinations of sizes."""

    samples: tuple[int, ...] = (16, 64, 256)
    references: tuple[int, ...] = (256, 2048)
    """Per class."""
    dimensions: tuple[int, ...] = (4096, 16384)
    dtypes: tuple[Literal["float32", "float16"], ...] = ("float32", "float16")
    """The dtypes of the bank's storage."""
    classes: int = 100
    """Classes in the bank, if the memory limit allows them."""
    memory_limit: float = 4.0
    """The limit in GiB for the bank, and for the allocations of a method; one that needs more is left out."""
    close: tuple[int, int] = (256, 4096)
    """References and dimensions of the comparison of errors with references that nearly coincide."""
    repeats: int = 5
    device: DeviceName = "auto"


@dataclass(frozen=True)
class Batch:
    """Rows whose anchors are entries of the bank (classes, n, d)."""

    bank: Tensor
    groups: Tensor
    slots: Tensor
    noise: Tensor
    t: Tensor

    @property
    def x0(self) -> Tensor:
        return self.bank[self.groups, self.slots].float()

    def x_t(self) -> Tensor:
        return LINEAR.interpolate(self.x0, self.noise, self.t)

    def rows_by_class(self) -> Iterator[tuple[int, Tensor]]:
        for group in self.groups.unique().tolist():
            yield group, (self.groups == group).nonzero().squeeze(1)

    def late(self, rows: int) -> "Batch":
        """The first rows, at times near 1."""
        t = torch.linspace(0.9, 0.999, rows, device=self.t.device)
        return Batch(self.bank, self.groups[:rows], self.slots[:rows], self.noise[:rows], t)


def draw_batch(bank: Tensor, rows: int, stream: torch.Generator, t: Tensor | None = None) -> Batch:
    """t: (rows,), uniform between 0.01 and 0.99 by default."""
    classes, n, d = bank.shape
    groups, slots = (torch.randint(most, (rows,), generator=stream, device=bank.device) for most in (classes, n))
    times = torch.rand(rows, generator=stream, device=bank.device) * 0.98 + 0.01 if t is None else t
    return Batch(bank, groups, slots, torch.randn(rows, d, generator=stream, device=bank.device), times)


def stablevm(batch: Batch) -> Tensor:
    keep = batch.slots[:, None] != torch.arange(batch.bank.shape[1], device=batch.bank.device)
    return posterior(LINEAR, batch.x0, batch.noise, batch.t, batch.bank, groups=batch.groups, keep=keep).offset


def _plain(x_t: Tensor, t: Tensor, references: Tensor) -> Tensor:
    """The posterior mean with weights softmax(-|x_t - alpha b|^2 / (2 sigma^2)) over references (B or 1, n, d)."""
    at = LINEAR.coefficients(t[:, None])
    logits = -(x_t[:, None] - at.alpha[..., None] * references).square().sum(-1) / (2 * at.sigma.square())
    return (logits.softmax(-1)[..., None] * references).sum(1)


def broadcast(batch: Batch) -> Tensor:
    return batch.x0 - _plain(batch.x_t(), batch.t, batch.bank[batch.groups].float())


def per_class(batch: Batch) -> Tensor:
    x_t = batch.x_t()
    mean = torch.empty_like(x_t)
    for group, rows in batch.rows_by_class():
        mean[rows] = _plain(x_t[rows], batch.t[rows], batch.bank[group].float()[None])
    return batch.x0 - mean


def attention(batch: Batch) -> Tensor:
    """Attention with the logits alpha / sigma^2 x_t.b - 0.5 (alpha / sigma)^2 |b|^2, which are not anchored."""
    x_t, at = batch.x_t(), LINEAR.coefficients(batch.t[:, None])
    mean = torch.empty_like(x_t)
    query, half_square = at.alpha / at.sigma.square() * x_t, 0.5 * (at.alpha / at.sigma).square()
    for group, rows in batch.rows_by_class():
        references = batch.bank[group].float()
        bias = -half_square[rows] * references.square().sum(-1)
        key = references[None, None]
        mean[rows] = scaled_dot_product_attention(query[rows][None, None], key, key, bias[None, None], scale=1.0)[0, 0]
    return batch.x0 - mean


# Each gives x0 - E[x0 | x_t], (rows, d).
WAYS: dict[str, Callable[[Batch], Tensor]] = {
    "stablevm": stablevm,
    "broadcast": broadcast,
    "per class": per_class,
    "attention": attention,
}
CHECKED = ("stablevm", "per class", "attention", "triton")  # broadcast is per class


def add_triton(device: torch.device) -> None:
    """Let the kernel take part where Triton is installed and can run."""
    try:
        import target_kernel
    except ImportError as error:
        print(f"without the kernel: {error}")
        return
    if not target_kernel.can_run(device):
        return

    def in_triton(batch: Batch) -> Tensor:
        keep = batch.slots[:, None] != torch.arange(batch.bank.shape[1], device=batch.bank.device)
        found = target_kernel.kernel_posterior(
            LINEAR, batch.x0, batch.noise, batch.t, batch.bank, groups=batch.groups, keep=keep
        )
        return found.offset

    WAYS["triton"] = in_triton


def exact(batch: Batch) -> Tensor:
    """The exact offset in float64, row by row."""
    offsets = []
    for group, x0, noise, t in zip(batch.groups.tolist(), batch.x0, batch.noise, batch.t, strict=True):
        references, at = batch.bank[group].double(), LINEAR.coefficients(t.double())
        x_t = at.alpha * x0.double() + at.sigma * noise.double()
        logits = -(x_t - at.alpha * references).square().sum(-1) / (2 * at.sigma.square())
        offsets.append(logits.softmax(-1) @ (x0.double() - references))
    return torch.stack(offsets)


def error(way: Callable[[Batch], Tensor], batch: Batch) -> float:
    gain = LINEAR.offset_gain(batch.t.double(), batch.noise)
    truth = LINEAR.velocity(batch.x0.double(), batch.noise.double(), batch.t.double()) + gain * exact(batch)
    difference = gain * (way(batch).double() - exact(batch))
    return (difference.norm(dim=1) / truth.norm(dim=1)).max().item()


def bytes_needed(name: str, batch: Batch) -> int:
    """Roughly the memory of a method, by its largest tensors; stablevm's and attention's are one class's references."""
    rows = {"broadcast": len(batch.t), "per class": int(batch.groups.bincount().max())}.get(name, 0)
    return 4 * 3 * rows * batch.bank[0].numel()


def measure(batch: Batch, grid: Grid, bandwidth: float, device: torch.device) -> str:
    """One row of the table."""
    rows, (classes, n, d) = len(batch.t), batch.bank.shape
    fits = {name: way for name, way in WAYS.items() if bytes_needed(name, batch) <= grid.memory_limit * GIBIBYTE}
    sides = {name: lambda way=way: way(batch) for name, way in fits.items()}
    times = medians(sides, repeats=1 if rows * n * d >= WIDE_VALUES else grid.repeats, device=device)
    memory = {name: peak_bytes(run, device) for name, run in sides.items()}
    few = batch.late(min(rows, CHECKED_ROWS))
    needed = len(batch.groups.unique()) * batch.bank[0].numel() * batch.bank.element_size()
    floor = needed / bandwidth
    ours = times["stablevm"]

    def ratios(found: dict[str, float] | dict[str, int]) -> str:
        others = [found[name] / found["stablevm"] if name in found else None for name in list(WAYS)[1:]]
        return "".join(f"{'-':>11}" if ratio is None else f"{ratio:10.1f}x" for ratio in others)

    return (
        f"{rows:5}{n:6}{d:7} {str(batch.bank.dtype)[6:]:8}{classes:7} |{ours * 1e3:9.1f}{ratios(times)} |"
        f"{memory['stablevm'] / MEBIBYTE:8.1f}{ratios(memory)} |"
        f"{''.join(f'{error(WAYS[name], few):11.0e}' for name in CHECKED if name in WAYS)} |"
        f"{needed / MEBIBYTE:9.0f}{floor * 1e3:9.2f}{ours / floor:7.1f}x"
    )


def compare(grid: Grid, device: torch.device) -> None:
    stream, bandwidth = torch.Generator(device).manual_seed(0), copy_bandwidth(device)
    print(f"{describe_machine(device)}; copies at {bandwidth / 1e9:,.0f} GB/s, read and written\n")
    others = "".join(f"{name:>11}" for name in list(WAYS)[1:])
    checked = "".join(f"{name:>11}" for name in CHECKED if name in WAYS)
    time_, memory, errors = f"{'time':>9}{'':{len(others)}}", f"{'memory':>8}{'':{len(others)}}", f"{'error':>11}"
    print(f"{'':34}|{time_} |{memory} |{errors:{len(checked)}} |{'rows':>9}{'floor':>9}")
    print(
        f"batch  refs   dims bank    classes |{'ms':>9}{others} |{'MiB':>8}{others} |"
        f"{checked} |{'MiB':>9}{'ms':>9}{'to it':>8}"
    )
    for d, n, dtype in product(grid.dimensions, grid.references, grid.dtypes):
        size = n * d * getattr(torch, dtype).itemsize
        classes = min(grid.classes, int(grid.memory_limit * GIBIBYTE / size))
        if not classes:
            print(f"{'':5}{n:6}{d:7} {dtype:8}: one class is over the limit of {grid.memory_limit:g} GiB")
            continue
        bank = torch.empty(classes, n, d, dtype=getattr(torch, dtype), device=device)
        for each in bank:
            each.copy_(torch.randn(n, d, generator=stream, device=device))
        for rows in grid.samples:
            print(measure(draw_batch(bank, rows, stream), grid, bandwidth, device), flush=True)
    print(f"-: over the limit of {grid.memory_limit:g} GiB")


def compare_accuracy(device: torch.device, n: int, d: int) -> None:
    """Measure errors with references in clusters of five that are 0.014 apart, such as crops of one picture.

    This is the case for which the anchored form was made.
    """
    stream = torch.Generator(device).manual_seed(1)
    base = torch.randn(n // 5 + 1, d, generator=stream, device=device).repeat_interleave(5, 0)[:n]
    direction = torch.randn(n, d, generator=stream, device=device)
    bank = (base + 0.01 * torch.nn.functional.normalize(direction, dim=-1))[None]
    names = [name for name in CHECKED if name in WAYS]
    print(
        f"\nerror with {n} references of {d} values that nearly coincide"
        + "\n     t"
        + "".join(f"{x:>12}" for x in names)
    )
    for t in (0.001, 0.003, 0.01, 0.1, 0.5, 0.9, 0.99):
        batch = draw_batch(bank, CHECKED_ROWS, stream, torch.full((CHECKED_ROWS,), t, device=device))
        print(f"{t:6g}" + "".join(f"{error(WAYS[name], batch):12.0e}" for name in names))


def main(grid: Grid) -> None:
    device = choose_device(grid.device)
    add_triton(device)
    compare(grid, device)
    compare_accuracy(device, *grid.close)


if __name__ == "__main__":
    main(tyro.cli(Grid))
