"""Test metrics with 95% confidence intervals; all images of a group, such as a patient, count as one observation."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit, ndtri, stdtrit

from tuning.insight.calibration import calibration_error
from tuning.record.measures import average_precision
from tuning.record.targets import by_class
from tuning.record.temperature import Floats, Ints, image_losses

TAIL = 0.025  # probability beyond each end of a 95% confidence interval
NORMAL = float(-ndtri(TAIL))
PRIOR = 6  # degrees of freedom of the typical ROC curve's variance; chosen by simulation (benchmarks/README.md)
LEAST_EFFECT = 0.25  # smallest design effect: images of one group that differ by chance seem worth any number of images
METHOD = "Wilson's score interval for the effective number of images; of AUPRC on the scale of the logit"


class Figure(NamedTuple):
    """A metric between 0 and 1, and what its confidence interval follows from; NaN where it has none."""

    value: float
    drawn: float  # the value, drawn to a half like Agresti and Coull's (1998), so that it is neither 0 nor 1
    observations: float  # effective number of images, as many as a share would need for this variance
    errors: Floats  # [groups]: what each group adds to the metric's error, up to a factor; for correlations


NOTHING = Figure(np.nan, np.nan, np.nan, np.zeros(0))


def mean_interval(values: Floats, groups: Ints) -> tuple[float, float, float]:
    """Return the mean of values [n] and the low and high end of its 95% confidence interval.

    Student's t with the cluster-robust standard error, groups [n] (0, 1, ...) being the clusters. The interval is
    unbounded if there is a single group.
    """
    mean, count = float(values.mean()), len(np.unique(groups))
    if count < 2:
        return mean, -np.inf, np.inf
    variance = (np.bincount(groups, weights=values - mean) ** 2).sum() * count / (count - 1)
    reach = float(-stdtrit(count - 1, TAIL) * np.sqrt(variance)) / len(values)
    return mean, mean - reach, mean + reach


def measure(probabilities: Floats, targets: Ints, groups: Ints, classes: tuple[str, ...]) -> dict[str, Any]:
    """Compute the test metrics of `metrics.json`; `<name>_95` is the 95% confidence interval of `<name>`.

    It is None if the metric needs a class, or a rest, whose images are all of one group. Classes are called by the
    highest probability; labels, of which an image may have several, from a probability of 0.5, and what is unknown
    doesn't count. The accuracy of labels is the share of right calls, the balanced one the mean of their sensitivities
    and specificities, AUROC and AUPRC the mean over the labels that have one.

    Args:
        probabilities: [n, classes].
        targets: class indices [n], or labels [n, classes] of 1, 0 and -1 (unknown).
        groups: [n], 0, 1, ...
        classes: names.
    """
    cells, calls, total = _called(probabilities, targets, groups)
    judged = list(_judged(probabilities, cells, calls, groups, total))
    by_name: dict[str, dict[str, Any]] = {}
    for place, (name, (known, figures)) in enumerate(zip(classes, judged, strict=True)):
        positive, called, of = cells[known, place] == 1, calls[known, place], groups[known]
        by_name[name] = {
            "images": int(positive.sum()),
            "groups": len(np.unique(of[positive])),
            **({"unknown": int((~known).sum())} if targets.ndim == 2 else {}),
            **{key: each for figure in figures for key, each in entries(figure, figures[figure]).items()},
            **_auprc(positive, probabilities[known, place], of),
            **_f1(positive, called, of, total),
        }
    precisions = [each["auprc"] for each in by_name.values() if not (targets.ndim == 2 and each["auprc"] is None)]
    means = _overall(targets, groups, cells, calls, [figures for _, figures in judged])
    return {
        "images": len(targets),
        "groups": len(np.unique(groups)),
        "loss": float(image_losses(probabilities, targets).mean()),
        **{key: each for name, figure in means.items() for key, each in entries(name, figure).items()},
        "auprc": None if None in precisions or not precisions else float(np.mean(precisions)),
        "calibration_error": calibration_error(probabilities, targets),
        "classes": by_name,
        "confusion": _confusion(cells, calls, classes)
        if targets.ndim == 2
        else _matrix(targets, probabilities.argmax(axis=1), classes),
        "intervals": {"percent": 95, "method": METHOD},
    }


def overall(probabilities: Floats, targets: Ints, groups: Ints) -> dict[str, Figure]:
    """Return accuracy, balanced accuracy and AUROC over all classes; arguments and meaning as in `measure`."""
    cells, calls, total = _called(probabilities, targets, groups)
    judged = _judged(probabilities, cells, calls, groups, total)
    return _overall(targets, groups, cells, calls, [figures for _, figures in judged])


def _called(probabilities: Floats, targets: Ints, groups: Ints) -> tuple[NDArray[Any], NDArray[np.bool_], int]:
    """Return whether each class is there [n, classes] (1, 0 or -1), whether it is called, and the number of groups."""
    k = probabilities.shape[1]
    calls = probabilities > 0.5 if targets.ndim == 2 else probabilities.argmax(axis=1)[:, None] == np.arange(k)
    return by_class(targets, k), calls, int(groups.max()) + 1


def _judged(
    probabilities: Floats, cells: NDArray[Any], calls: NDArray[np.bool_], groups: Ints, total: int
) -> Iterator[tuple[NDArray[np.bool_], dict[str, Figure]]]:
    """Yield, for each class, of which images it is known, and its sensitivity, specificity and AUROC there."""
    for place in range(cells.shape[1]):
        known = cells[:, place] >= 0
        positive, called, of = cells[known, place] == 1, calls[known, place], groups[known]
        yield (
            known,
            {
                "sensitivity": share(called[positive], of[positive], total),
                "specificity": share(~called[~positive], of[~positive], total),
                "auroc": _auroc(positive, probabilities[known, place], of, total),
            },
        )


def _overall(
    targets: Ints, groups: Ints, cells: NDArray[Any], calls: NDArray[np.bool_], judged: Sequence[dict[str, Figure]]
) -> dict[str, Figure]:
    several, total = targets.ndim == 2, int(groups.max()) + 1
    right = calls == (cells == 1)
    rows, columns = np.nonzero(cells >= 0) if several else (np.arange(len(targets)), targets)
    sides = ("sensitivity", "specificity") if several else ("sensitivity",)
    balanced = [each[side] for each in judged for side in sides if not np.isnan(each[side].value)]
    aurocs = [each["auroc"] for each in judged if not (several and np.isnan(each["auroc"].value))]
    return {
        "accuracy": share(right[rows, columns], groups[rows], total),
        "balanced_accuracy": _mean(balanced) if balanced else NOTHING,
        "auroc": _mean(aurocs) if aurocs else NOTHING,
    }


def _matrix(targets: Ints, predicted: Ints, classes: Sequence[str]) -> dict[str, Any]:
    k = len(classes)
    counts = np.bincount(targets * k + predicted, minlength=k * k).reshape(k, k)
    return {"rows": "true", "columns": "predicted", "order": list(classes), "counts": counts.tolist()}


def _confusion(cells: Ints, calls: NDArray[np.bool_], classes: Sequence[str]) -> dict[str, Any]:
    """Return the confusion matrix of each label: absent and there, called absent and there."""
    counts = [
        [[int(((cells[:, place] == true) & (calls[:, place] == called)).sum()) for called in (0, 1)] for true in (0, 1)]
        for place in range(len(classes))
    ]
    return {"rows": "true: absent, there", "columns": "predicted", "order": list(classes), "counts": counts}


def _auprc(positive: NDArray[np.bool_], values: Floats, groups: Ints) -> dict[str, Any]:
    """Return the area under the precision-recall curve (average precision) and its interval.

    The interval is that on the scale of the logit (Boyd et al. 2013), each group with a positive as one observation.
    """
    if not positive.any():
        return {"auprc": None, "auprc_95": None}
    area = average_precision(positive, values)
    observations = len(np.unique(groups[positive]))
    if observations == 1 or positive.all():
        return {"auprc": area, "auprc_95": None}
    drawn = (area * observations + 2) / (observations + 4)
    reach = NORMAL / np.sqrt(observations * drawn * (1 - drawn))
    centre = logit(area if 0 < area < 1 else drawn)
    low, high = (float(expit(centre + sign * reach)) for sign in (-1, 1))
    return {"auprc": area, "auprc_95": [min(low, area), max(high, area)]}


def _f1(positive: NDArray[np.bool_], called: NDArray[np.bool_], groups: Ints, total: int) -> dict[str, Any]:
    """Return F1 and its interval, from those of the Jaccard index, a share: F1 = 2 J / (1 + J)."""
    either = positive | called
    found = entries("f1", share((positive & called)[either], groups[either], total))
    value, bounds = found["f1"], found["f1_95"]
    return {
        "f1": None if value is None else 2 * value / (1 + value),
        "f1_95": None if bounds is None else [2 * bound / (1 + bound) for bound in bounds],
    }


def wilson(share: float, observations: float) -> tuple[float, float]:
    """Return the score interval (Wilson 1927) of a share, or of a figure whose variance is share * (1 - share) / n.

    Args:
        share: from 0 to 1.
        observations: n, which need not be whole.
    """
    square = NORMAL**2 / observations
    centre = (share + square / 2) / (1 + square)
    reach = float(np.sqrt(square * (share * (1 - share) + square / 4))) / (1 + square)
    return min(max(centre - reach, 0.0), share), max(min(centre + reach, 1.0), share)


def share(right: NDArray[np.bool_], groups: Ints, total: int) -> Figure:
    """Return the share of images [n] that are `right`.

    The effective number of images is n divided by the design effect: the variance by group over that by image. Since
    this is estimated, it shrinks as Student's t grows (Korn and Graubard 1998).
    """
    images, seen = len(right), len(np.unique(groups))
    if not images:
        return Figure(np.nan, np.nan, np.nan, np.zeros(total))
    value, drawn = float(right.mean()), float((right.sum() + 2) / (images + 4))
    deviations = right.astype(np.float64) - drawn
    errors = _summed(deviations, groups, total)
    if seen == 1 < images:
        return Figure(value, drawn, np.nan, errors)
    growth = 1.0 if seen == images else float(stdtrit(seen - 1, TAIL) / stdtrit(images - 1, TAIL))
    return Figure(value, drawn, images / _design_effect(deviations, errors) / growth**2, errors)


def _auroc(positive: NDArray[np.bool_], values: Floats, groups: Ints, total: int) -> Figure:
    """Return the AUROC of values [n]; ties count half.

    Its variance is that of placement values (DeLong et al. 1988), summed by group (Obuchowski 1997), with degrees of
    freedom by Satterthwaite (1946). From few groups it is often too small, so it is averaged, weighted by degrees of
    freedom, with that of a typical ROC curve of this area (Newcombe 2006, method 5) times the design effect.
    """
    sides = np.stack([positive, ~positive])
    count = sides.sum(axis=1)
    if not count.all():
        return Figure(np.nan, np.nan, np.nan, np.zeros(total))
    placed = placements(positive, values)
    area = float(placed[positive].mean())
    seen = np.array([len(np.unique(groups[side])) for side in sides])
    fewest, own = int(seen.min()), np.where(positive, 0, 1)
    # Deviations from a mean that is neither 0 nor 1 show, also of a perfect AUROC, how alike a group's images are.
    drawn = (area * fewest + 2) / (fewest + 4)
    deviations = (placed - drawn) / count[own]
    errors = _summed(deviations, groups, total)
    if fewest == 1:
        return Figure(area, drawn, np.nan, errors)
    curve = (1 - area) / (2 - area) + area / (1 + area)
    typical = (1 + (count.mean() - 1) * curve) / count.prod() * _design_effect(deviations, errors)
    residuals = (placed - area) / count[own] * np.sqrt(seen / (seen - 1))[own]
    parts = np.array([(_summed(residuals * side, groups, total) ** 2).sum() for side in sides])
    freedom, found = 0.0, 0.0
    if parts.any():  # not of a perfect AUROC
        freedom = parts.sum() ** 2 / (parts**2 / (seen - 1)).sum()
        found = (_summed(residuals, groups, total) ** 2).sum() / (area * (1 - area))
    observations = (freedom + PRIOR) / (freedom * found + PRIOR * typical)
    growth = float(-stdtrit(freedom + PRIOR, TAIL)) / NORMAL
    return Figure(area, drawn, float(observations) / growth**2, errors)


def _design_effect(deviations: Floats, errors: Floats) -> float:
    """Return the variance by group, from `errors` [groups], over that by image, from `deviations` [n]."""
    square = float((deviations**2).sum())
    return max(float((errors**2).sum()) / square, LEAST_EFFECT) if square else 1.0


def _summed(values: Floats, groups: Ints, total: int) -> Floats:
    """Return the sum of values [n] in each of `total` groups."""
    return np.bincount(groups, weights=values, minlength=total).astype(np.float64)


def placements(positive: NDArray[np.bool_], values: Floats) -> Floats:
    """Return each positive's share of negatives with lower values, and each negative's of positives with higher."""
    found = np.empty(len(values))
    for mine, sign in ((positive, 1), (~positive, -1)):
        others, own = np.sort(sign * values[~mine]), sign * values[mine]
        below = np.searchsorted(others, own) + np.searchsorted(others, own, side="right")
        found[mine] = below / (2 * len(others))
    return found


def _mean(figures: Sequence[Figure]) -> Figure:
    """Return the mean of metrics; its variance follows from theirs and from their correlations by group."""
    errors = np.stack([figure.errors for figure in figures])
    value, drawn = (float(np.mean([figure[place] for figure in figures])) for place in range(2))
    deviations = np.array([np.sqrt(figure.drawn * (1 - figure.drawn) / figure.observations) for figure in figures])
    lengths = np.sqrt((errors**2).sum(axis=1))
    scaled = errors * (deviations / np.maximum(lengths, np.finfo(np.float64).tiny))[:, None]
    together = scaled.mean(axis=0)
    variance = np.maximum((together**2).sum(), LEAST_EFFECT * np.square(deviations / len(figures)).sum())
    return Figure(value, drawn, drawn * (1 - drawn) / float(variance), together)


def entries(name: str, figure: Figure) -> dict[str, Any]:
    """Return a metric and its interval as entries of `metrics.json`."""
    interval = None if np.isnan(figure.observations) else list(wilson(figure.value, figure.observations))
    return {name: None if np.isnan(figure.value) else figure.value, f"{name}_95": interval}
