"""Do predictions tell the classes apart at all? Their macro AUROC, beside those of guesses that know nothing."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import ndtri, stdtrit

from tuning.insight.calibration import Floats, Ints
from tuning.record.predictions import group_numbers

GUESS = 0.5  # the expected AUROC of guesses


class Separation(NamedTuple):
    """How well predictions tell the classes apart, and the lower end of its one-sided confidence interval."""

    auroc: float  # mean over classes of each against the rest
    least: float  # above `GUESS` if the AUROC is significantly better than that of guesses


def separation(probabilities: Floats, targets: Ints, groups: Ints, tail: float) -> Separation:
    """Test whether the macro AUROC of probabilities [n, classes] is better than that of guesses.

    The standard error is that of a guess: of the same ranks, given to images at random (Mann and Whitney 1947). Ranks
    may be alike within a group, such as a patient, as much as they are found to be beyond their classes (Rosner and
    Grove 1999). The quantile is then Student's t, since this is estimated.

    Args:
        targets: classes [n]; all are there.
        groups: [n], 0, 1, ...
        tail: probability that a guess is called better.
    """
    images, classes = probabilities.shape
    ordered = np.sort(probabilities, axis=0)
    ranks = np.empty((images, classes))  # from their mean; ties have the same
    for column, values in enumerate(probabilities.T):
        below, up_to = (np.searchsorted(ordered[:, column], values, side=side) for side in ("left", "right"))
        ranks[:, column] = (below + up_to - images) / 2
    weights = _weights(targets) / classes
    covariance = ranks.T @ ranks / (images - 1)
    alike = _likeness(ranks, targets, groups)
    each, together = weights.T @ weights, _by_group(weights, groups).T @ _by_group(weights, groups)
    error = float(np.sqrt(max((covariance * ((1 - alike) * each + alike * together)).sum(), 0.0)))
    seen = len(np.unique(groups))
    if seen == images:
        quantile = float(-ndtri(tail))
    else:
        quantile = float(-stdtrit(seen - classes, tail)) if seen > classes else np.inf
    auroc = GUESS + float((weights * ranks).sum())
    return Separation(auroc, auroc - quantile * error if error else min(auroc, GUESS))


def guess_error(samples: pd.DataFrame) -> float:
    """Return the largest standard error that a guess's macro AUROC can have on the validation split.

    This needs no predictions: classes' AUROCs are taken to agree entirely, and so are a group's images if this makes it
    larger. For two classes and single images it is exact.
    """
    validation = samples[samples["split"] == "val"]
    targets, names = pd.factorize(validation["label"])
    images = len(targets)
    if len(names) < 2:
        return np.inf
    weights = _weights(targets)
    sums = np.maximum((weights**2).sum(axis=0), (_by_group(weights, group_numbers(validation)) ** 2).sum(axis=0))
    return float(np.sqrt(images * (images + 1) / 12 * sums).mean())


def _weights(targets: Ints) -> Floats:
    """Return weights [n, classes] by which ranks add up to the AUROC of each class against the rest, less 0.5."""
    own = np.eye(int(targets.max()) + 1)[targets]
    count, images = own.sum(axis=0), len(targets)
    weights: Floats = (own - count / images) / (count * (images - count))
    return weights


def _likeness(ranks: Floats, targets: Ints, groups: Ints) -> float:
    """Return the correlation, from 0 to 1, of a group's ranks in [n, classes] beyond the means of their classes."""
    own = np.eye(int(targets.max()) + 1)[targets]
    residuals = ranks - own @ ((own.T @ ranks) / own.sum(axis=0)[:, None])
    sizes, square = np.bincount(groups), float((residuals**2).sum())
    pairs = int((sizes * (sizes - 1)).sum())
    if not pairs or not square:
        return 0.0
    shared = float((_by_group(residuals, groups) ** 2).sum()) - square
    return min(max(shared / pairs / (square / len(ranks)), 0.0), 1.0)


def _by_group(values: Floats, groups: Ints) -> Floats:
    """Return the sums [groups, classes] of values [n, classes]."""
    sums = np.zeros((int(groups.max()) + 1, values.shape[1]))
    np.add.at(sums, groups, values)
    return sums
