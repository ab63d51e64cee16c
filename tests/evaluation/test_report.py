"""evaluation.figures and evaluation.page: pictures are drawn, the page stands alone and escapes what it shows."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from stablevm.evaluation.page import Figure, write_page
from stablevm.figures.evaluation import plot_samples_beside_real, plot_training_curves
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
        "figures": [Figure("Samples", picture(folder), "Ten of each class.")],
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
    assert (image["width"], image["height"], image["alt"]) == ("20", "10", "Samples")
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
    figure = Figure(evil, picture(tmp_path), evil)
    plain = Page(report(tmp_path))
    page = Page(
        report(
            tmp_path,
            title=evil,
            summary={evil: evil},
            figures=[figure],
            metrics_table=[(evil, "b"), (evil, 1)],
            commands=[evil],
            protocol={evil: evil},
        )
    )
    assert [tag for tag, _ in page.tags].count("script") == [tag for tag, _ in plain.tags].count("script") == 1
    assert "".join(page.text).count(evil) == 11  # title, h1; card 2; h2, caption; table 2; command; protocol 2
    assert [attributes["alt"] for tag, attributes in page.tags if tag == "img"] == [evil]


def test_a_missing_or_foreign_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no picture .*absent\.png"):
        report(tmp_path, figures=[Figure("a", tmp_path / "absent.png", "b")])
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(UserError, match=r"text\.png is not a PNG"):
        report(tmp_path, figures=[Figure("a", tmp_path / "text.png", "b")])
    assert not (tmp_path / "report.html").exists()


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.verify()
        return image.size


def test_training_curves_with_and_without_alignment(tmp_path: Path) -> None:
    rows = [{"step": 10 * i, "loss": 0.5 / i, "velocity_loss": 1 / i, "alignment_loss": -0.1 * i} for i in range(1, 9)]
    plot_training_curves(rows, tmp_path / "both.png")
    plot_training_curves([{"step": 1, "velocity_loss": 1.0}], tmp_path / "one.png")
    assert size(tmp_path / "both.png") == size(tmp_path / "one.png") == (2000, 780)
    with pytest.raises(UserError, match="no row holds velocity_loss"):
        plot_training_curves([{"step": 10, "accuracy": 1.0}], tmp_path / "none.png")


def test_samples_stand_beside_real_images(tmp_path: Path) -> None:
    real = np.full((3, 2, 8, 8, 3), (255, 0, 0), np.uint8)
    samples = np.full((3, 4, 8, 8, 3), (0, 0, 255), np.uint8)
    plot_samples_beside_real(samples, real, tmp_path / "grid.png", ["a", "b", "c"])
    with Image.open(tmp_path / "grid.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    red = np.argwhere((pixels == (255, 0, 0)).all(-1))
    blue = np.argwhere((pixels == (0, 0, 255)).all(-1))
    assert red[:, 1].max() < blue[:, 1].min()
    assert len(blue) == pytest.approx(2 * len(red), rel=0.05)
    with pytest.raises(UserError, match="samples of 3 classes, real images of 2, 3 names"):
        plot_samples_beside_real(samples, real[:2], tmp_path / "grid.png", ["a", "b", "c"])


def test_drawing_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    plot_training_curves([{"step": 1, "velocity_loss": 1.0}], tmp_path / "one.png")
    assert dict(matplotlib.rcParams) == before
