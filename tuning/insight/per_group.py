"""Figures per group, such as a patient or a study, from the predictions for its images."""

from typing import Any, Literal, get_args

import numpy as np

from tuning.insight.intervals import measure
from tuning.record.temperature import Floats, Ints
from tuning.settings.config import InputError
from tuning.settings.words import count, show

By = Literal["mean", "max"]


def grouped(probabilities: Floats, targets: Ints, groups: Ints, by: By) -> tuple[Floats, Ints, int]:
    """Return probabilities and targets of groups, and how many groups are left out.

    A group's probability is the mean or the maximum of its images'; those of classes are made to add up to 1 again. It
    has the labels that any of its images has; groups with images of several classes are left out.

    Args:
        probabilities: [n, classes].
        targets: class indices [n], or labels [n, classes] of 1, 0 and -1 (unknown).
        groups: [n], 0, 1, ...
        by: `mean` or `max`.
    """
    total = int(groups.max()) + 1
    found = np.zeros((total, probabilities.shape[1]))
    if by == "mean":
        np.add.at(found, groups, probabilities)
        found /= np.bincount(groups, minlength=total)[:, None]
    else:
        np.maximum.at(found, groups, probabilities)
    low, high = (np.full((total, *targets.shape[1:]), end, dtype=np.int64) for end in (np.iinfo(np.int64).max, -1))
    np.minimum.at(low, groups, targets)
    np.maximum.at(high, groups, targets)
    if targets.ndim == 2:  # unknown where no image has it and one is unknown
        return found, np.where((high == 0) & (low < 0), -1, high), 0
    found /= found.sum(axis=1, keepdims=True)
    kept = low == high
    return found[kept], high[kept], int((~kept).sum())


def measured(
    probabilities: Floats, targets: Ints, groups: Ints, classes: tuple[str, ...], by: By | None
) -> dict[str, Any]:
    """Return `per_group`, the figures per group, with how they came about; nothing if they are not asked for."""
    if by is None:
        return {}
    if by not in get_args(By):
        raise InputError(f"per_group: must be mean or max, got {show(by)}")
    found, of_groups, left_out = grouped(probabilities, targets, groups, by)
    words = f"by the {'mean' if by == 'mean' else 'maximum'} of the probabilities of its images"
    if left_out:
        words += f"; left out: {count(left_out, 'group')} with images of several classes"
    figures = measure(found, of_groups, np.arange(len(of_groups)), classes) if len(of_groups) else {}
    return {"per_group": {"by": by, "left_out": left_out, "in_words": words, **figures}}
