"""Moving averages of power-function profile, of any width, from snapshots of two (EDM2: Karras et al., 2024).

After step n an average of exponent g follows the weights with the decay `(1 - 1/n)^(g + 1)`, so that step t counts in
proportion to t^g or nearly so: the average forgets the beginning of training, and its width is a share of the steps so
far. Snapshots of two such averages, taken at intervals, span those of other widths: `average` finds the combination of
snapshots whose profile over the steps is nearest to the requested one.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stablevm.networks import snapshot
from stablevm.networks.snapshot import CARD_FILE, ModelCard, load_card
from stablevm.support.cards import read_card
from stablevm.support.errors import UserError, arg
from stablevm.support.files import remove_temporary, sha256, write_json
from stablevm.support.locks import is_foreign, owned
from stablevm.support.options import some_of
from stablevm.training.average_config import WIDTH, AverageConfig

AVERAGES = "averages"  # the folder of snapshots and of results in that of the run
WIDTHS = (0.05, 0.10)  # of the averages that are tracked (EDM2, section 3.2)
RECORD_FILE = "average.json"
POOR = 0.05  # relative error of a profile from which on a warning is given
_BLOCK = 65_536  # steps whose profiles are in memory at a time


def exponent_of(width: float) -> float:
    """The exponent g of the profile of a relative width: `width^2 = (g + 1) / ((g + 2)^2 (g + 3))`, the largest root.

    UserError for a width outside `WIDTH`.
    """
    WIDTH.check("width", width)
    inverse = width**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(roots.real.max())


def decay_of(exponent: float, step: int) -> float:
    """The decay of the average at step 1, 2, ...: `(1 - 1/step)^(exponent + 1)`; 0 at the first."""
    return float((1 - 1 / step) ** (exponent + 1))


def profile(exponent: float, end: int, steps: Tensor) -> Tensor:
    """The weight of each of `steps` (n,), float64, in the average after step `end`; over all steps they add up to 1."""
    power = exponent + 1
    before = ((steps - 1) / end) ** power  # the share of all steps before, as the decays multiply to a power of ratios
    return torch.where(steps <= end, (steps / end) ** power - before, 0.0)


@dataclass(frozen=True)
class Known:
    """A snapshot of the average of a width after a step."""

    step: int
    width: float


def coefficients(known: Sequence[Known], step: int, width: float) -> tuple[Tensor, float]:
    """The coefficients of snapshots whose sum is nearest to the average of `width` after `step`, float64 (n,).

    Nearest is the least-squares error between the profiles; the coefficients add up to 1, so that weights that do not
    change stay. The second result is the error: the root mean square of the difference between the profiles, divided
    by that of the wanted one.
    """
    exponents, target = [exponent_of(each.width) for each in known], exponent_of(width)
    size = 0.0
    reduced = torch.zeros(0, len(known), dtype=torch.float64)  # R of the QR decomposition of all rows so far
    for start in range(0, step, _BLOCK):
        steps = torch.arange(start + 1, min(start + _BLOCK, step) + 1, dtype=torch.float64)
        wanted = profile(target, step, steps)
        columns = [profile(g, each.step, steps) for g, each in zip(exponents, known, strict=True)]
        # Relative to the last column, which gets what the others leave of 1.
        rows = torch.stack([*(each - columns[-1] for each in columns[:-1]), wanted - columns[-1]], dim=1)
        reduced = torch.linalg.qr(torch.cat([reduced, rows]), mode="r").R
        size += float(wanted.square().sum())
    matrix, right = reduced[:, :-1], reduced[:, -1:]
    others = torch.linalg.lstsq(matrix, right, driver="gelsd").solution
    error = float((matrix @ others - right).norm()) / math.sqrt(size)
    return torch.cat([others[:, 0], 1 - others.sum().reshape(1)]), error


def snapshot_folder(run: Path, step: int) -> Path:
    return run / AVERAGES / f"{step:07d}"


def snapshot_name(width: float) -> str:
    """The file of a snapshot, without its suffix; in a checkpoint, that of the average on its way."""
    return f"average-{width:g}"


def save_snapshot(run: Path, card: ModelCard, averages: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write the averages after `card.step` by `snapshot_name`, then the card, which makes the folder complete."""
    folder = snapshot_folder(run, card.step)
    snapshot.save(folder, card, averages)
    return folder


def snapshot_steps(run: Path) -> list[int]:
    """The steps of the complete snapshots of a run, ascending."""
    found = (run / AVERAGES).glob(f"*/{CARD_FILE}")
    return sorted(int(path.parent.name) for path in found if path.parent.name.isdigit())


def set_snapshots_aside(run: Path, step: int, target: Path) -> None:
    """Move what lies in the folder of averages and is newer than `step` to `target`."""
    for path in sorted((run / AVERAGES).iterdir()) if (run / AVERAGES).is_dir() else ():
        first = path.name.partition("-")[0]
        if first.isdigit() and int(first) > step:
            target.mkdir(parents=True, exist_ok=True)
            path.replace(target / path.name)


@dataclass(frozen=True)
class _Record:
    """What is kept beside the result: how it was made, and how near its profile comes."""

    width: float
    step: int
    snapshots: int
    profile_error: float
    newest_sha256: str = ""  # of a snapshot of the run, which tells it from others; in earlier versions, none


def average(config: AverageConfig) -> Path:
    """Make the average that the options request, and return its checkpoint folder; one that exists is kept.

    UserError for a run without snapshots, a step without one, and snapshots that are damaged.
    """
    config.validate()
    run, steps = config.run, snapshot_steps(config.run)
    if not steps:
        raise UserError(
            f"{run}: has no snapshots of averages; train with --average-every, such as --average-every 4000"
        )
    step = steps[-1] if config.step is None else config.step
    if step not in steps:
        raise UserError(f"{arg('step')} {step}: {run} has no snapshot of that step; there are {some_of(steps)}")
    target = averaged_folder(config, step)
    with owned(target.parent, target.name):
        remove_temporary(target)
        _check_result(target, run, config.width, step)
        if (target / CARD_FILE).exists():
            print(f"{target} is already complete")
        else:
            _make(run, [each for each in steps if each <= step], config.width, target)
    return target


def averaged_folder(config: AverageConfig, step: int) -> Path:
    """Where the average after `step` is, or will be."""
    return config.output or config.run / AVERAGES / f"{step:07d}-width-{config.width:g}"


def _make(run: Path, steps: Sequence[int], width: float, target: Path) -> None:
    known = [Known(step, each) for step in steps for each in WIDTHS]
    shares, error = coefficients(known, steps[-1], width)
    print(
        f"average of width {width:g} after step {steps[-1]:,}, from {len(steps):,} snapshots: the profile is "
        f"{error:.2%} off"
    )
    if error > POOR:
        print(
            "warning: these snapshots don't reach that width well; train with a shorter --average-every, or ask for a "
            "width nearer to those of the snapshots",
            file=sys.stderr,
        )
    files = [snapshot_folder(run, each.step) / f"{snapshot_name(each.width)}.safetensors" for each in known]
    weights = combined(files, shares)
    record = _Record(width, steps[-1], len(steps), error, sha256(_newest(run, steps[-1])))
    write_json(target / RECORD_FILE, asdict(record))
    snapshot.save(target, load_card(snapshot_folder(run, steps[-1])), {"ema": weights})
    print(f"{target}: complete, a checkpoint folder for generate and evaluate")


def _newest(run: Path, step: int) -> Path:
    """The snapshot by which a run is known."""
    return snapshot_folder(run, step) / f"{snapshot_name(WIDTHS[0])}.safetensors"


def _check_result(target: Path, run: Path, width: float, step: int) -> None:
    """UserError if the folder holds another average, or anything else."""
    if not any(map(is_foreign, target.iterdir() if target.is_dir() else ())):
        return
    if not (target / RECORD_FILE).exists():
        raise UserError(f"{target}: holds other files; give another --output")
    record = read_card(target / RECORD_FILE, _Record, "average", remedy="give another --output")
    if (record.width, record.step) != (width, step):
        raise UserError(
            f"{target}: holds the average of width {record.width:g} after step {record.step}, not that of width "
            f"{width:g} after step {step}; give another --output"
        )
    known, newest = record.newest_sha256, _newest(run, step)
    if known and newest.exists() and sha256(newest) != known:
        raise UserError(f"{target}: holds the average of another run than {run}; give another --output")


def combined(files: Sequence[Path], shares: Tensor) -> dict[str, Tensor]:
    """The weights `sum of share x file`, added up in float64 and rounded to float32, one tensor at a time.

    UserError for a file that is missing, damaged or of another network, and for weights that are not finite.
    """
    with ExitStack() as opened:
        readers = [_opened(path, opened) for path in files]
        names = sorted(readers[-1].keys())
        for path, reader in zip(files, readers, strict=True):
            if sorted(reader.keys()) != names:
                raise UserError(f"{path}: holds other tensors than {files[-1]}; remove its folder")
        return {name: _sum(name, files, readers, shares.tolist()) for name in names}


def _opened(path: Path, opened: ExitStack) -> Any:
    try:
        return opened.enter_context(safe_open(path, framework="pt"))
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"{path}: is missing or damaged ({error}); remove its folder") from None


def _sum(name: str, files: Sequence[Path], readers: Sequence[Any], shares: Sequence[float]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for path, reader, share in zip(files, readers, shares, strict=True):
        value = reader.get_tensor(name)
        if total.ndim and value.shape != total.shape:
            raise UserError(f"{path}: {name} is {list(value.shape)}, not {list(total.shape)}; remove its folder")
        if not value.isfinite().all():
            raise UserError(f"{path}: {name} is not finite; remove its folder")
        total = total + share * value.double()
    return total.float()
