"""The figures of the variance and of the toy study: where lines end, and how panels name their scales and seeds."""

import dataclasses
from dataclasses import dataclass, field

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stablevm.figures import toy, variance
from stablevm.figures.style import plain_log_labels
from stablevm.variance import VarianceCurve

CURVE = VarianceCurve(
    [0.2, 0.4, 0.6, 0.8], [0.0, 0.1, 0.3, 0.2], [0.0, 0.02, 0.03, 0.01], [(0.0, 0.1)] * 4, [(0.0, 0.05)] * 4,
    [1.0, 1.5, 4.0, 8.0], references=9,
)  # fmt: skip


def kept(monkeypatch, module):
    """The figures that are saved instead of written, with their panels."""
    found = []
    monkeypatch.setattr(module, "save_figure", lambda figure, path: found.append(figure))
    return found


def test_no_line_runs_through_the_legend_of_variances(tmp_path, monkeypatch):
    found = kept(monkeypatch, variance)
    variance.plot_variance({"Data": CURVE}, tmp_path / "a.png", {"Data": 0.7})
    panel: Axes = found[0].axes[0]
    found[0].draw_without_rendering()
    legend = panel.get_legend().get_window_extent()
    lines = [line for line in panel.get_lines() if len(set(line.get_xdata())) == 1]
    assert len(lines) == 2, "the split point and tau"
    assert all(line.get_window_extent().y1 <= legend.y0 for line in lines)


def test_the_line_of_all_references_stands_at_their_number(tmp_path, monkeypatch):
    found = kept(monkeypatch, variance)
    variance.plot_effective_size(CURVE, tmp_path / "a.png")
    heights = {line.get_label(): set(line.get_ydata()) for line in found[0].axes[0].get_lines()}
    assert heights["all 9 references"] == {9}


@pytest.mark.parametrize("references", [9, 2048])
def test_no_line_runs_through_the_legend_of_references(references, tmp_path, monkeypatch):
    steep = dataclasses.replace(CURVE, ess=[references / 2.0, *[float(references)] * 3], references=references)
    found = kept(monkeypatch, variance)
    variance.plot_variance({"Data": steep}, tmp_path / "a.png")
    panel: Axes = found[0].axes[1]
    found[0].draw_without_rendering()
    legend = panel.get_legend().get_window_extent()
    assert all(line.get_window_extent().y1 <= legend.y0 for line in panel.get_lines())


@dataclass
class Run:
    divergence: list[list[float]]
    updates: list[int] = field(default_factory=lambda: [0, 1])
    times: list[float] = field(default_factory=lambda: [0.2, 0.9])


def test_the_toys_panels_name_scale_and_seeds(tmp_path, monkeypatch):
    found: list[Figure] = kept(monkeypatch, toy)
    run = Run([[100.0, 2.0], [1.0, 1.0]])
    toy.plot_divergence({"cfm": [run], "stable_vm": [run]}, "velocity", tmp_path / "a.png")
    toy.plot_divergence({"cfm": [run, run, run]}, "velocity", tmp_path / "b.png")
    one, three = found
    assert [panel.get_title(loc="left") for panel in one.axes[:2]] == ["t = 0.2, log scale", "t = 0.9, linear scale"]
    assert one.get_suptitle().endswith("one seed") and "range" not in one.get_suptitle()
    assert three.get_suptitle().endswith("mean and range of 3 seeds")
    assert [len(each.axes[0].collections) for each in found] == [0, 1], "a band only of several seeds"


@pytest.mark.parametrize("ends", [(0.55, 1.6), (1.1, 4.5), (3.0, 9.9), (0.02, 0.06), (0.3, 30.0), (1.0, 2048.0)])
def test_a_log_axis_has_several_labels(ends):
    axes = Figure().add_subplot()
    axes.plot([0, 1], ends)
    axes.set_yscale("log")
    plain_log_labels(axes)
    low, high = axes.get_ylim()
    shown = [value for value in axes.yaxis.get_majorticklocs() if low <= value <= high]
    assert 3 <= len(shown) <= 11, shown
