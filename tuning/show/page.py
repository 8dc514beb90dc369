"""One self-contained HTML page: text escaped, numbers shortened, data and scripts inlined."""

import base64
import gzip
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tuning.settings.config import visible

HERE = Path(__file__).parent
SHORT = 16  # characters of a cell that isn't broken


def text(value: object) -> str:
    """Anything as HTML text; control characters are made visible."""
    return html.escape(visible(value))


def number(value: Any, digits: int = 4) -> str:
    """A float with so many decimals, fewer for great ones, an int with thousands parted, a dash for null."""
    if value is None or value != value:
        return "-"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.{digits}f}" if 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"
    return f"{int(value):,}"


def duration(seconds: float) -> str:
    """Seconds as 42 s, 3.5 min or 1.2 h."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """An HTML table; numbers stand to the right.

    Args:
        rows: values by key.
        columns: heading by key, in order.
    """
    cells = [[row[key] for key in columns] for row in rows]
    right = [all(map(_is_number, values)) for values in zip(*cells, strict=True)] or [False] * len(columns)
    head = "".join(_cell("th", label, to_right) for label, to_right in zip(columns.values(), right, strict=True))
    body = "".join(f"<tr>{''.join(map(_cell, ['td'] * len(row), row, right))}</tr>" for row in cells)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, int | float)


def _cell(tag: str, value: Any, to_right: bool) -> str:
    words = number(value) if _is_number(value) else text(value)
    kind = "number" if to_right else "short" if len(words) <= SHORT else "long"
    return f'<{tag} class="{kind}">{words}</{tag}>'


def section(anchor: str, title: str, *parts: str) -> str:
    """A section of the page."""
    return f'<section id="{anchor}"><h2>{text(title)}</h2>{"".join(parts)}</section>'


def note(words: str) -> str:
    """A paragraph in a quieter tone."""
    return f'<p class="note">{text(words)}</p>'


def figure(name: str, label: str) -> str:
    """Where report.js draws the figure of this name."""
    return f'<div class="figure" data-figure="{name}" role="img" aria-label="{text(label)}"></div>'


def column(values: pd.Series, digits: int) -> list[Any]:
    """A column for JSON: floats to so many significant digits, whole ones as ints, null where missing or infinite."""
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
    """A table for JSON, column by column."""
    return {str(name): column(frame[name], digits) for name in frame}


def page(title: str, body: Sequence[str], data: Mapping[str, Any], history: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        title: of the window.
        body: sections in HTML.
        data: what report.js draws at once.
        history: what it reads when someone asks for a trial; packed.
    """
    parts = {
        "title": text(title),
        "body": "\n".join(body),
        "css": (HERE / "report.css").read_text(encoding="utf-8"),
        "js": (HERE / "report.js").read_text(encoding="utf-8"),
        "data": _json(data).translate({ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&"}),
        "history": packed(_json(history).encode()),
        "plotly": _plotly(),
    }
    template = (HERE / "report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)  # in one pass: parts may hold braces


def still(title: str, body: Sequence[str], css: str = "") -> str:
    """A whole page without scripts or figures, in the same style.

    Args:
        title: of the window.
        body: sections in HTML.
        css: more of the style.
    """
    style = (HERE / "report.css").read_text(encoding="utf-8") + css
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<title>{text(title)}</title>\n'
        f'<link rel="icon" href="data:,">\n<style>{style}</style>\n</head>\n<body>\n<main>\n'
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def packed(content: bytes) -> str:
    """Gzipped, as text."""
    return base64.b64encode(gzip.compress(content, compresslevel=6, mtime=0)).decode()


@cache
def _plotly() -> str:
    """Plotly's script, packed: 2 of its 4.8 MB."""
    from plotly.offline import get_plotlyjs

    return packed(get_plotlyjs().encode())
