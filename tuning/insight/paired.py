"""The best trial against the default on the same validation images, without any training: the first verdict."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tuning.insight.intervals import placements
from tuning.record.journal import LOSSES
from tuning.record.measures import Bools, average_precision, f1, precision_steps, sensitivity_at, threshold
from tuning.record.predictions import Predictions
from tuning.record.targets import by_class
from tuning.record.temperature import Floats, Ints

TAIL = 0.025  # probability beyond each end of the 95% confidence interval
SAMPLES = 4000  # of the bootstrap
LEAST_ERROR = 0.5  # of a resample, as a share of the sample's
MANY = 2000  # groups, from which on sums over them are as good as normal


class Paired(NamedTuple):
    """By how much one trial is better than another on the same validation images."""

    difference: float  # in the metric's units; above 0 if it is better
    low: float  # 95% confidence interval, corrected for the choice of the best of all trials
    high: float
    p_value: float  # two-sided, with the same correction
    images: int
    groups: int

    @property
    def better(self) -> bool:
        """Whether it is significantly better."""
        return self.low > 0


def compare(predictions: Predictions, best: str, default: str, metric: str, *, tried: int) -> Paired | None:
    """Compare the best trial with the default, by group; None if one has no predictions, or there are under 3 groups.

    The best trial is the best of many by chance too. Its difference is therefore measured against the largest that
    resamples of the groups give any of the trials beyond its own: the studentised bootstrap of the maximum (Hall 1988,
    Romano and Wolf 2005). It also allows for losses being skewed: a model that is right and confident about most
    images, and very wrong about few, seems better wherever these few are missing.

    Args:
        predictions: of the default, and of the best of the trials by `metric`.
        best, default: ids of the trials to compare.
        metric: as in `SearchPlan`.
        tried: how many trials the best was chosen from, if more than have predictions.
    """
    names = list(predictions.trial_ids)
    total = int(predictions.groups.max()) + 1 if len(predictions.groups) else 0
    if best not in names or default not in names or total < 3:
        return None
    place = names.index(default)
    values, parts = shares(predictions, metric)
    sums = np.stack([np.bincount(predictions.groups, weights=row, minlength=total) for row in parts])
    others = [index for index in range(len(names)) if index != place]
    differences, gains = (sums - sums[place])[others], (values - values[place])[others]
    chosen = others.index(names.index(best))

    centre, squares = differences.sum(axis=1), np.square(differences).sum(axis=1)
    error = float(_error(centre[chosen], squares[chosen], total))
    varying = squares > 0  # a trial that equals the default on every image has no error
    drawn = _resampled(differences[varying])
    images = len(predictions.targets)
    if not drawn.size or not error:
        return Paired(float(gains[chosen]), 0.0, 0.0, 1.0, images, total)
    largest = drawn.max(axis=1)
    # Trials beyond those with predictions count too (Bonferroni).
    more = max(tried - 1, len(others)) / len(others)
    reach = float(np.quantile(largest, max(1 - TAIL / more, 0.0), method="higher")) * error
    p_value = (1 + float((largest >= gains[chosen] / error).sum())) / (SAMPLES + 1)
    gain = float(gains[chosen])
    return Paired(gain, gain - reach, gain + reach, min(1.0, 2 * more * p_value), images, total)


def _resampled(differences: Floats) -> Floats:
    """Return resampled errors of sums over groups, each divided by its standard error [samples, trials]."""
    rng, total = np.random.default_rng(0), differences.shape[1]
    centre = differences.sum(axis=1)
    if total > MANY:
        correlation = np.atleast_2d(np.corrcoef(differences))
        return rng.multivariate_normal(np.zeros(len(centre)), correlation, SAMPLES, check_valid="ignore")
    draws = rng.multinomial(total, np.full(total, 1 / total), SAMPLES).astype(np.float64)
    sums, squares = draws @ differences.T, draws @ np.square(differences).T
    # Where a trial differs from the default on a few images only, samples without them seem to have no error.
    least = _error(centre, np.square(differences).sum(axis=1), total) * LEAST_ERROR
    resampled: Floats = (sums - centre) / np.maximum(_error(sums, squares, total), least)
    return resampled


def image_error(predictions: Predictions, mine: Sequence[str], other: Sequence[str], metric: str) -> tuple[float, int]:
    """Return the standard error of the mean difference of trials in pairs that validation images leave, and its groups.

    It is that of the difference between the means over `mine` and `other` for the same images, by group.
    """
    names, total = list(predictions.trial_ids), int(predictions.groups.max()) + 1
    _, parts = shares(predictions, metric)
    means = [parts[[names.index(trial_id) for trial_id in ids]].mean(axis=0) for ids in (mine, other)]
    sums = np.bincount(predictions.groups, weights=means[0] - means[1], minlength=total)
    return float(_error(sums.sum(), np.square(sums).sum(), total)), total


def _error(total: Floats, squares: Floats, groups: int) -> Floats:
    """Return the standard error of sums over groups, from the sums and the sums of squares; at least a tiny number."""
    variance = groups / (groups - 1) * (squares - np.square(total) / groups)
    error: Floats = np.sqrt(np.maximum(variance, np.finfo(np.float64).tiny))
    return error


def shares(predictions: Predictions, metric: str) -> tuple[Floats, Floats]:
    """Return each trial's metric [trials], more being better, and what each image adds to it [trials, images].

    What images add to AUROC are placement values, whose variance is that of the AUROC (DeLong et al. 1988). To AUPRC,
    F1 and a sensitivity at a specificity it is an equal part of the value, and how the value would change with the
    weight of the image (the infinitesimal jackknife; Jaeckel 1972).
    """
    targets, images = predictions.targets, len(predictions.targets)
    if metric in LOSSES:
        each = predictions if metric == "val_loss" else predictions.tempered
        parts = -each.losses / images
        return parts.sum(axis=1), parts
    cells = by_class(targets, len(predictions.classes))
    if metric == "val_balanced_accuracy":
        parts = np.stack([_balanced_parts(each, cells, predictions.multi_label) for each in predictions.probabilities])
        return parts.sum(axis=1), parts
    if metric == "val_auroc":
        parts = np.stack([_auroc_parts(each, cells) for each in predictions.probabilities])
        return parts.sum(axis=1) / 2, parts
    means = [_mean_parts(metric, each, cells, predictions) for each in predictions.probabilities]
    return np.array([value for value, _ in means]), np.stack([parts for _, parts in means])


def _balanced_parts(probabilities: Floats, cells: Ints, multi_label: bool) -> Floats:
    """Return what each image [n] adds to the balanced accuracy of probabilities [n, classes].

    It is the mean sensitivity of the classes; of labels, which may be called or not, with their specificities.
    """
    if multi_label:
        sides, right = [cells == 0, cells == 1], (probabilities > 0.5) == (cells == 1)
    else:
        sides, right = [cells == 1], (np.arange(cells.shape[1]) == probabilities.argmax(axis=1)[:, None])
    counts = np.stack([side.sum(axis=0) for side in sides])
    judged = counts.all(axis=0)
    parts = np.zeros(len(cells))
    for side, size in zip(sides, counts, strict=True):
        parts += (side * right * judged / np.maximum(size, 1)).sum(axis=1) / len(sides) / max(int(judged.sum()), 1)
    return parts


def _auroc_parts(probabilities: Floats, cells: Ints) -> Floats:
    """Return what each image [n] adds to twice the mean AUROC over classes of probabilities [n, classes]."""
    judged = [place for place, column in enumerate(cells.T) if (column == 0).any() and (column == 1).any()]
    parts = np.zeros(len(cells))
    for place in judged:
        known = np.flatnonzero(cells[:, place] >= 0)
        positive = cells[known, place] == 1
        size = np.where(positive, positive.sum(), (~positive).sum())
        parts[known] += placements(positive, probabilities[known, place]) / size / len(judged)
    return parts


def _mean_parts(metric: str, probabilities: Floats, cells: Ints, predictions: Predictions) -> tuple[float, Floats]:
    """Return the mean over classes of a metric of probabilities [n, classes], and what each image [n] adds to it."""
    calls = probabilities > 0.5
    if not predictions.multi_label:
        calls = probabilities.argmax(axis=1)[:, None] == np.arange(cells.shape[1])
    value, parts, sizes = 0.0, np.zeros(len(cells)), np.bincount(predictions.groups)
    rest = metric != "val_f1"  # whether images of other classes are needed
    judged = [place for place, one in enumerate(cells.T) if (one == 1).any() and ((one == 0).any() or not rest)]
    for place in judged:
        known = np.flatnonzero(cells[:, place] >= 0)
        positive = cells[known, place] == 1
        if metric == "val_f1":
            found, changes = _f1_changes(positive, calls[known, place])
        elif metric == "val_auprc":
            found, changes = _precision_changes(positive, probabilities[known, place])
        else:
            specificity = float(metric.removeprefix("val_sensitivity_at_")) / 100
            found, changes = _sensitivity_changes(positive, probabilities[known, place], specificity)
        value += found / len(judged)
        parts[known] += changes / len(judged)
    return value, parts + value / len(sizes) / sizes[predictions.groups]


def _f1_changes(positive: Bools, called: Bools) -> tuple[float, Floats]:
    """Return F1, and its derivatives with respect to the weights of images [n]."""
    value, either = f1(positive, called), positive.astype(np.float64) + called
    return value, (2 * (positive & called) - value * either) / either.sum()


def _precision_changes(positive: Bools, values: Floats) -> tuple[float, Floats]:
    """Return the average precision of values [n], and its derivatives with respect to the weights of images."""
    step, gained, reached, up_to = precision_steps(positive, values)
    value, precision = average_precision(positive, values), reached / up_to
    later, lost = (np.cumsum((gained * each / up_to)[::-1])[::-1] for each in (1, precision))  # of all to each step
    changes: Floats = positive * (precision[step] - value + later[step]) - lost[step]
    return value, changes / positive.sum()


def _sensitivity_changes(positive: Bools, values: Floats, specificity: float) -> tuple[float, Floats]:
    """Return the sensitivity of values [n] at a specificity, and its derivatives with respect to the weights of images.

    A negative counts by the slope of the ROC curve there (Pepe 2003), taken between half as many false positives and
    half as many again: a wider part is steeper.
    """
    value, above = sensitivity_at(positive, values, specificity), values > threshold(values[~positive], specificity)
    half = (1 - specificity) / 2
    ends = [sensitivity_at(positive, values, specificity + each) for each in (-half, half)]
    slope = (ends[0] - ends[1]) / (2 * half)
    of_negatives = (above[~positive].mean() - above) * slope / (~positive).sum()
    return value, np.where(positive, (above - value) / positive.sum(), of_negatives)
