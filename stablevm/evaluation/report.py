"""One self-contained HTML page about a run: headline numbers, pictures, metrics, commands and protocol.

Pictures travel inside the page as data URIs, style and script are inline, and a content policy forbids the rest, so
the file can be mailed, archived and opened without a network.
"""

import base64
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from types import MappingProxyType

from stablevm.evaluation.report_style import SCRIPT, STYLE
from stablevm.support.errors import UserError
from stablevm.support.files import write_text

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXELS_PER_CSS_PIXEL = 2  # pictures are drawn for dense displays (figures.py)

Value = str | int | float


@dataclass(frozen=True)
class Figure:
    """A PNG picture with its heading and one or two sentences about it."""

    title: str
    path: Path
    caption: str


def write_report(
    path: str | Path,
    *,
    title: str,
    summary: Mapping[str, Value],
    figures: Sequence[Figure],
    metrics_table: Sequence[Sequence[Value]],
    commands: Sequence[str],
    protocol: Mapping[str, Value],
    tables: Mapping[str, Sequence[Sequence[Value]]] = MappingProxyType({}),
    notes: Sequence[str] = (),
) -> None:
    """Write the page to `path`.

    `summary` are the headline numbers by name; the first row of `metrics_table` holds its column names. Floats are
    shown with four significant digits, text as it is given, escaped. `tables` are further ones by title, `notes` are
    warnings to read before the numbers. UserError for a picture that is absent or no PNG.
    """
    sections = [
        *([_section("Read this first", "".join(f"<p>{escape(note)}</p>\n" for note in notes))] if notes else []),
        *(_section(figure.title, _picture(figure)) for figure in figures),
        _section("Metrics", _table(metrics_table)),
        *(_section(title, _table(rows)) for title, rows in tables.items()),
        *([_section("Repeat it by hand", "".join(map(_command, commands)))] if commands else []),
        _section("Protocol", _definitions(protocol)),
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
        f"<header><h1>{escape(title)}</h1>\n{_cards(summary)}</header>\n"
        + "".join(sections)
        + f"</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n",
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>\n"


def _cards(summary: Mapping[str, Value]) -> str:
    cards = (
        f'<div class="card"><dt>{escape(name)}</dt><dd>{_shown(value)}</dd></div>\n' for name, value in summary.items()
    )
    return f'<dl class="cards">\n{"".join(cards)}</dl>\n'


def _picture(figure: Figure) -> str:
    data, width, height = _read_png(figure.path)
    size = f'width="{width // PIXELS_PER_CSS_PIXEL}" height="{height // PIXELS_PER_CSS_PIXEL}"'
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return (
        f'<figure><div class="picture"><img src="{source}" {size} alt="{escape(figure.title)}"></div>'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>\n"
    )


def _read_png(path: Path) -> tuple[bytes, int, int]:
    """The file's bytes, its width and its height, which a PNG holds in bytes 16 to 24 (PNG, section 11.2.1)."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"report: no picture {path}; draw it before the report is written") from None
    if not data.startswith(PNG_SIGNATURE):
        raise UserError(f"report: {path} is not a PNG picture")
    return data, *struct.unpack(">II", data[16:24])


def _table(rows: Sequence[Sequence[Value]]) -> str:
    head, *body = rows
    columns = "".join(f'<th scope="col">{escape(str(name))}</th>' for name in head)
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in body)
    return f'<div class="wide"><table>\n<thead><tr>{columns}</tr></thead>\n<tbody>\n{lines}</tbody>\n</table></div>\n'


def _cell(value: Value) -> str:
    return f"<td>{_shown(value)}</td>" if isinstance(value, str) else f'<td class="number">{_shown(value)}</td>'


def _command(command: str) -> str:
    # A browser would also break lines at the hyphens within options; each word in a span of its own stays whole.
    words = re.sub(r"\S+", lambda word: f"<span>{escape(word[0])}</span>", command)
    return f'<div class="command"><pre><code>{words}</code></pre><button type="button" hidden>Copy</button></div>\n'


def _definitions(protocol: Mapping[str, Value]) -> str:
    items = (f"<dt>{escape(name)}</dt><dd>{_shown(value)}</dd>\n" for name, value in protocol.items())
    return f'<dl class="protocol">\n{"".join(items)}</dl>\n'


def _shown(value: Value) -> str:
    return escape(f"{value:.4g}" if isinstance(value, float) else str(value))
