"""Figures by subgroup, such as sex, view or hospital, each against the rest."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import ndtr

from tuning.insight.intervals import NORMAL, Figure, entries, overall
from tuning.insight.verdict import holm
from tuning.record.tables import SUBGROUP
from tuning.record.temperature import Floats, Ints

MOST_VALUES = 20  # of a column of words
FEW_VALUES = 6  # from which numbers are taken as they are
PARTS = 4  # of other numbers, of equal size
LEAST_GROUPS = 10  # such as patients, in a subgroup and in the rest, from which they are compared
LEVEL = 0.05  # probability that any difference is flagged if there is none
COMPARED = ("accuracy", "auroc")
UNKNOWN = "unknown"


def values_of(samples: pd.DataFrame) -> tuple[dict[str, list[str]], list[str]]:
    """Return the subgroup of each image by column, and lines on columns that are left out.

    Numbers of many values are divided into parts of equal size.
    """
    found, lines = {}, []
    for column in samples.columns:
        if not str(column).startswith(SUBGROUP):
            continue
        name, cells = str(column).removeprefix(SUBGROUP), samples[column]
        numbers = pd.to_numeric(cells, errors="coerce")
        different = cells.nunique()
        if different > FEW_VALUES and numbers[cells.notna()].notna().all():
            cells = _parts(numbers)
        elif different > MOST_VALUES:
            lines.append(f"subgroups: {name!r} has {different:,} different values, and is left out; group them first")
            continue
        found[name] = cells.where(cells.notna(), UNKNOWN).astype(str).tolist()
    return found, lines


def _parts(numbers: pd.Series) -> pd.Series:
    """Return which part of equal size each number is in, in words; missing where it is."""
    ends = np.unique(np.quantile(numbers.dropna(), np.linspace(0, 1, PARTS + 1)))
    part = np.clip(np.searchsorted(ends, numbers, side="right") - 1, 0, max(len(ends) - 2, 0))
    names = [f"{low:g} to {high:g}" for low, high in pairwise(ends)] or [f"{ends[0]:g}"]
    named = pd.Series([names[index] for index in part], index=numbers.index, dtype=object)
    return named.where(numbers.notna(), None)


def compared(
    probabilities: Floats, targets: Ints, groups: Ints, columns: Mapping[str, Sequence[str]]
) -> tuple[list[dict[str, Any]], int]:
    """Return a row for each subgroup, with its figures as in `intervals.measure`, and the number of comparisons.

    Each is compared with all other images: differences have 95% confidence intervals, and p-values after Holm's
    correction for the number of comparisons; those significant are flagged.

    Args:
        probabilities: [n, classes].
        targets: class indices [n], or labels [n, classes] of 1, 0 and -1 (unknown).
        groups: [n], 0, 1, ...
        columns: the subgroup of each image, by column.
    """
    rows: list[dict[str, Any]] = []
    changes: list[dict[str, Any]] = []
    for column, values in columns.items():
        cells, names = np.array(values, dtype=object), sorted(set(values))
        for value in names:
            inside = cells == value
            sides = [side for side in (inside, ~inside) if side.any()]
            figures = [overall(probabilities[side], targets[side], _numbered(groups[side])) for side in sides]
            seen = [len(np.unique(groups[side])) for side in sides]
            row: dict[str, Any] = {"column": column, "value": value, "images": int(inside.sum()), "groups": seen[0]}
            row |= {name: each for key in COMPARED for name, each in entries(key, figures[0][key]).items()}
            row["differences"] = dict.fromkeys(COMPARED)
            for name in COMPARED if len(sides) == 2 and min(seen) >= LEAST_GROUPS else ():
                row["differences"][name] = _difference(figures[0][name], figures[1][name])
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


def _difference(mine: Figure, others: Figure) -> dict[str, Any] | None:
    """Return the difference of two figures of different images, with its interval and two-sided p-value."""
    if any(np.isnan(figure.observations) or np.isnan(figure.value) for figure in (mine, others)):
        return None
    error = float(np.sqrt(sum(figure.drawn * (1 - figure.drawn) / figure.observations for figure in (mine, others))))
    difference = mine.value - others.value
    bounds = [difference - NORMAL * error, difference + NORMAL * error]
    return {"difference": difference, "difference_95": bounds, "p_value": float(2 * ndtr(-abs(difference) / error))}


def in_words(rows: Sequence[Mapping[str, Any]], comparisons: int) -> list[str]:
    """Return a line for each subgroup that is significantly worse than the rest, the worst first; or that none is."""
    worse = [
        (change["difference"], row, name, change)
        for row in rows
        for name, change in row["differences"].items()
        if change is not None and change["flagged"] and change["difference"] < 0
    ]
    lines = [
        f"{row['column']} {row['value']} ({row['images']:,} images): {name.replace('auroc', 'AUROC')} {row[name]:.3f}, "
        "{:.3f} lower than the rest ({:.3f} to {:.3f}, p = {:.2g} after correction for {} comparisons)".format(
            -difference, -change["difference_95"][1], -change["difference_95"][0], change["p_value"], comparisons
        )
        for difference, row, name, change in sorted(worse, key=lambda each: each[0])
    ]
    return lines or [f"no subgroup is significantly worse than the rest ({comparisons} comparisons)"] * bool(rows)
