"""Columns of a table of samples by which figures are given: the subgroup of each image, such as sex or hospital."""

import numpy as np
import pandas as pd

from tuning.record.tables import SUBGROUP

MOST_VALUES = 20  # of a column of words
FEW_VALUES = 6  # from which numbers are taken as they are
PARTS = 4  # of other numbers, of equal size


def subgroups_of(samples: pd.DataFrame) -> tuple[dict[str, list[str | None]], list[str]]:
    """Return the subgroup of each image by column, None where a cell is empty, and lines on columns that are left out.

    Numbers of many values are divided into parts of equal size.
    """
    found: dict[str, list[str | None]] = {}
    lines = []
    for column in samples.columns:
        if not str(column).startswith(SUBGROUP):
            continue
        name, cells = str(column).removeprefix(SUBGROUP), samples[column]
        numbers = pd.to_numeric(cells, errors="coerce")
        different = cells.nunique()
        if different > FEW_VALUES and numbers[cells.notna()].notna().all():
            cells = _parts(numbers)
        elif different > MOST_VALUES:
            cure = f"give at most {MOST_VALUES} words, or numbers"
            lines.append(f"subgroups: {name!r} is left out: it has {different:,} different values; {cure}")
            continue
        found[name] = cells.astype(object).where(cells.notna(), None).tolist()
    return found, lines


def _parts(numbers: pd.Series) -> pd.Series:
    """Return which part of equal size each number is in, in words; missing where it is."""
    ends = np.unique(np.quantile(numbers.dropna(), np.linspace(0, 1, PARTS + 1)))
    whole = bool((numbers.dropna() % 1 == 0).all())
    lows = np.ceil(ends) if whole else ends
    highs = np.append(lows[1:-1] - 1, ends[-1:]) if whole else ends[1:]
    part = np.clip(np.searchsorted(ends, numbers, side="right") - 1, 0, max(len(ends) - 2, 0))
    names = [f"{low:g} to {high:g}" for low, high in zip(lows[:-1], highs, strict=True)] or [f"{ends[0]:g}"]
    named = pd.Series([names[index] for index in part], index=numbers.index, dtype=object)
    return named.where(numbers.notna(), None)
