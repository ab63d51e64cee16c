"""The site: what its hooks make of the documents, and that it needs no server and no other host."""

import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hooks():
    return runpy.run_path(str(ROOT / "docs" / "site.py"))


def test_links_named_by_a_file_get_the_title_of_the_page(hooks):
    page = SimpleNamespace(file=SimpleNamespace(src_uri="docs/training.md"))

    def shown(markdown):
        return hooks["on_page_markdown"](markdown, page)

    assert shown("([own-loop.md](own-loop.md))") == "([Your own training loop](own-loop.md))"
    assert shown("[examples/](../examples/README.md)") == "[Examples](../examples/README.md)"
    assert shown("[own-loop.md](own-loop.md#va-repa)") == "[Your own training loop: VA-REPA](own-loop.md#va-repa)"
    for other in ("[a loop](own-loop.md)", "[run.py](../stablevm/run.py)", "\n```\n[own-loop.md](own-loop.md)\n```\n"):
        assert shown(other) == other


def test_a_notebook_shows_what_it_printed_and_drew(hooks):
    outputs = [{"output_type": "stream", "text": ["1\n", "2\n"]}, {"data": {"image/png": "QUJD\nREVG"}}]
    cell = {"cell_type": "code", "source": ["x = 1\n", "x"], "outputs": outputs}
    code, text, picture = hooks["shown_cell"](cell)
    assert (code, text) == ("````python\nx = 1\nx\n````", "````text\n1\n2\n````")
    assert picture.endswith("(data:image/png;base64,QUJDREVG)")
    assert hooks["shown_cell"]({"cell_type": "markdown", "source": ["# A\n", "b"]}) == ["# A\nb"]


def test_formulas_become_mathml_and_wide_ones_scroll(hooks):
    content = r'<p>of <span class="arithmatex">\(x_t\)</span></p><div class="arithmatex">\[\left(x\right)\]</div>'
    shown = hooks["on_page_content"](content)
    assert shown.count("<math") == 2 and '<div class="formula"><math' in shown and "arithmatex" not in shown


def test_search_from_the_disk(tmp_path):
    """A small site of the same theme and plugins, opened without a server."""
    browsers = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "iframe-worker.js", tmp_path / "docs")
    (tmp_path / "docs" / "index.md").write_text("# First\n\nNothing.\n")
    (tmp_path / "docs" / "second.md").write_text("# Second\n\nAll about guidance.\n")
    (tmp_path / "mkdocs.yml").write_text(
        "site_name: a\nuse_directory_urls: false\ntheme: {name: material, font: false}\nplugins: [search, offline]\n"
        "extra: {polyfills: [iframe-worker.js]}\n"
    )
    build(load_config(str(tmp_path / "mkdocs.yml")))
    with browsers.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        asked, faults = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto((tmp_path / "site" / "index.html").as_uri())
        page.locator("input.md-search__input").click()
        page.keyboard.type("guidance")
        page.locator(".md-search-result__item").first.wait_for()
        assert "Second" in page.locator(".md-search-result__item").first.inner_text()
        assert not faults and all(url.startswith("file:") for url in asked)
        browser.close()
