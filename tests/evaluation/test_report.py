"""figures.evaluation and evaluation.page: pictures are plotted, the page needs no other file and escapes its texts."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from stablevm.evaluation.page import Figure, write_page
from stablevm.evaluation.sample_report import Point, _closest, _command, _digits
from stablevm.figures.evaluation import plot_class_rows, plot_loss, plot_metrics
from stablevm.metrics.frechet import FRECHET
from stablevm.metrics.precision_recall import PRECISION, RECALL
from stablevm.support.errors import UserError

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Checks nesting, collects tags with attributes and the text in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def picture(folder: Path) -> Path:
    path = folder / "picture.png"
    Image.new("RGB", (40, 20), (200, 0, 0)).save(path)
    return path


def report(folder: Path, **changes: object) -> str:
    content = {
        "title": "Digits",
        "summary": {"accuracy": 0.98765, "time": "90 s"},
        "figures": [Figure("Samples", [picture(folder)], "Ten of each class.")],
        "metrics_table": [("measure", "value"), ("coverage", 0.5), ("samples", 500)],
        "commands": ["stablevm evaluate samples.npz \\\n  --reference data"],
        "protocol": {"seed": 0},
    }
    write_page(folder / "report.html", **(content | changes))
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_shows_everything(tmp_path: Path) -> None:
    text = report(tmp_path)
    page = Page(text)
    shown = "".join(page.text)
    for part in ("Digits", "0.9877", "90 s", "Ten of each class.", "coverage", "500", "seed"):
        assert part in shown
    assert "stablevm evaluate samples.npz \\\n  --reference data" in shown  # copied as it was given
    (image,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert (image["width"], image["height"], image["alt"]) == ("20", "10", "Samples: picture")
    assert base64.b64decode(image["src"].partition("base64,")[2]) == picture(tmp_path).read_bytes()


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    text = report(tmp_path)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r'"data:[^"]*"', "", text))
    for tag, attributes in Page(text).tags:
        assert tag not in {"link", "iframe", "object", "base"}
        assert attributes.get("src", "data:").startswith("data:")
        assert "href" not in attributes


def test_everything_shown_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> \"quoted\" & 'single'"
    figure = Figure(evil, [picture(tmp_path)], evil)
    plain = Page(report(tmp_path))
    page = Page(
        report(
            tmp_path,
            title=evil,
            introduction=evil,
            links={evil: evil},
            summary={evil: evil},
            figures=[figure],
            metrics_table=[(evil, "b"), (evil, 1)],
            commands=[evil],
            protocol={evil: evil},
        )
    )
    assert [tag for tag, _ in page.tags].count("script") == [tag for tag, _ in plain.tags].count("script") == 1
    assert "".join(page.text).count(evil) == 13  # title, h1, introduction; two of each pair; command; link
    assert [attributes["alt"] for tag, attributes in page.tags if tag == "img"] == [f"{evil}: picture"]
    assert [attributes["href"] for tag, attributes in page.tags if tag == "a"] == [evil]


def test_a_missing_or_foreign_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no picture .*absent\.png"):
        report(tmp_path, figures=[Figure("a", [tmp_path / "absent.png"], "b")])
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(UserError, match=r"text\.png is not a PNG"):
        report(tmp_path, figures=[Figure("a", [tmp_path / "text.png"], "b")])
    assert not (tmp_path / "report.html").exists()


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.verify()
        return image.size


def test_numbers_stand_under_each_other_and_words_do_not(tmp_path: Path) -> None:
    rows = [("", "A", "B", "meaning"), ("FID", "3.94", "none", "lower is better"), ("share", "99.8%", 1, "of samples")]
    cells = [attributes for tag, attributes in Page(report(tmp_path, metrics_table=rows)).tags if tag in ("th", "td")]
    right = ["y" if attributes.get("class") == "number" else "n" for attributes in cells]
    assert right == [*"nyyn", *"nynn", *"nyyn"]


def test_a_figure_may_have_several_pictures_or_none(tmp_path: Path) -> None:
    figures = [Figure("Two", [picture(tmp_path)] * 2, "both"), Figure("Words", [], "alone")]
    page = Page(report(tmp_path, figures=figures))
    assert [tag for tag, _ in page.tags].count("img") == 2 and "alone" in "".join(page.text)


def test_losses_of_several_methods(tmp_path: Path) -> None:
    rows = [{"step": 10 * i, "velocity_loss": 1 / i, "alignment_loss": -0.1 * i} for i in range(1, 9)]
    runs = {"StableVM": rows, "CFM": [*rows, {"step": 80, "accuracy": 1.0}]}
    plot_loss(runs, "velocity_loss", tmp_path / "velocity.png")
    plot_loss({"CFM": rows[:1]}, "alignment_loss", tmp_path / "alignment.png")
    assert size(tmp_path / "velocity.png") == size(tmp_path / "alignment.png") == (960, 640)
    with pytest.raises(UserError, match="metrics of CFM: no row holds velocity_loss"):
        plot_loss({"StableVM": rows, "CFM": [{"step": 10}]}, "velocity_loss", tmp_path / "none.png")


def test_rows_of_classes(tmp_path: Path) -> None:
    images = np.full((3, 4, 8, 8, 3), (0, 0, 255), np.uint8)
    images[1] = (255, 0, 0)
    plot_class_rows(images, ["a", "b", "c"], "Generated", tmp_path / "rows.png")
    with Image.open(tmp_path / "rows.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    red = np.argwhere((pixels == (255, 0, 0)).all(-1))
    blue = np.argwhere((pixels == (0, 0, 255)).all(-1))
    assert blue[:, 0].min() < red[:, 0].min() < red[:, 0].max() < blue[:, 0].max()
    assert len(blue) == pytest.approx(2 * len(red), rel=0.05)
    with pytest.raises(UserError, match="images of 3 classes, 2 names"):
        plot_class_rows(images, ["a", "b"], "Generated", tmp_path / "rows.png")


def test_error_bars_of_shares_end_at_0_and_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    errorbar = Axes.errorbar
    monkeypatch.setattr(Axes, "errorbar", lambda *given, **named: (found.append(given), errorbar(*given, **named))[1])
    points = [Point(8, 0.95, 0.1), Point(16, 0.02, 0.1), Point(32, 0.5, None)]
    plot_metrics([PRECISION, RECALL], {"precision": points, "recall": points}, tmp_path / "shares.png")
    _, sizes, means, (below, above) = found[0]
    assert sizes == [8, 16, 32] and (means - below).min() == pytest.approx(0) and (means + above).max() == 1
    plot_metrics([FRECHET], {"frechet_distance": points}, tmp_path / "distance.png")
    assert found[2][3].tolist() == [[0.1, 0.1, 0.0]] * 2, "a distance has no such ends"


def test_plotting_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    plot_loss({"CFM": [{"step": 1, "velocity_loss": 1.0}]}, "velocity_loss", tmp_path / "one.png")
    assert dict(matplotlib.rcParams) == before


def test_nearest_samples_are_of_every_class() -> None:
    distances = torch.tensor([5.0, 1.0, 2.0, 3.0, 4.0, 0.5])
    labels = np.array([2, 0, 0, 1, 1, 0])
    assert _closest(distances, None).tolist() == [5, 1, 2, 3, 4, 0]
    assert _closest(distances, labels).tolist() == [5, 1, 2, 3, 4, 0], "three rows for each of three classes"
    many = torch.arange(60.0)
    assert _closest(many, np.arange(60) // 5).tolist() == list(range(0, 50, 5)), "one of each of ten classes"
    assert _closest(many, np.arange(60) // 30).tolist() == [0, 1, 2, 3, 4, 30, 31, 32, 33, 34]


@pytest.mark.parametrize(
    ("program", "shown"),
    [
        ("/usr/bin/stablevm", ["stablevm evaluate samples.npz"]),
        ("/code/stablevm/__main__.py", ["stablevm evaluate samples.npz"]),
        ("evaluate.py", ["python evaluate.py evaluate samples.npz"]),
        ("/lib/pytest/__main__.py", []),
    ],
)
def test_the_command_that_made_a_report(monkeypatch, program, shown):
    monkeypatch.setattr("sys.argv", [program, "evaluate", "samples.npz"])
    assert _command() == shown


def test_distances_have_three_digits():
    assert [_digits(torch.tensor(value)) for value in (0.35, 4.0, 250.0, 0.02789)] == ["0.350", "4.00", "250", "0.0279"]
