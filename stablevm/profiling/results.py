"""The measurements of steps, as a table, as JSON and as a figure."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stablevm.figures.phases import PHASES, figures_of, plot_phases
from stablevm.profiling.measure import Measurement
from stablevm.support.files import write_json

FILES = ("steps.json", "steps.png")
EPOCHS = (80, 800)  # numbers of epochs for which papers report results on ImageNet


@dataclass(frozen=True)
class Results:
    """The measurements of several trainings on one machine with one network."""

    machine: str
    settings: str  # network, batch, precision
    options: dict[str, Any]  # of the command
    images: int  # in the data set, which gives the time of an epoch
    product_rate: float  # operations per second of large products
    measurements: Sequence[Measurement]

    def table(self) -> str:
        """The measurements as text, with one row per training."""
        lines = [
            self.machine,
            self.settings,
            f"large matrix products: {figures_of(self.product_rate / 1e12)} TFLOP/s",
            "",
        ]
        header = f"{'':18}{'images/s':>9}{'ms/step':>9}{'TFLOP/s':>9}{'of best':>8}{'GPU GiB':>9}{'host GiB':>9}"
        lines.append(header + "".join(f"{f'h to {epochs}':>10}" for epochs in EPOCHS) + f" epochs of {self.images:,}")
        lines += [self._row(measured) for measured in self.measurements]
        lines += ["", f"{'ms per step':18}" + "".join(f"{phase:>10}" for phase in PHASES)]
        for measured in self.measurements:
            cells = (f"{1e3 * measured.seconds.get(phase, 0.0):10.2f}" for phase in PHASES)
            lines.append(f"{measured.name:18}" + "".join(cells))
        return "\n".join(lines + self._extras())

    def _row(self, measured: Measurement) -> str:
        gpu = "-" if measured.gpu_gib is None else f"{measured.gpu_gib:.2f}"
        row = (
            f"{measured.name:18}{figures_of(measured.images_per_second):>9}{1e3 * measured.step:9.1f}"
            f"{figures_of(measured.rate / 1e12):>9}"
            f"{measured.rate / self.product_rate:8.0%}{gpu:>9}{measured.host_gib:9.2f}"
        )
        hours = (epochs * self.images / measured.images_per_second / 3600 for epochs in EPOCHS)
        return row + "".join(f"{count:10,.0f}" for count in hours)

    def _extras(self) -> list[str]:
        """Lines about the time that StableVM adds to flow matching, for each pair of trainings."""
        lines = [
            f"stablevm draws {1e3 * (pair[1].seconds['draw'] - pair[0].seconds['draw']):.2f} ms longer than "
            f"{pair[0].name}: {self.extra(*pair):.2%} of its step"
            for pair in self.pairs()
        ]
        return ["", *lines] if lines else []

    def pairs(self) -> list[tuple[Measurement, Measurement]]:
        """The pairs of flow matching and StableVM, both without alignment or both with it."""
        named = {measured.name: measured for measured in self.measurements}
        names = [("si", "stablevm"), ("si+repa", "stablevm+va-repa")]
        return [(named[plain], named[ours]) for plain, ours in names if plain in named and ours in named]

    @staticmethod
    def extra(plain: Measurement, ours: Measurement) -> float:
        """The additional time for the draws of `ours`, as a share of a step of `plain`."""
        return (ours.seconds["draw"] - plain.seconds["draw"]) / plain.step

    def to_dict(self) -> dict[str, Any]:
        rows = [{**asdict(measured), "images_per_second": measured.images_per_second} for measured in self.measurements]
        return {**asdict(self), "measurements": rows}

    def write(self, folder: Path) -> None:
        """Write steps.json and steps.png."""
        numbers, picture = (folder / name for name in FILES)
        write_json(numbers, self.to_dict())
        plot_phases(self.measurements, self.settings, picture)
