"""The class or the labels of each row of a manifest: from a label, a pattern, or columns of ones and zeros."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tuning.record.targets import DOUBT, SIGN, written
from tuning.settings.config import InputError
from tuning.settings.words import count, examples, show

SEPARATORS = ("|", ";", ",")
KNOWN: dict[str, bool | None] = {
    **dict.fromkeys(("0", "no", "false", "n", "f"), False),
    **dict.fromkeys(("1", "yes", "true", "y", "t"), True),
    **dict.fromkeys(("-1", "u", "uncertain"), None),  # as CheXpert and MIMIC-CXR write it
}
UNCERTAIN: dict[str, bool | None] = {"ignore": None, "positive": True, "negative": False}  # what it is taken for
NO_FINDING = ("no finding", "no findings", "no_finding", "nofinding", "none", "normal", "healthy")  # are no labels
Row = Mapping[str, bool | None]  # what is said of an image: which labels it has (True), has not, or perhaps has (None)


def text(value: Any) -> str | None:
    """Return a cell as text; None if it is empty."""
    if value is None or value != value:
        return None
    # pandas makes a column of whole numbers with a gap one of floats: patient 123 must not become 123.0.
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, bytes):  # as Spark and Impala store text
        value = value.decode("utf-8", "backslashreplace")
    return str(value).strip() or None


def _mark(cell: Any) -> str:
    """Return a cell of a label column in one spelling."""
    return re.sub(r"^(-?[01])\.0+$", r"\1", (text(cell) or "").lower())


def one_hot_columns(columns: Mapping[str, Sequence[Any]], others: Sequence[str]) -> list[str]:
    """Return the columns beside `others` if there are several and each row has a 1 in one of them and 0 in the rest."""
    found = [name for name in columns if name not in others]
    rows = zip(*(map(_mark, columns[name]) for name in found), strict=True)
    whole = len(found) > 1 and all(sorted(row) == ["0"] * (len(row) - 1) + ["1"] for row in rows)
    return found if whole and any(columns[name] for name in found) else []


def mark_columns(columns: Mapping[str, Sequence[Any]], others: Sequence[str]) -> list[str]:
    """Return the columns beside `others` that hold nothing but 1, 0, -1 and empty cells, and 1 at least once."""
    marks = {name: set(map(_mark, cells)) for name, cells in columns.items() if name not in others}
    return [name for name, there in marks.items() if "1" in there and there <= {"", "1", "0", "-1"}]


def findings(columns: Mapping[str, Sequence[Any]], names: Sequence[str]) -> list[Row]:
    """Return each row of label columns: 1 is True, 0 False, -1 None; empty cells are left out.

    Raises:
        InputError: cells with other values.
    """
    odd = {name: {mark for cell in columns[name] if (mark := _mark(cell)) and mark not in KNOWN} for name in names}
    if any(odd.values()):
        said = [f"{name!r} ({examples(map(repr, sorted(values)))})" for name, values in odd.items() if values]
        raise InputError(f"label_columns: {', '.join(said)}: must hold 1, 0, -1 (uncertain) or nothing")
    rows = zip(*(map(_mark, columns[name]) for name in names), strict=True)
    return [{name: KNOWN[mark] for name, mark in zip(names, row, strict=True) if mark} for row in rows]


def separator(labels: Sequence[str | None], finding: str | None, *, anywhere: bool = False) -> str | None:
    """Return what separates several labels in one cell; None if each cell is one label.

    With a finding, what separates it from others in any cell. Else commas and semicolons separate where all parts of a
    cell are labels of other images, a vertical bar where any is: `Pneumonia, viral` is one label.

    Args:
        anywhere: whether cells are known to hold several: then a bar or a semicolon always separates.
    """
    alone = set(labels)
    for sign in SEPARATORS:
        for label in alone:
            parts = {part.strip() for part in (label or "").split(sign)}
            if len(parts) > 1 and finding in parts:
                return sign
            if len(parts) > 1 and finding is None and (parts <= alone or (sign == "|" and parts & alone)):
                return sign
            if len(parts) > 1 and anywhere and sign != ",":
                return sign
    return None


def parted(labels: Sequence[str | None], sign: str | None) -> list[Row]:
    """Return the rows of labels in one cell each, with what separates them."""
    return [
        {part.strip(): True for part in ([label] if sign is None else label.split(sign)) if part.strip()}
        if label
        else {}
        for label in labels
    ]


def classes(rows: Sequence[Row]) -> list[str | None]:
    """Return the one label that each row has.

    Raises:
        InputError: rows with none, several or uncertain ones, which are no classes.
    """
    found = [[name for name, there in row.items() if there] for row in rows]
    uncertain = sum(None in row.values() for row in rows)
    several = [each for each in found if len(each) > 1]
    none = sum(not each for each in found)
    what = (
        [f"{count(len(several), 'image')} with several labels, such as {' and '.join(several[0])}"] if several else []
    )
    what += [f"{count(none, 'image')} with none"] if none else []
    what += [f"{count(uncertain, 'image')} with uncertain ones"] if uncertain else []
    if what:
        cure = "train on all labels by `--set multi_label=true`, or tell one from all others by `--set finding=...`"
        raise InputError(f"{', '.join(what)}: {cure}")
    return [each[0] for each in found]


def against_others(rows: Sequence[Row], finding: str, uncertain: str) -> tuple[list[str | None], int]:
    """Return `finding` or `no finding` for each row, None where it is left out, and how many are, being uncertain.

    Args:
        uncertain: `ignore`, `positive` or `negative`.

    Raises:
        InputError: no row has the finding.
    """
    names = {name for row in rows for name in row}
    if finding not in names:
        raise InputError(f"finding: {show(finding)} is no label there; there are {examples(sorted(names))}")
    other = f"no {finding}"
    guessed = {True: finding, False: other, None: None}[UNCERTAIN[uncertain]]
    labels = [
        guessed if finding in row and row[finding] is None else finding if row.get(finding) else other for row in rows
    ]
    return labels, labels.count(None)


def multi_labels(rows: Sequence[Row], uncertain: str, blank: str) -> tuple[list[str], list[str], list[str]]:
    """Return the labels of each row as one text, see `record.targets`, the names of all labels, and lines for the user.

    Args:
        uncertain: what a label that is perhaps there is: `ignore` (unknown), `positive` or `negative`.
        blank: what a label is of which a row says nothing: `negative`, or `ignore`.

    Raises:
        InputError: names of labels that can't be written so.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    none = [name for name in names if name.lower() in NO_FINDING]
    labels = [name for name in names if name not in none]
    if odd := [name for name in labels if SIGN in name or name.endswith(DOUBT)]:
        raise InputError(f"labels: {show(odd[0])} has a {SIGN!r} in it, or a {DOUBT!r} at its end; rename it")
    if not labels:
        raise InputError(f"labels: there are none but {examples(map(repr, none)) or 'empty ones'}")
    guessed = UNCERTAIN[uncertain]
    unsaid = None if blank == "ignore" else False
    texts, blanks, doubts = [], 0, 0
    for row in rows:
        without = any(row.get(name) for name in none)  # says of all others that they are absent
        there: dict[str, bool | None] = {}
        for name in labels:
            if name in row:
                there[name] = guessed if row[name] is None else row[name]
                doubts += row[name] is None
            else:
                there[name] = False if without else unsaid
                blanks += not without
        texts.append(written(there))
    lines = [f"{count(len(labels), 'label')}: {examples(sorted(labels))}"]
    if joined := [name for name in labels if re.search(r"[/+&,\[]", name)]:
        lines.append(f"is {joined[0]!r} one label? Several labels in a cell are separated by | or ;")
    lines += [f"{examples(map(repr, none))} means that no label applies"] if none else []
    if doubts:
        what = {"ignore": "unknown, and left out of losses and figures"}.get(uncertain, uncertain)
        lines.append(f"{count(doubts, 'uncertain label')}: {what} (uncertain={uncertain})")
    if blanks and any(value is False for row in rows for value in row.values()):  # else a list names what is there
        what = "unknown, and left out of losses and figures" if blank == "ignore" else "negative"
        lines.append(f"{count(blanks, 'empty label')}: {what} (blank={blank})")
    return texts, labels, lines


def by_pattern(pattern: str, paths: Sequence[str | None], setting: str) -> list[str | None]:
    """Return what a regular expression's first group, or all of it, matches in each path.

    Raises:
        InputError: it doesn't match all paths.
    """
    matches = [re.search(pattern, path.replace("\\", "/")) if path is not None else None for path in paths]
    lacking = [path for path, match in zip(paths, matches, strict=True) if match is None and path is not None]
    if lacking:
        of = f"{len(lacking):,} of {count(len(paths), 'path')}"
        raise InputError(f"{setting}: {show(pattern)} doesn't match {of} ({examples(lacking)}); widen it")
    return [match and next((group for group in match.groups() if group is not None), match[0]) for match in matches]
