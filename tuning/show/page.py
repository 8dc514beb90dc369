"""Build self-contained HTML pages: text escaped, data, styles and scripts inlined."""

import base64
import gzip
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tuning.settings.config import visible
from tuning.show.frames import cells

SHORT = 20  # characters of a cell that is kept on one line


def text(value: object) -> str:
    """Escape a value as HTML text; control characters are made visible."""
    return html.escape(visible(value))


def table(frame: pd.DataFrame, title: str = "") -> str:
    """Render a frame as a table below its title: columns are the headings; numbers are aligned right."""
    columns = list(cells(frame))
    head = "".join(_cell("th", heading, numeric) for heading, _, numeric in columns)
    body = [[_cell("td", value, numeric) for value in values] for _, values, numeric in columns]
    rows = "".join(f"<tr>{''.join(row)}</tr>" for row in zip(*body, strict=True))
    above = f"<h3>{text(title)}</h3>" if title else ""
    return f'{above}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(tag: str, value: str, numeric: bool) -> str:
    kind = "number" if numeric else "short" if len(value) <= SHORT else "long"
    return f'<{tag} class="{kind}">{text(value)}</{tag}>'


def section(anchor: str, title: str, *parts: str) -> str:
    """Return a section of the page; the other parts are HTML."""
    return f'<section id="{anchor}"><h2>{text(title)}</h2>{"".join(parts)}</section>'


def note(words: str) -> str:
    """Return a paragraph in a quieter tone."""
    return f'<p class="note">{text(words)}</p>'


def figure(name: str, label: str) -> str:
    """Return the element in which report.js draws the figure of this name; `label` is for screen readers."""
    return f'<div class="figure" data-figure="{name}" role="img" aria-label="{text(label)}"></div>'


def column(values: pd.Series, digits: int) -> list[Any]:
    """Prepare a column for JSON: floats to `digits` significant digits, whole ones as ints, None if not finite."""
    if not pd.api.types.is_numeric_dtype(values):
        return [None if pd.isna(value) else value for value in values]
    numbers = values.to_numpy(np.float64, na_value=np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = 10.0 ** (digits - 1 - np.floor(np.log10(np.abs(numbers))))
        whole = (numbers == np.round(numbers)) | ~np.isfinite(scale)
        short = np.where(whole, numbers, np.round(numbers * scale) / scale)
    return [
        None if not math.isfinite(value) else int(value) if value.is_integer() else value for value in short.tolist()
    ]


def columns(frame: pd.DataFrame, digits: int = 6) -> dict[str, list[Any]]:
    """Prepare a table for JSON, column by column."""
    return {str(name): column(frame[name], digits) for name in frame}


def page(title: str, body: Sequence[str], data: Mapping[str, Any], history: Mapping[str, Any]) -> str:
    """Build a page of sections, with the data of its figures, and the history of trials that it unpacks on demand."""
    parts = {
        "js": _file("report.js") + _file("trials.js"),
        "data": _json(data).translate({ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&"}),
        "history": packed(_json(history).encode()),
        "plotly": _plotly(),
    }
    return _filled(_file("report.html"), title, body, **parts)


def still(title: str, body: Sequence[str], css: str = "") -> str:
    """Build a page of sections in the same style, with additional styles and without scripts."""
    template = re.sub(r"\n<(script|noscript).*?</\1>", "", _file("report.html"), flags=re.DOTALL)
    return _filled(template.replace("script-src 'unsafe-inline'; ", "").replace(" blob:", ""), title, body, css)


def _filled(template: str, title: str, body: Sequence[str], css: str = "", **parts: str) -> str:
    parts |= {"title": text(title), "body": "\n".join(body), "css": _file("report.css") + css}
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)  # in one pass: parts may hold braces


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def packed(content: bytes) -> str:
    """Compress by gzip, as base64 text."""
    return base64.b64encode(gzip.compress(content, compresslevel=6, mtime=0)).decode()


@cache
def _plotly() -> str:
    """Return Plotly's script, packed: 2 of its 4.8 MB."""
    from plotly.offline import get_plotlyjs

    return packed(get_plotlyjs().encode())
