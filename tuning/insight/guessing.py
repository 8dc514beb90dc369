"""Do predictions tell the classes apart at all? Their macro AUROC, beside those of guesses that know nothing."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import ndtri, stdtrit

from tuning.record.predictions import Predictions, group_numbers
from tuning.record.targets import by_class, class_names, constant_loss, encoded
from tuning.record.temperature import Floats, Ints, fit_temperature, image_losses, logarithms, tempered

GUESS = 0.5  # the expected AUROC of guesses
ALPHA = 0.05  # probability that trials that only guess are said to tell the classes apart


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
        targets: classes [n], all of which are there; or [n, labels] of 1, 0 and -1 (unknown).
        groups: [n], 0, 1, ...
        tail: probability that a guess is called better.
    """
    images, classes = probabilities.shape
    cells = by_class(targets, classes)
    ranks = np.zeros((images, classes))  # from their mean; ties have the same
    for column in range(classes):
        there = cells[:, column] >= 0
        values = probabilities[there, column]
        ordered = np.sort(values)
        below, up_to = (np.searchsorted(ordered, values, side=side) for side in ("left", "right"))
        ranks[there, column] = (below + up_to - len(values)) / 2
    weights = _weights(cells) / classes
    known = (cells >= 0).astype(np.float64)
    covariance = ranks.T @ ranks / np.maximum(known.T @ known - 1, 1)
    alike = _likeness(ranks, targets, groups)
    each, together = weights.T @ weights, _by_group(weights, groups).T @ _by_group(weights, groups)
    error = float(np.sqrt(max((covariance * ((1 - alike) * each + alike * together)).sum(), 0.0)))
    seen = len(np.unique(groups))
    if seen == images:
        quantile = float(-ndtri(tail))
    else:
        means = classes if targets.ndim == 1 else 2  # that were estimated
        quantile = float(-stdtrit(seen - means, tail)) if seen > means else np.inf
    auroc = GUESS + float((weights * ranks).sum())
    return Separation(auroc, auroc - quantile * error if error else min(auroc, GUESS))


def guess_error(samples: pd.DataFrame) -> float:
    """Return the largest standard error that a guess's macro AUROC can have on the validation split.

    This needs no predictions: classes' AUROCs are taken to agree entirely, and so are a group's images if this makes it
    larger. For two classes and single images it is exact.
    """
    validation = samples[samples["split"] == "val"]
    names = class_names(validation["label"])
    cells = by_class(encoded(validation["label"], names), len(names))
    positive, images = ((cells == 1).sum(axis=0), (cells >= 0).sum(axis=0))
    if not ((positive > 0) & (positive < images)).all():
        return np.inf
    weights = _weights(cells)
    sums = np.maximum((weights**2).sum(axis=0), (_by_group(weights, group_numbers(validation)) ** 2).sum(axis=0))
    return float(np.sqrt(images * (images + 1) / 12 * sums).mean())


def _weights(cells: Ints) -> Floats:
    """Return weights [n, classes] by which ranks add up to the AUROC of each class against the rest, less 0.5."""
    own, known = cells == 1, cells >= 0
    count, images = own.sum(axis=0), known.sum(axis=0)
    weights: Floats = (own - count / images) * known / (count * (images - count))
    return weights


def _likeness(ranks: Floats, targets: Ints, groups: Ints) -> float:
    """Return the correlation, from 0 to 1, of a group's ranks in [n, classes] beyond the means of their classes."""
    residuals = ranks.copy()
    known = np.ones_like(ranks) if targets.ndim == 1 else (targets >= 0).astype(np.float64)
    if targets.ndim == 1:
        own = np.eye(int(targets.max()) + 1)[targets]
        residuals -= own @ ((own.T @ ranks) / own.sum(axis=0)[:, None])
    else:
        for side in (targets == 0, targets == 1):
            residuals -= side * ((side * ranks).sum(axis=0) / np.maximum(side.sum(axis=0), 1))
    sizes, square = _by_group(known, groups), float((residuals**2).sum())
    pairs = float((sizes * (sizes - 1)).sum())
    if not pairs or not square:
        return 0.0
    shared = float((_by_group(residuals, groups) ** 2).sum()) - square
    return min(max(shared / pairs / (square / float(known.sum())), 0.0), 1.0)


def _by_group(values: Floats, groups: Ints) -> Floats:
    """Return the sums [groups, classes] of values [n, classes]."""
    sums = np.zeros((int(groups.max()) + 1, values.shape[1]))
    np.add.at(sums, groups, values)
    return sums


@dataclass(frozen=True)
class Comparison:
    """The best trial, beside guesses and the class frequencies predicted for every image."""

    trial_id: str
    auroc: float
    least_auroc: float  # lower bound of the trial's AUROC at 95% confidence, corrected for selection bias
    val_loss: float
    baseline: float  # loss of validation's own class frequencies, the lowest that a constant prediction can have
    multi_label: bool
    temperature: float  # at which the trial's loss is lowest; of labels the median
    tempered_loss: float
    epochs: int  # that the trial's best epoch was selected from
    unjudged: tuple[str, ...]  # classes with a single group in validation, whose images the AUROC is without

    @property
    def better(self) -> bool:
        """Whether the trial tells the classes apart significantly better than guesses."""
        return self.least_auroc > GUESS


def with_baseline(trials: pd.DataFrame, predictions: Predictions) -> Comparison | None:
    """Compare the best trial with guesses and with the class frequencies; None if validation is too small for it.

    What counts is whether it tells the classes apart, by AUROC and by group: its loss also depends on its calibration.
    The trial is the best of all epochs of all trials, so the error probability is divided by their number (Bonferroni).
    Classes with a single group in validation can't be judged: the AUROC is then that of the other classes.
    """
    if not predictions.trial_ids:
        return None
    targets, groups, probabilities = predictions.targets, predictions.groups, predictions.probabilities[0]
    several = predictions.multi_label
    cells = by_class(targets, len(predictions.classes))
    sides = (1, 0) if several else (1,)
    judged = [
        place
        for place, column in enumerate(cells.T)
        if all(len(np.unique(groups[column == side])) > 1 for side in sides)
    ]
    if len(judged) < (1 if several else 2):
        return None
    epochs = int(trials["epochs"].sum())
    if several:
        auroc, least = separation(probabilities[:, judged], targets[:, judged], groups, ALPHA / epochs)
    else:
        inside = np.isin(targets, judged)
        shares = probabilities[inside][:, judged]
        shares = shares / np.maximum(shares.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
        _, among = np.unique(groups[inside], return_inverse=True)
        auroc, least = separation(shares, np.searchsorted(judged, targets[inside]), among, ALPHA / epochs)
        probabilities = probabilities / probabilities.sum(axis=1, keepdims=True)
    logs = logarithms(probabilities, multi_label=several)
    temperature = fit_temperature(logs, targets)
    return Comparison(
        predictions.trial_ids[0],
        auroc=auroc,
        least_auroc=least,
        val_loss=float(image_losses(probabilities, targets).mean()),
        baseline=constant_loss(targets, len(predictions.classes)),
        multi_label=several,
        temperature=float(np.median(temperature)),
        tempered_loss=float(image_losses(tempered(logs, temperature, multi_label=several), targets).mean()),
        epochs=epochs,
        unjudged=tuple(
            name
            for place, name in enumerate(predictions.classes)
            if place not in judged and (cells[:, place] == 1).any()
        ),
    )
