"""Operating points: thresholds from validation, and what they give elsewhere: sensitivity, specificity, PPV, NPV."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import expit, logit

from tuning.insight.intervals import NORMAL, Figure, entries, share
from tuning.record.measures import SPECIFICITIES, threshold
from tuning.record.targets import by_class
from tuning.record.temperature import Floats, Ints
from tuning.settings.config import InputError
from tuning.settings.words import examples

Thresholds = dict[str, dict[str, float]]  # of each class, by the specificity that it has on validation


def thresholds(probabilities: Floats, targets: Ints, classes: Sequence[str]) -> Thresholds:
    """Return, for each class, the lowest thresholds with at least the `SPECIFICITIES` on these images.

    An image is called positive if its probability of the class is above the threshold. Classes that all or no images
    have get none.

    Args:
        probabilities: [n, classes], of a validation set.
        targets: class indices [n], or labels [n, classes] of 1, 0 and -1 (unknown).
        classes: names.
    """
    found: Thresholds = {}
    cells = by_class(targets, len(classes))
    for index, name in enumerate(classes):
        negatives = probabilities[cells[:, index] == 0, index]
        if len(negatives) and (cells[:, index] == 1).any():
            found[name] = {f"{each:g}": threshold(negatives, each) for each in SPECIFICITIES}
    return found


def median_thresholds(each: Sequence[Floats], targets: Ints, classes: Sequence[str]) -> Thresholds:
    """Return the medians of the `thresholds` of several models' probabilities [n, classes]; none without models."""
    found = [thresholds(probabilities, targets, classes) for probabilities in each]
    return {
        name: {key: float(np.median([one[name][key] for one in found])) for key in points}
        for name, points in (found[0] if found else {}).items()
    }


def prevalences(pairs: Iterable[str], classes: Sequence[str]) -> dict[str, float]:
    """Return the share of each class where a model is to be used, from texts such as `pneumonia=0.02`.

    Raises:
        InputError: no such class, or no share between 0 and 1.
    """
    found = {}
    for pair in pairs:
        name, _, share_text = pair.rpartition("=")
        try:
            value = float(share_text)
        except ValueError:
            value = np.nan
        if name not in classes:
            raise InputError(f"--prevalence {pair}: give CLASS=SHARE; the classes are {examples(classes)}")
        if not 0 < value < 1:
            raise InputError(f"--prevalence {pair}: must be a share between 0 and 1, such as 0.02")
        found[name] = value
    return found


def at(
    chosen: Mapping[str, Mapping[str, float]],
    probabilities: Floats,
    targets: Ints,
    groups: Ints,
    classes: Sequence[str],
    prevalence: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Return a row for each class and threshold: sensitivity and specificity, and at a prevalence PPV and NPV.

    Intervals are as those of `intervals.measure`; of PPV and NPV by Mercaldo et al. (2007), on the scale of the logit.

    Args:
        chosen: of `thresholds`.
        probabilities: [n, classes].
        targets: class indices [n], or labels [n, classes] of 1, 0 and -1 (unknown).
        groups: [n], 0, 1, ...
        classes: names.
        prevalence: share of a class where the model is to be used.
    """
    rows, total, cells = [], int(groups.max()) + 1, by_class(targets, len(classes))
    for index, name in enumerate(classes):
        positive, negative = cells[:, index] == 1, cells[:, index] == 0
        for specificity, limit in chosen.get(name, {}).items():
            called = probabilities[:, index] > limit
            sensitivity = share(called[positive], groups[positive], total)
            specific = share(~called[negative], groups[negative], total)
            row = {"class": name, "validation_specificity": float(specificity), "threshold": limit}
            row |= entries("sensitivity", sensitivity) | entries("specificity", specific)
            if name in prevalence:
                odds = prevalence[name] / (1 - prevalence[name])
                row["prevalence"] = prevalence[name]
                row |= _predictive("ppv", sensitivity, specific, odds)
                row |= _predictive("npv", specific, sensitivity, 1 / odds)
            rows.append(row)
    return rows


def _predictive(name: str, right: Figure, other: Figure, odds: float) -> dict[str, Any]:
    """Return a predictive value and its interval.

    Args:
        right: share of those called so among those that are; for PPV the sensitivity.
        other: share of the others not called so; for PPV the specificity.
        odds: prior ones of being so.
    """
    if np.isnan(right.value) or np.isnan(other.value) or right.value == 0 == 1 - other.value:
        return {name: None, f"{name}_95": None}
    value = right.value * odds / (right.value * odds + 1 - other.value)
    if np.isnan(right.observations) or np.isnan(other.observations):
        return {name: value, f"{name}_95": None}
    drawn = right.drawn * odds / (right.drawn * odds + 1 - other.drawn)
    centre = float(logit(value if 0 < value < 1 else drawn))
    variance = (1 - right.drawn) / right.drawn / right.observations + other.drawn / (
        1 - other.drawn
    ) / other.observations
    low, high = (float(expit(centre + sign * NORMAL * np.sqrt(variance))) for sign in (-1, 1))
    return {name: value, f"{name}_95": [min(low, value), max(high, value)]}
