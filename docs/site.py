"""The hooks of `mkdocs build`: the site is README.md and all that links reach from there, at the paths they have here.

So every relative link means the same on a code host and on the site, and MkDocs checks it.
"""

import html
import os.path
import re
from pathlib import Path, PurePosixPath

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(([^)\s#:]+)")
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


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The theme's own files, and what can be reached from the README."""
    theme = [file for file in files if file.src_dir != config.docs_dir]
    place = {"src_dir": str(ROOT), "dest_dir": config.site_dir, "use_directory_urls": config.use_directory_urls}
    uris = sorted(reachable({"README.md", *map(str, config.extra_css)}))
    return Files([*theme, *((Listing if uri.endswith(".py") else File)(uri, **place) for uri in uris)])


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


def on_page_content(content: str, **_: object) -> str:
    """Formulas become MathML, which browsers draw by themselves: no script, nothing fetched."""
    return FORMULA.sub(lambda formula: convert(html.unescape(formula[2]), display=DISPLAY[formula[1]]), content)
