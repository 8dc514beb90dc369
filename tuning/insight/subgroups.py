"""Figures by subgroup, such as sex, view or hospital, each against the rest."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from tuning.insight.intervals import NORMAL, Figure, entries, overall
from tuning.insight.verdict import holm
from tuning.record.targets import by_class
from tuning.record.temperature import Floats, Ints
from tuning.settings.words import count

WORDS = {"balanced_accuracy": "balanced accuracy", "auroc": "AUROC"}
LEAST_GROUPS = 10  # such as patients, in a subgroup and in the rest, from which they are compared
LEVEL = 0.05  # probability that any difference is flagged if there is none
COMPARED = ("balanced_accuracy", "auroc")  # which don't depend on how frequent the classes are in a subgroup


def compared(
    probabilities: Floats, targets: Ints, groups: Ints, columns: Mapping[str, Sequence[str | None]]
) -> tuple[list[dict[str, Any]], int]:
    """Return a row for each subgroup, with its figures as in `intervals.measure`, and the number of comparisons.

    Each is compared with the other images whose subgroup is known: differences have 95% confidence intervals, and
    p-values after Holm's correction for the number of comparisons; those significant are flagged.

    Args:
        probabilities: [n, classes].
        targets: class indices [n], or labels [n, classes] of 1, 0 and -1 (unknown).
        groups: [n], 0, 1, ...
        columns: the subgroup of each image, by column; None where it is unknown.
    """
    rows: list[dict[str, Any]] = []
    changes: list[dict[str, Any]] = []
    for column, values in columns.items():
        cells = np.array(values, dtype=object)
        known = np.array([value is not None for value in values])
        names = sorted({value for value in values if value is not None})
        for value in names:
            inside = cells == value
            sides = [side for side in (inside, known & ~inside) if side.any()]
            figures = [overall(probabilities[side], targets[side], _numbered(groups[side])) for side in sides]
            seen = [len(np.unique(groups[side])) for side in sides]
            row: dict[str, Any] = {"column": column, "value": value, "images": int(inside.sum()), "groups": seen[0]}
            for key in ("accuracy", *COMPARED):
                row |= entries(key, figures[0][key])
            row["differences"] = dict.fromkeys(COMPARED)
            if len(sides) == 2 and min(seen) >= LEAST_GROUPS:
                row["differences"] |= _differences(probabilities, targets, groups, sides)
            rows.append(row)
            if len(names) > 2 or value == names[0]:  # of two, the second's difference is the first's turned round
                changes += [change for change in row["differences"].values() if change is not None]
    for change, adjusted in zip(changes, holm([each["p_value"] for each in changes]), strict=True):
        change |= {"p_value": adjusted, "flagged": adjusted <= LEVEL}
    for before, row in pairwise(rows):
        for name, change in row["differences"].items():
            if change is not None and "flagged" not in change:
                first = before["differences"][name]
                change |= {"p_value": first["p_value"], "flagged": first["flagged"]}
    return rows, len(changes)


def _numbered(groups: Ints) -> Ints:
    return np.unique(groups, return_inverse=True)[1].astype(np.int64)


def _differences(
    probabilities: Floats, targets: Ints, groups: Ints, sides: Sequence[NDArray[np.bool_]]
) -> dict[str, dict[str, Any] | None]:
    """Return the differences of both sides' figures, over what both can be measured by."""
    cells = by_class(targets, probabilities.shape[1])
    judged = np.all([[(cells[side] == value).any(axis=0) for value in (0, 1)] for side in sides], axis=(0, 1))
    if targets.ndim == 2 and judged.any():  # labels that one side lacks would make the means of different labels
        probabilities, targets = probabilities[:, judged], targets[:, judged]
    elif not judged.all():
        return dict.fromkeys(COMPARED)
    mine, others = (overall(probabilities[side], targets[side], _numbered(groups[side])) for side in sides)
    return {name: _difference(mine[name], others[name]) for name in COMPARED}


def _difference(mine: Figure, others: Figure) -> dict[str, Any] | None:
    """Return the difference of two figures of different images, with its interval and two-sided p-value."""
    if any(np.isnan(figure.observations) or np.isnan(figure.value) for figure in (mine, others)):
        return None
    error = float(np.sqrt(sum(figure.drawn * (1 - figure.drawn) / figure.observations for figure in (mine, others))))
    difference = mine.value - others.value
    bounds = [difference - NORMAL * error, difference + NORMAL * error]
    return {"difference": difference, "difference_95": bounds, "p_value": float(2 * ndtr(-abs(difference) / error))}


def worse(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], str, Mapping[str, Any]]]:
    """Return the subgroups that are significantly worse than the rest, each with the figure and its difference."""
    return [
        (row, name, change)
        for row in rows
        for name, change in row["differences"].items()
        if change is not None and change["flagged"] and change["difference"] < 0
    ]


def in_words(rows: Sequence[Mapping[str, Any]], comparisons: int) -> list[str]:
    """Return a line for each subgroup that is significantly worse than the rest, the worst first; or that none is."""
    tests = count(comparisons, "comparison")
    alone = [
        column
        for column in dict.fromkeys(row["column"] for row in rows)
        if not any(change for row in rows if row["column"] == column for change in row["differences"].values())
    ]
    too_few = f"fewer than {LEAST_GROUPS} patients or images, or not all classes, on one side"
    not_compared = [f"not compared: {', '.join(alone)} ({too_few})"] if alone else []
    lines = []
    for row, name, change in sorted(worse(rows), key=lambda each: each[2]["difference"]):
        low, high = (-bound for bound in reversed(change["difference_95"]))
        shown = f"{WORDS[name]} {row[name]:.3f}, {-change['difference']:.3f} lower than the rest"
        how_sure = f"({low:.3f} to {high:.3f}, p = {change['p_value']:.3g} after correction for {tests})"
        lines.append(f"{row['column']} {row['value']} ({count(row['images'], 'image')}): {shown} {how_sure}")
    if comparisons and not lines:
        lines.append(f"no subgroup is significantly worse than the rest ({tests})")
    return lines + not_compared
