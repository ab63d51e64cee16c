"""The hooks of `mkdocs build`: the site is README.md and all that links reach from there, at the paths they have here.

So every relative link means the same on a code host and on the site, and MkDocs checks it.
"""

import html
import json
import os.path
import re
from pathlib import Path, PurePosixPath
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
FONT = ("docs/fonts/noto-sans-math.woff2", "docs/fonts/OFL.txt")  # of the formulas, with its licence
LINK = re.compile(r"\]\(([^)\s#:]+)")
# A link whose text is the name of a page's file or folder, as they read well on a code host.
NAMED_BY_FILE = re.compile(r"\[(?:[\w.-]+/)*(?:[\w-]+\.md)?\]\(([^)\s#]+\.md)(#[^)\s]+)?\)")
FENCED = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
# What pymdownx.arithmatex leaves of $...$ and of a block ```math: LaTeX between \( \) or \[ \].
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
DISPLAY = {"span": "inline", "div": "block"}


class Listing(File):
    """A source file as a page."""

    def is_documentation_page(self) -> bool:
        return True

    @property
    def content_string(self) -> str:
        head = "---\nsearch: {exclude: true}\nhide: [navigation, toc]\n---\n"
        return f"{head}# {self.src_uri}\n\n````python\n{(ROOT / self.src_uri).read_text()}\n````\n"


class Notebook(File):
    """A notebook as a page: its text, its code, and what the code printed and drew."""

    def is_documentation_page(self) -> bool:
        return True

    @property
    def content_string(self) -> str:
        cells = json.loads((ROOT / self.src_uri).read_text())["cells"]
        return "\n\n".join(part for cell in cells for part in shown_cell(cell)) + "\n"


def shown_cell(cell: dict[str, Any]) -> list[str]:
    """Blocks of Markdown for a cell of a notebook."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    blocks = [f"````python\n{source}\n````"]
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data:
            picture = "".join(data["image/png"]).replace("\n", "")
            blocks.append(f"![What the code above draws](data:image/png;base64,{picture})")
        elif text := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
            blocks.append(f"````text\n{text}\n````")
    return blocks


PAGES = {".py": Listing, ".ipynb": Notebook}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The theme's own files, and what can be reached from the README."""
    theme = [file for file in files if file.src_dir != config.docs_dir]
    place = {"src_dir": str(ROOT), "dest_dir": config.site_dir, "use_directory_urls": config.use_directory_urls}
    own = {"README.md", *FONT, *map(str, config.extra_css), *config.extra["polyfills"]}
    uris = sorted(reachable(own))
    return Files([*theme, *(PAGES.get(PurePosixPath(uri).suffix, File)(uri, **place) for uri in uris)])


def reachable(start: set[str]) -> set[str]:
    """Paths below ROOT of the files to start from and of those that pages among them lead to, pictures and code too."""
    found: set[str] = set()
    waiting = list(start)
    while waiting:
        uri = waiting.pop()
        if uri in found or not (ROOT / uri).is_file():  # MkDocs tells of a link that leads nowhere
            continue
        found.add(uri)
        if uri.endswith(".md"):
            links = LINK.findall((ROOT / uri).read_text())
            waiting += [os.path.normpath(PurePosixPath(uri).parent / link) for link in links]
    return found


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Links named by a file get the title of the page that they lead to; those of code blocks stay."""
    here = PurePosixPath(page.file.src_uri).parent

    def titled(link: re.Match[str]) -> str:
        path, anchor = link[1], link[2] or ""
        return f"[{title_of(ROOT / os.path.normpath(here / path), anchor.lstrip('#'))}]({path}{anchor})"

    parts = FENCED.split(markdown)
    return "".join(part if part.startswith("```") else NAMED_BY_FILE.sub(titled, part) for part in parts)


def title_of(path: Path, anchor: str) -> str:
    """The first heading of a page, and that of the section which is meant; the file's name where there is none."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", path.read_text()), flags=re.MULTILINE) if path.is_file() else []
    wanted = [heading for heading in headings if slug(heading) == anchor]
    return ": ".join([*headings[:1], *wanted[:1]]) or path.name


def slug(heading: str) -> str:
    """The anchor that a heading gets, on a code host as on the site."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def on_page_content(content: str, **_: object) -> str:
    """Formulas become MathML, which browsers draw by themselves: no script, nothing fetched."""

    def drawn(formula: re.Match[str]) -> str:
        drawing = convert(html.unescape(formula[2]), display=DISPLAY[formula[1]])
        return f'<div class="formula">{drawing}</div>' if formula[1] == "div" else drawing

    return FORMULA.sub(drawn, content)
