"""The results of a sweep: a table, the best combination with its neighbours, JSON and a figure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stablevm.evaluation.evaluate import text_table
from stablevm.figures.sweep import Line, plot_sweep
from stablevm.metrics.table import METRICS
from stablevm.support.files import write_json, write_text
from stablevm.sweep.config import AXES, Point, Value, described, shown
from stablevm.training.evaluation import DISTANCES

TABLE, DATA, PICTURE = "sweep.txt", "sweep.json", "sweep.png"
# What tables show of results without sections, those of an extractor of one's own; the distance comes first.
_OF_SMALL_IMAGES = ("frechet_test", "accuracy", "precision", "recall", "density", "coverage", "memorisation")
ANY = "any"


def measures_of(results: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation by name, the distance by which combinations are compared first.

    Those of a second extractor have the name of its section before theirs.
    """
    if "frechet_test" in results:
        return {name: results[name] for name in _OF_SMALL_IMAGES if name in results}
    found: dict[str, float] = {}
    for section, values in results.items():
        if isinstance(values, Mapping) and "extractor" in values:
            prefix = f"{section} " if found else ""
            found |= {f"{prefix}{metric.name}": values[metric.name] for metric in METRICS if metric.name in values}
    return found


@dataclass(frozen=True)
class Cell:
    """A combination, without axes that have no effect in it, and what `evaluate` wrote of it."""

    point: Point
    results: Mapping[str, Any]

    @cached_property
    def measures(self) -> dict[str, float]:
        return measures_of(self.results)


@dataclass(frozen=True)
class Sweep:
    """All combinations of a sweep."""

    checkpoint: str
    num_samples: int
    cells: Sequence[Cell]

    @property
    def axes(self) -> tuple[str, ...]:
        """Those with several values."""
        return tuple(axis for axis in AXES if len(self._places(axis)) > 1)

    @property
    def distance(self) -> str:
        """The name of the measure by which the best is chosen, of which the lowest is the best."""
        return next(name for name in DISTANCES if name in self.cells[0].measures)

    @cached_property
    def best(self) -> Cell:
        return min(self.cells, key=lambda cell: cell.measures[self.distance])

    def value(self, cell: Cell) -> float:
        return cell.measures[self.distance]

    def neighbours(self) -> list[Cell]:
        """The combinations that differ from the best one by one place on one axis."""
        found = []
        for axis in self.axes:
            places = self._places(axis)
            if axis not in self.best.point:
                continue
            here = places.index(self.best.point[axis])
            for value in places[max(0, here - 1) : here] + places[here + 1 : here + 2]:
                near = {**self.best.point, axis: value}
                found += [cell for cell in self.cells if cell is not self.best and _agree(cell.point, near)]
        return found

    def notes(self) -> list[str]:
        """Lines about how far the figure of the best can be trusted."""
        lines = []
        if len(self.cells) > 1:
            lines.append(
                f"the best of {len(self.cells)} was chosen by the same {self.num_samples:,} samples as its "
                f"{self.distance}, which is therefore too low by chance: evaluate it again with another --global-seed"
            )
        for axis in self.axes:
            places = self._places(axis)
            if self.best.point.get(axis) in (places[0], places[-1]) and isinstance(self.best.point[axis], float):
                lines.append(f"the best is at the end of --{axis.replace('_', '-')}: add a value beyond it")
        return lines

    def table(self) -> str:
        """A row for each combination, by distance; the columns are the axes and the measures."""
        names = list(self.cells[0].measures)
        rows: list[list[str]] = [[*(axis.replace("_", "-") for axis in self.axes), *names, "samples"]]
        for cell in sorted(self.cells, key=self.value):
            values = [shown(cell.point[axis]) if axis in cell.point else ANY for axis in self.axes]
            rows.append([*values, *(f"{cell.measures[name]:.4g}" for name in names), f"{self.num_samples:,}"])
        return text_table(rows)

    def summary(self) -> list[str]:
        """Lines about the best combination and its neighbours."""
        lines = [f"best: {described(self.best.point, self.axes)}: {self.distance} {self.value(self.best):.4g}"]
        for cell in self.neighbours():
            lines.append(f"  beside it, {described(cell.point, self.axes)}: {self.value(cell):.4g}")
        return lines + [f"note: {line}" for line in self.notes()]

    def write(self, folder: Path) -> None:
        """Print the table and write it with the summary, the data and the figure."""
        text = "\n".join([self.table(), "", *self.summary()])
        write_text(folder / TABLE, text + "\n")
        write_json(folder / DATA, self.to_dict())
        (folder / PICTURE).unlink(missing_ok=True)  # of an earlier sweep
        if self.axes:
            plot_sweep(self.lines(), self._axis_name(self.axis), self.distance, folder / PICTURE)
        print(f"{text}\nresults written to {folder / DATA}" + (f", figure: {folder / PICTURE}" if self.axes else ""))

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""

        def entry(cell: Cell) -> dict[str, Any]:
            return {"combination": dict(cell.point), "measures": cell.measures, "num_samples": self.num_samples}

        return {
            "checkpoint": self.checkpoint,
            "measure": self.distance,
            "axes": {axis: self._places(axis) for axis in self.axes},
            "combinations": [entry(cell) for cell in self.cells],
            "best": entry(self.best),
            "neighbours": [entry(cell) for cell in self.neighbours()],
            "notes": self.notes(),
        }

    @property
    def axis(self) -> str:
        """The axis of the figure: the one with the most values, guidance by labels before others."""
        preferred = ("cfg_scale", *(axis for axis in AXES if axis != "cfg_scale"))
        return max(self.axes, key=lambda axis: (len(self._places(axis)), -preferred.index(axis)))

    def lines(self) -> list[Line]:
        """The lines of the figure: one for each combination of the other axes."""
        places, others = self._places(self.axis), [axis for axis in self.axes if axis != self.axis]
        numeric = all(isinstance(value, float) for value in places)
        groups: dict[tuple[Value, ...], list[Cell]] = {}
        for cell in self.cells:
            if all(axis in cell.point for axis in others) and self.axis in cell.point:
                groups.setdefault(tuple(cell.point[axis] for axis in others), [])
        lines = []
        for key in groups:
            wanted = dict(zip(others, key, strict=True))
            cells = [cell for cell in self.cells if _agree(cell.point, wanted) and self.axis in cell.point]
            label = described(wanted, tuple(others)) if others else ""
            xs = [cell.point[self.axis] if numeric else places.index(cell.point[self.axis]) for cell in cells]
            points = sorted((float(x), self.value(cell)) for x, cell in zip(xs, cells, strict=True))
            lines.append(Line(label, points, [] if numeric else [shown(place) for place in places]))
        return lines

    def _axis_name(self, axis: str) -> str:
        return axis.replace("_", " ").replace("cfg", "guidance by labels,")

    def _places(self, axis: str) -> list[Value]:
        found = {cell.point[axis] for cell in self.cells if axis in cell.point}
        return sorted(found, key=lambda value: (isinstance(value, float), value))


def _agree(point: Point, other: Point) -> bool:
    """Whether both have the same value on all axes that both have."""
    return all(point[axis] == other[axis] for axis in point if axis in other)
