"""The class of each row of a manifest: from a label, a pattern, or columns of zeros and ones."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tuning.settings.config import InputError
from tuning.settings.words import count, examples, show

SEPARATORS = ("|", ";", ",")
NO, YES = {"0", "0.0", "no", "false", "n", "f"}, {"1", "1.0", "yes", "true", "y", "t"}
UNCERTAIN = {"-1", "-1.0", "u", "uncertain"}  # as CheXpert and MIMIC-CXR write it
SEVERAL = 0.05  # share of the images with several labels from which a column is one of several


def one_hot_columns(columns: Mapping[str, Sequence[Any]], others: Sequence[str]) -> list[str]:
    """Return the columns that are 1 for one class and 0 for all others in every row; none if there are no two such."""
    found = [
        name
        for name, cells in columns.items()
        if name not in others and cells and {_cell(cell) for cell in cells} == {"0", "1"}
    ]
    rows = zip(*(columns[name] for name in found), strict=True)
    alone = all(sum(_cell(cell) == "1" for cell in row) == 1 for row in rows)
    return found if len(found) > 1 and alone else []


def findings(columns: Mapping[str, Sequence[Any]], names: Sequence[str]) -> list[dict[str, bool | None]]:
    """Return for each row the label columns that are 1 (True), 0 (False) or uncertain (None); empty cells are none.

    Raises:
        InputError: cells with other values.
    """
    known = {**dict.fromkeys(NO, False), **dict.fromkeys(YES, True), **dict.fromkeys(UNCERTAIN, None)}
    odd = {name: {text for cell in columns[name] if (text := _cell(cell)) and text not in known} for name in names}
    if any(odd.values()):
        said = [f"{name!r} ({examples(map(repr, sorted(values)))})" for name, values in odd.items() if values]
        raise InputError(f"label_columns: {', '.join(said)}: must hold 1, 0, -1 (uncertain) or nothing")
    rows = zip(*(columns[name] for name in names), strict=True)
    return [{name: known[text] for name, cell in zip(names, row, strict=True) if (text := _cell(cell))} for row in rows]


def _cell(cell: Any) -> str:
    """Return a cell of a label column as text, in one spelling."""
    text = "" if cell is None or cell != cell else str(cell).strip().lower()
    return {"0.0": "0", "1.0": "1", "-1.0": "-1"}.get(text, text)


def separator(labels: Sequence[str | None]) -> str | None:
    """Return what separates labels, if a share of the images has several whose parts are labels of others, too."""
    single = Counter(labels)
    for sign in SEPARATORS:
        several = [label for label in labels if label is not None and sign in label]
        alone = [label for label in several if any(part.strip() in single for part in label.split(sign))]
        if several and len(several) >= SEVERAL * len(labels) and len(alone) >= len(several) / 2:
            return sign
    return None


def parted(labels: Sequence[str | None], sign: str) -> list[dict[str, bool | None]]:
    """Return each row's labels as `findings` does."""
    return [{part.strip(): True for part in (label or "").split(sign) if part.strip()} for label in labels]


def classes(rows: Sequence[Mapping[str, bool | None]], where: str) -> list[str | None]:
    """Return the one finding that each row has.

    Raises:
        InputError: rows with none or several, which are no classes.
    """
    found = [[name for name, there in row.items() if there] for row in rows]
    wrong = Counter(min(len(each), 2) for each in found if len(each) != 1)
    if wrong:
        first = " and ".join(next((each for each in found if len(each) > 1), []))
        several, none = count(wrong[2], "image"), count(wrong[0], "image")
        what = [f"{several} with several labels, such as {first}"] if wrong[2] else []
        what += [f"{none} with none"] if wrong[0] else []
        raise InputError(
            f"{where}: {', '.join(what)}: name one of them, `--set finding=...`, to tell it from all others"
        )
    return [each[0] for each in found]


def against_others(
    rows: Sequence[Mapping[str, bool | None]], finding: str, uncertain: str, where: str
) -> tuple[list[str | None], int]:
    """Return `finding` or `no finding` for each row, None where it is left out, and how many are, being uncertain.

    Args:
        uncertain: `ignore`, `positive` or `negative`.

    Raises:
        InputError: no row has the finding.
    """
    names = {name for row in rows for name in row}
    if finding not in names:
        raise InputError(f"finding: {show(finding)} is no label of {where}; it has {examples(sorted(names))}")
    other = f"no {finding}"
    guessed = {"ignore": None, "positive": finding, "negative": other}[uncertain]
    labels = [
        guessed if finding in row and row[finding] is None else finding if row.get(finding) else other for row in rows
    ]
    return labels, labels.count(None)


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
