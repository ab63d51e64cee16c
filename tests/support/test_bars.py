"""Progress bars: where a line takes the place of a bar, and that all are made in one place."""

import io
import sys

import pytest

from stablevm.support import bars
from tests.helpers.modules import PACKAGE


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(stream, monkeypatch, **options):
    monkeypatch.setattr(sys, "stderr", stream)
    with bars.progress_bar(total=3, initial=1, desc="rows", unit="image", **options) as bar:
        bar.update()
        bar.update()
    return stream.getvalue()


def test_a_terminal_gets_a_bar(monkeypatch):
    told = shown(Terminal(), monkeypatch)
    assert "\rrows: " in told and "3/3" in told and "image/s" in told


def test_a_file_gets_a_line_now_and_then(monkeypatch):
    assert shown(io.StringIO(), monkeypatch) == ""  # it ends before the first line is due
    monkeypatch.setattr(bars, "SECONDS_BETWEEN_LINES", 1e-9)
    lines = shown(io.StringIO(), monkeypatch).splitlines()
    assert [line.split(",")[0] for line in lines] == ["rows: 2 of 3", "rows: 3 of 3", "rows: 3 of 3"]
    assert all("image/s" in line and line.endswith(" left") for line in lines)


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_nothing_is_shown_where_it_is_not_wanted(stream, monkeypatch):
    monkeypatch.setattr(bars, "SECONDS_BETWEEN_LINES", 1e-9)
    assert shown(stream(), monkeypatch, show=False) == ""
    monkeypatch.setenv(bars.NO_BARS, "1")
    assert shown(stream(), monkeypatch) == ""


def test_all_bars_are_made_here():
    makers = {path.name for path in PACKAGE.rglob("*.py") if "tqdm(" in path.read_text()}
    assert makers == {"bars.py"}
