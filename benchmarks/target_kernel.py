"""The target with references in one Triton kernel, which reads each reference of a row once: checked, not yet measured.

    python benchmarks/target_kernel.py                       on a GPU
    TRITON_INTERPRET=1 python benchmarks/target_kernel.py    in Triton's interpreter, on a CPU

It prints the errors of the kernel and of `stablevm.posterior` against float64, and ends with status 1 where those of
the kernel are larger than they may be. On a GPU `benchmarks/posterior.py` measures its time too. The library does not
use it: it is to come there once a GPU has shown that it pays.
"""

import os
import sys
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
import tyro
from common import DeviceName, choose_device
from torch import Tensor

from stablevm.interpolant import LINEAR, Interpolant
from stablevm.posterior import Posterior, posterior

MOST_VALUES = 2**14  # of a reference: a program holds four vectors of this size in registers
PROGRAMS_PER_PROCESSOR = 4
TOLERANCE = 2e-5  # of the offset, relative to the row's; float32 sums of a few thousand values


def can_run(device: torch.device) -> bool:
    """Whether the kernel runs on the device: a GPU, or a CPU with Triton's interpreter."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _weigh(
    x0_at, noise_at, lam_at, bank_at, group_at, keep_at, moment_at, sums_at, n, d, length,
    HAS_KEEP: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One row against `length` references: the moment of the differences, and peak, mass and squared mass.

    The softmax is computed as the references come (Milakov and Gimelshein, 2018), from the anchor's logit, 0, on.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, WIDTH)
    inside = column < d
    x0 = tl.load(x0_at + row * d + column, mask=inside, other=0.0)
    lam = tl.load(lam_at + row)
    slope = lam * tl.load(noise_at + row * d + column, mask=inside, other=0.0)
    own_set = bank_at + tl.load(group_at + row) * n * d
    peak, mass, squared = 0.0, 0.0, 0.0
    moment = tl.zeros([WIDTH], dtype=tl.float32)
    first = split * length
    last = tl.minimum(first + length, n)
    for start in range(first, last, TILE):
        number = start + tl.arange(0, TILE)
        takes_part = number < last
        if HAS_KEEP:
            takes_part = takes_part & (tl.load(keep_at + row * n + number, mask=takes_part, other=0) != 0)
        wanted = takes_part[:, None] & inside[None, :]
        reference = tl.load(own_set + number[:, None] * d + column[None, :], mask=wanted, other=0.0)
        delta = x0[None, :] - reference.to(tl.float32)
        logit = -tl.sum(delta * (0.5 * lam * lam * delta + slope[None, :]), axis=1)
        logit = tl.where(takes_part, logit, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(logit, axis=0))
        weight, shrink = tl.exp(logit - new_peak), tl.exp(peak - new_peak)
        mass = mass * shrink + tl.sum(weight, axis=0)
        squared = squared * shrink * shrink + tl.sum(weight * weight, axis=0)
        moment = moment * shrink + tl.sum(weight[:, None] * delta, axis=0)
        peak = new_peak
    part = row * tl.num_programs(1) + split
    tl.store(moment_at + part * d + column, moment, mask=inside)
    tl.store(sums_at + part * 3, peak)
    tl.store(sums_at + part * 3 + 1, mass)
    tl.store(sums_at + part * 3 + 2, squared)


@torch.no_grad()
def kernel_posterior(
    path: Interpolant,
    anchors: Tensor,
    noise: Tensor,
    t: Tensor,
    bank: Tensor,
    *,
    groups: Tensor,
    keep: Tensor | None = None,
    splits: int | None = None,
) -> Posterior:
    """What `stablevm.posterior.posterior` computes for a bank (G, n, d), contiguous, float32 or float16, by the kernel.

    anchors, noise: (B, d); t: (B,); groups: (B,) int64; keep: (B, n) bool. splits: the number of programs that share a
    row's references; enough to fill the device if None. ValueError for more than MOST_VALUES values.
    """
    rows, (_, n, d) = len(anchors), bank.shape
    if d > MOST_VALUES or not bank.is_contiguous():
        raise ValueError(f"a bank {tuple(bank.shape)}: expected a contiguous one with at most {MOST_VALUES} values")
    width = triton.next_power_of_2(d)
    tile = max(1, min(4, 2**13 // width))  # references read at once: so many fit in registers on an H100
    if splits is None:
        splits = max(1, min(n // (4 * tile), PROGRAMS_PER_PROCESSOR * _processors(bank.device) // rows))
    at = path.coefficients(t.double())
    lam = at.alpha / at.sigma
    moment = bank.new_empty(rows, splits, d, dtype=torch.float32)
    sums = bank.new_empty(rows, splits, 3, dtype=torch.float32)
    _weigh[(rows, splits)](
        anchors.float().contiguous(), noise.float().contiguous(), lam.float(), bank, groups.contiguous(),
        groups if keep is None else keep.contiguous().view(torch.uint8), moment, sums, n, d, triton.cdiv(n, splits),
        HAS_KEEP=keep is not None, WIDTH=width, TILE=tile, num_warps=max(4, min(16, width // 512)),
    )  # fmt: skip
    return _merge(moment, sums, lam.isfinite())


def _merge(moment: Tensor, sums: Tensor, finite: Tensor) -> Posterior:
    """The result from the parts of each row, moment (B, splits, d) and sums (B, splits, 3), and its anchor."""
    peaks, masses, squares = sums.unbind(-1)
    peak = peaks.amax(1)
    shrink, anchor = (peaks - peak[:, None]).exp(), (-peak).exp()
    mass = anchor + (masses * shrink).sum(1)
    offset = (moment * shrink[..., None]).sum(1) / mass[:, None]
    ess = mass.square() / (anchor.square() + (squares * shrink.square()).sum(1))
    return Posterior(torch.where(finite[:, None], offset, 0.0), torch.where(finite, ess, 1.0))


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@dataclass(frozen=True)
class Case:
    """One comparison with float64: sizes, the bank's dtype, what is masked, and whether references nearly coincide."""

    rows: int
    n: int
    d: int
    dtype: torch.dtype = torch.float32
    mask: Literal["none", "anchor", "half"] = "half"
    splits: int | None = None
    close: bool = False

    def errors(self, device: torch.device) -> tuple[float, float, float]:
        """The largest relative errors of the kernel's offsets, of the library's, and of the kernel's sample sizes."""
        stream = torch.Generator().manual_seed(0)
        bank = torch.randn(3, self.n, self.d, generator=stream)
        if self.close:
            bank = bank[:, :1] + 0.01 * torch.nn.functional.normalize(bank, dim=-1)
        bank = bank.to(device, self.dtype)
        groups = torch.arange(self.rows, device=device) % len(bank)
        slots = torch.randint(self.n, (self.rows,), generator=stream).to(device)
        x0, noise = bank[groups, slots].float(), torch.randn(self.rows, self.d, generator=stream).to(device)
        t = torch.linspace(0.01 if self.close else 0.8, 1, self.rows, device=device)
        keep = slots[:, None] != torch.arange(self.n, device=device)
        if self.mask == "none":
            keep[:] = True
        elif self.mask == "half":
            keep &= (torch.rand(self.rows, self.n, generator=stream) < 0.5).to(device)
            keep[0] = False
        given = {"groups": groups, "keep": None if self.mask == "none" else keep}
        offset, ess = _exact(x0, noise, t, bank[groups], keep)
        plain = posterior(LINEAR, x0, noise, t, bank, **given)
        mine = kernel_posterior(LINEAR, x0, noise, t, bank, **given, splits=self.splits)
        scale = offset.norm(dim=1).clamp(min=1e-12)
        offsets = [((found.offset - offset).norm(dim=1) / scale).max().item() for found in (mine, plain)]
        return offsets[0], offsets[1], ((mine.ess - ess).abs() / ess).max().item()


def _exact(x0: Tensor, noise: Tensor, t: Tensor, references: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets (B, d) and sample sizes (B,) over each row's anchor and references (B, n, d), in float64."""
    delta, at = x0.double()[:, None] - references.double(), LINEAR.coefficients(t.double()[:, None])
    lam = at.alpha / at.sigma
    logits = -0.5 * lam.square() * delta.square().sum(-1) - lam * (noise.double()[:, None] * delta).sum(-1)
    logits = torch.cat([torch.zeros_like(lam), logits.masked_fill(~keep, -torch.inf)], dim=1)
    weights = logits.softmax(-1)
    return (weights[:, 1:, None] * delta).sum(1), 1 / weights.square().sum(-1)


CASES = {
    "two values": Case(1, 2, 1, mask="none"),
    "no masks": Case(5, 30, 64, mask="none"),
    "masks, one of all": Case(5, 30, 64),
    "float16": Case(5, 30, 64, torch.float16),
    "odd sizes, three parts": Case(7, 21, 100, splits=3),
    "parts without references": Case(4, 5, 16, splits=4),
    "4,096 values": Case(3, 9, 4096),
    "nearly coincident": Case(6, 20, 1024, mask="anchor", close=True),
}


def main(device: DeviceName = "auto") -> int:
    """Check the kernel on a device."""
    place = choose_device(device)
    if not can_run(place):
        print("error: expected a GPU, or TRITON_INTERPRET=1", file=sys.stderr)
        return 2
    before, failed = torch.get_float32_matmul_precision(), 0
    torch.set_float32_matmul_precision("medium")  # TF32 where it is allowed: neither side may use it
    try:
        print(f"torch {torch.__version__}, triton {triton.__version__}, {place}\n")
        print(f"{'relative error of':26}{'offset':>10}{'stablevm':>10}{'ess':>10}")
        for name, case in CASES.items():
            errors = case.errors(place)
            failed |= not max(errors) <= TOLERANCE
            print(f"{name:26}" + "".join(f"{error:10.1e}" for error in errors))
    finally:
        torch.set_float32_matmul_precision(before)
    print("the kernel's errors are too large" if failed else "agrees")
    return int(failed)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
