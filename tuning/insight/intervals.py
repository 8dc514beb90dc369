"""Test metrics with 95% confidence intervals; all images of a group, such as a patient, count as one observation."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from tuning.insight.calibration import Floats, Ints, calibration_error, logarithms

DRAWS, SEED = 2000, 0  # of the bootstrap
NO_WIDTH = 1e-6
CHUNK = 100  # draws at once, to bound memory
LEAST_DEFINED = 0.9  # of the draws in which a metric has a value, for an interval: others lack a class
TAIL = 0.025  # probability beyond each end of a 95% confidence interval


def mean_interval(
    values: Floats, groups: Ints, tail: float = TAIL, strata: Ints | None = None
) -> tuple[float, float, float]:
    """Return the mean of values and the low and high end of its confidence interval.

    Student's t with the cluster-robust standard error, groups being the clusters, and with Welch's degrees of freedom
    for several strata. The interval is unbounded if a stratum has a single group.

    Args:
        values: [n].
        groups: [n], 0, 1, ...
        tail: probability beyond each end of the interval.
        strata: [n], such as classes, if their sizes are fixed by design; their means may differ.
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


def measure(probabilities: Floats, targets: Ints, groups: Ints, classes: tuple[str, ...]) -> dict[str, Any]:
    """Compute the test metrics of `metrics.json`; `<name>_95` is the 95% confidence interval of `<name>`.

    Intervals are percentiles of 2,000 bootstrap samples of groups (Efron and Tibshirani 1993). If a metric is 0 or 1 in
    every sample, the exact binomial interval (Clopper and Pearson 1934) for the number of its groups replaces them.
    If more than a tenth of the samples lack a class that the metric needs, there is none (None).

    Args:
        probabilities: [n, classes].
        targets: class indices [n].
        groups: [n], 0, 1, ...
        classes: class names.
    """
    rows = np.arange(len(targets))
    found = _figures(np.ones((1, len(targets))), probabilities, targets)[0]
    low, high = _percentiles(probabilities, targets, groups)
    observations = _observations(targets, groups, len(classes))

    def figures(names: tuple[str, ...], first: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for place, name in enumerate(names, first):
            known = not np.isnan(found[place])
            result[name] = float(found[place]) if known else None
            ends = float(low[place]), float(high[place])
            result[f"{name}_95"] = _interval(result[name], *ends, observations[place]) if known else None
        return result

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


def _figures(weights: Floats, probabilities: Floats, targets: Ints) -> Floats:
    """Return metrics [draws, 3 + 3 * classes] of images weighted by `weights` [draws, n]; NaN if undefined.

    Accuracy, balanced accuracy and AUROC, then sensitivity, specificity and AUROC of each class against the rest.
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
    balanced = np.nanmean(each[:, ::3], axis=1)  # of the classes in the test set
    return np.column_stack([accuracy, balanced, each[:, 2::3].mean(axis=1), each])


def _auroc(weights: Floats, positive: NDArray[np.bool_], values: Floats) -> Floats:
    """Return AUROC [draws] of images weighted by `weights` [draws, n]; ties count half."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order], prepend=-np.inf))  # of equal values
    ordered = weights[:, order]
    positives = np.add.reduceat(ordered * positive[order], starts, axis=1)
    negatives = np.add.reduceat(ordered * ~positive[order], starts, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives / 2
    ratio: Floats = (positives * below).sum(axis=1) / (positives.sum(axis=1) * negatives.sum(axis=1))
    return ratio


def _percentiles(probabilities: Floats, targets: Ints, groups: Ints) -> tuple[Floats, Floats]:
    """Return the low and high ends of the bootstrap intervals, for each column of `_figures`."""
    rng = np.random.default_rng(SEED)
    count = int(groups.max()) + 1
    draws = []
    for _ in range(0, DRAWS, CHUNK):
        chosen = rng.integers(count, size=(CHUNK, count)) + count * np.arange(CHUNK)[:, None]
        times = np.bincount(chosen.ravel(), minlength=CHUNK * count).reshape(CHUNK, count)
        draws.append(_figures(times[:, groups].astype(np.float64), probabilities, targets))
    values = np.concatenate(draws)
    defined = (~np.isnan(values)).mean(axis=0) >= LEAST_DEFINED
    ends = np.full((2, len(defined)), np.nan)
    ends[:, defined] = np.nanquantile(values[:, defined], (TAIL, 1 - TAIL), axis=0)
    return ends[0], ends[1]


def _observations(targets: Ints, groups: Ints, classes: int) -> list[int]:
    """Count the groups behind each column of `_figures`; for a metric of two kinds of images, of the rarer."""
    with_class = [len(np.unique(groups[targets == index])) for index in range(classes)]
    without = [len(np.unique(groups[targets != index])) for index in range(classes)]
    rarer = [min(pair) for pair in zip(with_class, without, strict=True)]
    least = min(count for count in with_class if count)
    each = [value for index in range(classes) for value in (with_class[index], without[index], rarer[index])]
    return [len(np.unique(groups)), least, min(rarer), *each]


def _interval(value: float, low: float, high: float, groups: int) -> list[float] | None:
    """Return an interval that holds the value and has a width, or None.

    One of no width at 0 or 1 becomes that of Clopper and Pearson for `groups` equal observations.
    """
    beyond = 1 - TAIL ** (1 / groups)
    if low == high == 1.0:
        low = 1 - beyond
    elif low == high == 0.0:
        high = beyond
    return [low, high] if low <= value <= high and high - low > NO_WIDTH else None  # NaN compares as false
