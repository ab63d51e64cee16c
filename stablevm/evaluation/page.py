"""Writing self-contained HTML pages about a run: headline numbers, pictures, metrics, commands and protocol.

Pictures are embedded as data URIs, style and script are inline, and a content policy forbids anything else, so the
file can be mailed, archived and opened without a network connection.
"""

import base64
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from types import MappingProxyType

from stablevm.support.errors import UserError
from stablevm.support.files import write_text

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXELS_PER_CSS_PIXEL = 2  # pictures are drawn for dense displays (figures.style)

NUMBER = re.compile(r"[-+]?\d[\d,.]*(e[-+]?\d+)?%?( ± [\d.]+)?")
NUMERIC = ' class="number"'  # of cells and of the heads of their columns
Value = str | int | float


@dataclass(frozen=True)
class Figure:
    """PNG pictures with their heading and a few sentences about them: side by side on a wide page, one below another on
    a phone.
    """

    title: str
    paths: Sequence[Path]
    caption: str


def write_page(
    path: str | Path,
    *,
    title: str,
    introduction: str = "",
    summary: Mapping[str, Value],
    figures: Sequence[Figure],
    metrics_table: Sequence[Sequence[Value]],
    commands: Sequence[str],
    protocol: Mapping[str, Value],
    tables: Mapping[str, Sequence[Sequence[Value]]] = MappingProxyType({}),
    notes: Sequence[str] = (),
    links: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write the page to `path`.

    `introduction` says in a sentence or two what the page is about; the time of writing follows it. `summary` holds the
    headline numbers by name; the first row of `metrics_table` holds its column names. Floats are shown with four
    significant digits, text is escaped. `tables` holds further tables by title, `notes` warnings to read before the
    numbers, and `links` addresses, or files beside the page, by link text. UserError for a picture that is missing or
    is not a PNG.
    """
    written = datetime.now(UTC).strftime("%-d %B %Y, %H:%M UTC")
    sections = [
        *([_section("Read this first", "".join(f"<p>{escape(note)}</p>\n" for note in notes))] if notes else []),
        *(_section(figure.title, _pictures(figure)) for figure in figures),
        _section("Metrics", _table(metrics_table)),
        *(_section(title, _table(rows)) for title, rows in tables.items()),
        *([_section("Repeat it by hand", "".join(map(_command, commands)))] if commands else []),
        _section("Protocol", _definitions(protocol)),
        *([_section("Further", _links(links))] if links else []),
    ]
    write_text(
        path,
        "<!DOCTYPE html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{escape(title)}</h1>\n<p>{escape(introduction)} <time>{written}</time></p>\n{_cards(summary)}"
        "</header>\n" + "".join(sections) + f"</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n",
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>\n"


def _cards(summary: Mapping[str, Value]) -> str:
    cards = (
        f'<div class="card"><dt>{escape(name)}</dt><dd>{_shown(value)}</dd></div>\n' for name, value in summary.items()
    )
    return f'<dl class="cards">\n{"".join(cards)}</dl>\n'


def _pictures(figure: Figure) -> str:
    images = "".join(_picture(path, figure.title) for path in figure.paths)
    pictures = f'<div class="pictures">\n{images}</div>' if images else ""
    return f"<figure>{pictures}<figcaption>{escape(figure.caption)}</figcaption></figure>\n"


def _picture(path: Path, title: str) -> str:
    data, width, height = _read_png(path)
    width, height = width // PIXELS_PER_CSS_PIXEL, height // PIXELS_PER_CSS_PIXEL
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return f'<img src="{source}" width="{width}" height="{height}" alt="{escape(title)}: {escape(path.stem)}">\n'


def _read_png(path: Path) -> tuple[bytes, int, int]:
    """The file's bytes, its width and its height, which a PNG holds in bytes 16 to 24 (PNG, section 11.2.1)."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"page: no picture {path}; plot it before the page is written") from None
    if not data.startswith(PNG_SIGNATURE):
        raise UserError(f"page: {path} is not a PNG picture")
    return data, *struct.unpack(">II", data[16:24])


def _table(rows: Sequence[Sequence[Value]]) -> str:
    head, *body = rows
    columns = "".join(
        f'<th scope="col"{any(map(_is_number, cells)) * NUMERIC}>{escape(str(name))}</th>'
        for name, *cells in zip(head, *body, strict=True)
    )
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in body)
    return f'<div class="wide"><table>\n<thead><tr>{columns}</tr></thead>\n<tbody>\n{lines}</tbody>\n</table></div>\n'


def _cell(value: Value) -> str:
    return f"<td{_is_number(value) * NUMERIC}>{_shown(value)}</td>"


def _is_number(value: Value) -> bool:
    """Whether a value is shown as a number."""
    return NUMBER.fullmatch(_shown(value)) is not None


def _command(command: str) -> str:
    # A browser would also break lines at the hyphens within options; each word in a span of its own stays whole.
    words = re.sub(r"\S+", lambda word: f"<span>{escape(word[0])}</span>", command)
    return f'<div class="command"><pre><code>{words}</code></pre><button type="button" hidden>Copy</button></div>\n'


def _definitions(protocol: Mapping[str, Value]) -> str:
    items = (f"<dt>{escape(name)}</dt><dd>{_shown(value)}</dd>\n" for name, value in protocol.items())
    return f'<dl class="protocol">\n{"".join(items)}</dl>\n'


def _links(links: Mapping[str, str]) -> str:
    items = (f'<li><a href="{escape(address)}">{escape(text)}</a></li>\n' for text, address in links.items())
    return f"<ul>\n{''.join(items)}</ul>\n"


def _shown(value: Value) -> str:
    return escape(f"{value:.4g}" if isinstance(value, float) else str(value))


STYLE = """
:root {
  --page: #f5f7fa; --panel: #ffffff; --ink: #1f2933; --soft: #52606d; --line: #e4e7eb; --accent: #0b69a3;
  --code: #f0f4f8; --shadow: 0 1px 2px rgb(16 42 67 / 6%), 0 4px 16px rgb(16 42 67 / 5%);
  color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12171d; --panel: #1b222a; --ink: #e4e7eb; --soft: #9aa5b1; --line: #2d3741; --accent: #6cb8ea;
    --code: #141a20; --shadow: none;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
}
main { max-width: 1096px; margin: 0 auto; padding: 48px 24px 64px; }
h1 { margin: 0 0 28px; font-size: clamp(1.6rem, 4vw, 2.2rem); line-height: 1.2; letter-spacing: -0.015em; }
h2 { margin: 0 0 16px; font-size: 1.15rem; line-height: 1.3; }
header p { margin: -12px 0 28px; max-width: 76ch; }
header time { color: var(--soft); white-space: nowrap; }
a { color: var(--accent); }
ul { margin: 0; padding-left: 1.2em; }
section, .card {
  background: var(--panel); border: 1px solid var(--line); border-radius: 14px; box-shadow: var(--shadow);
}
section { margin-top: 24px; padding: 24px; }
dl, dd, figure { margin: 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 14px; }
.card { padding: 16px; display: flex; flex-direction: column; justify-content: space-between; gap: 4px; }
.card dt { color: var(--soft); font-size: 0.85rem; line-height: 1.35; }
.card dd {
  font-size: 1.5rem; font-weight: 650; line-height: 1.25; letter-spacing: -0.02em; color: var(--accent);
  white-space: nowrap;
}
.card dd, .number { font-variant-numeric: tabular-nums; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; border-radius: 8px; background: #fff; }
figcaption { margin-top: 14px; color: var(--soft); font-size: 0.92rem; max-width: 76ch; }
.pictures { display: flex; flex-wrap: wrap; justify-content: center; gap: 20px; }
.pictures img { flex: 0 1 auto; min-width: 0; margin: 0; }
.wide { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 0.95rem; }
th, td { padding: 9px 20px 9px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-size: 0.85rem; font-weight: 600; }
th:last-child, td:last-child { padding-right: 0; }
tbody tr:last-child td { border-bottom: 0; }
.number { text-align: right; }
td.number { white-space: nowrap; }
td:first-child { position: sticky; left: 0; background: var(--panel); }
.command { position: relative; margin-top: 12px; }
pre {
  margin: 0; padding: 14px 92px 14px 16px; border-radius: 10px; background: var(--code);
  border: 1px solid var(--line); white-space: pre-wrap; overflow-wrap: anywhere;
}
code { font: 0.86rem/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code span { display: inline-block; max-width: 100%; }
button {
  position: absolute; top: 8px; right: 8px; padding: 5px 12px; border-radius: 7px; cursor: pointer;
  border: 1px solid var(--line); background: var(--panel); color: var(--soft); font: inherit; font-size: 0.8rem;
}
button:hover, button:focus-visible { color: var(--accent); border-color: var(--accent); }
.protocol { display: grid; grid-template-columns: minmax(140px, max-content) 1fr; gap: 8px 24px; font-size: 0.95rem; }
.protocol dt { color: var(--soft); }
.protocol dd { overflow-wrap: anywhere; }
@media (max-width: 560px) {
  main { padding: 28px 14px 40px; }
  section { padding: 18px 16px; }
  .cards { grid-template-columns: 1fr 1fr; gap: 12px; }
  .pictures img { width: 100%; }
  table { min-width: 640px; }
  td:last-child:not(.number) { min-width: 18rem; }
  pre { padding: 46px 14px 14px; }
  .protocol { grid-template-columns: 1fr; gap: 2px; }
  .protocol dd { margin-bottom: 10px; }
}
@media print {
  body { background: #fff; }
  section, .card { box-shadow: none; break-inside: avoid; }
}
"""

# The buttons stay hidden where the browser offers no clipboard to a page (an old one, or plain HTTP).
SCRIPT = """
if (navigator.clipboard) {
  for (const button of document.querySelectorAll(".command button")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(button.previousElementSibling.textContent);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }
}
"""
