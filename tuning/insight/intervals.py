"""What is measured of a test set, with intervals that take a patient's images for the one observation they are."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from tuning.insight.calibration import calibration_error, logarithms

DRAWS, SEED = 2000, 0  # of the bootstrap
CHUNK = 100  # draws at once, so that memory stays small
TAIL = 0.025  # beyond either end of a 95% interval


def mean_interval(
    values: NDArray[np.float64],
    groups: NDArray[np.int64],
    tail: float = TAIL,
    strata: NDArray[np.int64] | None = None,
) -> tuple[float, float, float]:
    """The mean of values, and an interval beyond whose ends its expectation lies with probability `tail` each.

    Student's t with the sums of groups as observations (the cluster-robust standard error) and, of several strata, with
    Welch's degrees of freedom; unbounded where a stratum has but one group.

    Args:
        values: [n].
        groups: [n], 0, 1, ...
        tail: probability.
        strata: [n], what is not left to chance, such as classes; they may differ in their means.
    """
    mean = float(values.mean())
    strata = np.zeros(len(values), np.int64) if strata is None else strata
    residuals, variances, degrees = np.empty(len(values)), [], []
    for stratum in np.unique(strata):
        inside = strata == stratum
        count = len(np.unique(groups[inside]))
        if count < 2:
            return mean, -np.inf, np.inf
        residuals[inside] = (values[inside] - values[inside].mean()) * np.sqrt(count / (count - 1))
        variances.append((np.bincount(groups[inside], weights=residuals[inside]) ** 2).sum())
        degrees.append(count - 1)
    if not sum(variances):
        return mean, mean, mean
    welch = sum(variances) ** 2 / sum(value**2 / number for value, number in zip(variances, degrees, strict=True))
    error = np.sqrt((np.bincount(groups, weights=residuals) ** 2).sum()) / len(values)
    reach = float(-stdtrit(welch, tail) * error)
    return mean, mean - reach, mean + reach


def measure(
    probabilities: NDArray[np.float64],
    targets: NDArray[np.int64],
    groups: NDArray[np.int64],
    classes: tuple[str, ...],
) -> dict[str, Any]:
    """What `metrics.json` says of the test set: each class against the rest, and `<name>_95` beside what has intervals.

    These are percentiles of 2,000 bootstrap draws of groups (Efron and Tibshirani 1993). Where a figure is 0 or 1 in
    every draw they would be of no width; its other end is then that of the exact binomial interval (Clopper and Pearson
    1934) for so many groups as the figure rests on.

    Args:
        probabilities: [n, classes].
        targets: class indices [n].
        groups: [n], 0, 1, ...
        classes: names.
    """
    rows = np.arange(len(targets))
    found = _figures(np.ones((1, len(targets))), probabilities, targets)[0]
    low, high = _percentiles(probabilities, targets, groups)
    rests_on = _rests_on(targets, groups, len(classes))

    def figures(names: tuple[str, ...], first: int) -> dict[str, Any]:
        said: dict[str, Any] = {}
        for place, name in enumerate(names, first):
            known = not np.isnan(found[place])
            said[name] = float(found[place]) if known else None
            said[f"{name}_95"] = _widened(low[place], high[place], rests_on[place]) if known else None
        return said

    k = len(classes)
    confusion = np.bincount(targets * k + probabilities.argmax(axis=1), minlength=k * k).reshape(k, k)
    return {
        "images": len(targets),
        "groups": len(np.unique(groups)),
        "loss": float(-logarithms(probabilities[rows, targets]).mean()),
        **figures(("accuracy", "balanced_accuracy", "auroc"), 0),
        "calibration_error": calibration_error(probabilities, targets),
        "classes": {
            name: {
                "images": int((targets == index).sum()),
                "groups": len(np.unique(groups[targets == index])),
                **figures(("sensitivity", "specificity", "auroc"), 3 + 3 * index),
            }
            for index, name in enumerate(classes)
        },
        "confusion": {"rows": "true", "columns": "predicted", "order": list(classes), "counts": confusion.tolist()},
        "intervals": {"percent": 95, "draws": DRAWS, "seed": SEED},
    }


def _figures(
    weights: NDArray[np.float64], probabilities: NDArray[np.float64], targets: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Figures [draws, 3 + 3 * classes] of images that count as `weights` [draws, n] say; NaN where there is none.

    Accuracy, balanced accuracy and AUROC, then sensitivity, specificity and AUROC of each class.
    """
    predicted = probabilities.argmax(axis=1)
    columns = []
    with np.errstate(divide="ignore", invalid="ignore"):
        for index in range(probabilities.shape[1]):
            positive, called = targets == index, predicted == index
            columns.append(weights @ (positive & called) / (weights @ positive))
            columns.append(weights @ ~(positive | called) / (weights @ ~positive))
            columns.append(_auroc(weights, positive, probabilities[:, index]))
        accuracy = weights @ (predicted == targets) / weights.sum(axis=1)
    each = np.stack(columns, axis=1)
    balanced = np.nanmean(each[:, ::3], axis=1)  # over the classes that are there
    return np.column_stack([accuracy, balanced, each[:, 2::3].mean(axis=1), each])


def _auroc(
    weights: NDArray[np.float64], positive: NDArray[np.bool_], values: NDArray[np.float64]
) -> NDArray[np.float64]:
    """AUROC [draws] of images that count as `weights` [draws, n] say, ties counting half."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order], prepend=-np.inf))  # of equal values
    ordered = weights[:, order]
    positives = np.add.reduceat(ordered * positive[order], starts, axis=1)
    negatives = np.add.reduceat(ordered * ~positive[order], starts, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives / 2
    ratio: NDArray[np.float64] = (positives * below).sum(axis=1) / (positives.sum(axis=1) * negatives.sum(axis=1))
    return ratio


def _percentiles(
    probabilities: NDArray[np.float64], targets: NDArray[np.int64], groups: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The ends of the bootstrap's intervals, for each column of `_figures`."""
    rng = np.random.default_rng(SEED)
    count = int(groups.max()) + 1
    drawn = []
    for _ in range(0, DRAWS, CHUNK):
        chosen = rng.integers(count, size=(CHUNK, count)) + count * np.arange(CHUNK)[:, None]
        times = np.bincount(chosen.ravel(), minlength=CHUNK * count).reshape(CHUNK, count)
        drawn.append(_figures(times[:, groups].astype(np.float64), probabilities, targets))
    there = np.concatenate(drawn)
    there[:, np.isnan(there).all(axis=0)] = 0.0  # a figure that there is none of; numpy would warn
    low, high = np.nanquantile(there, (TAIL, 1 - TAIL), axis=0)
    return low, high


def _rests_on(targets: NDArray[np.int64], groups: NDArray[np.int64], classes: int) -> list[int]:
    """How many groups each column of `_figures` rests on: of two kinds, of the rarer."""
    with_class = [len(np.unique(groups[targets == index])) for index in range(classes)]
    without = [len(np.unique(groups[targets != index])) for index in range(classes)]
    rarer = [min(pair) for pair in zip(with_class, without, strict=True)]
    least = min(count for count in with_class if count)
    each = [value for index in range(classes) for value in (with_class[index], without[index], rarer[index])]
    return [len(np.unique(groups)), least, min(rarer), *each]


def _widened(low: float, high: float, groups: int) -> list[float]:
    """An interval of no width at 0 or 1, made that of Clopper and Pearson for `groups` observations that all agree."""
    beyond = 1 - TAIL ** (1 / groups)
    if low == high == 1.0:
        return [1 - beyond, 1.0]
    return [0.0, beyond] if low == high == 0.0 else [float(low), float(high)]
