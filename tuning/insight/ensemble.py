"""Ensembles of a search's trials, by greedy selection on validation probabilities.

Caruana et al. 2004 (https://doi.org/10.1145/1015330.1015432).
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tuning.insight.intervals import mean_interval
from tuning.record.predictions import Predictions
from tuning.record.temperature import Floats, Ints

ROUNDS = 50  # of greedy selection


@dataclass(frozen=True)
class Offer:
    """What an ensemble would gain. Losses on each half of the validation set are of what was selected on the other."""

    shares: dict[str, float]  # of the members selected on the whole validation set, largest first; they add up to 1
    val_loss: float  # of the ensemble
    alone: float  # val_loss of the best single trial
    gain: float  # alone - val_loss
    gain_95: tuple[float, float]  # 95% confidence interval of the gain, by group

    @property
    def better(self) -> bool:
        """Whether the ensemble is significantly better than the best trial."""
        return self.gain_95[0] > 0


def offer(predictions: Predictions) -> Offer | None:
    """Return what the ensemble of these trials would gain; None if there are too few trials or groups to judge it.

    The trials' best epochs were selected on the whole validation set, which favours ensemble and single trial alike.
    """
    first = halves(predictions.targets, predictions.groups)
    if len(predictions.trial_ids) < 2 or first.all() or not first.any():
        return None
    true = predictions.true
    ensemble, alone = np.empty(len(first)), np.empty(len(first))
    for half in (first, ~first):
        best = np.log(true[:, half]).mean(axis=1).argmax()
        ensemble[~half] = -np.log(selected(true[:, half]) @ true[:, ~half])
        alone[~half] = -np.log(true[best, ~half])
    gain, low, high = mean_interval(alone - ensemble, predictions.groups)
    return Offer(named_shares(predictions), float(ensemble.mean()), float(alone.mean()), gain, (low, high))


def named_shares(predictions: Predictions) -> dict[str, float]:
    """Return each member's share in the ensemble selected on the whole validation set, the largest first."""
    shares = selected(predictions.true)
    order = np.argsort(-shares, kind="stable")
    return {predictions.trial_ids[index]: float(shares[index]) for index in order if shares[index]}


def selected(true: Floats) -> Floats:
    """Return shares [trials] in the ensemble of lowest cross-entropy, by greedy forward selection with replacement.

    Each round adds the trial that lowers the loss most. Of the ensembles of all rounds the best is returned, of equally
    good ones the smallest. `true` [trials, images] are the probabilities of each image's true class.
    """
    total, times = np.zeros(true.shape[1]), np.zeros(len(true))
    least, best = np.inf, times
    for size in range(1, ROUNDS + 1):
        losses = -np.log((total + true) / size).mean(axis=1)
        chosen = int(losses.argmin())
        total += true[chosen]
        times[chosen] += 1
        if losses[chosen] < least - 1e-9:
            least, best = losses[chosen], times / size
    return best


def halves(targets: Ints, groups: Sequence[int] | Ints) -> NDArray[np.bool_]:
    """Return whether each image [n] is in the first of two halves, stratified by class, with no group in both.

    Each group, in the order of a hash, goes to the half that has fewer images of its classes.
    """
    units: dict[int, Counter[int]] = {}
    for group, target in zip(groups, targets, strict=True):
        units.setdefault(int(group), Counter())[int(target)] += 1
    totals = Counter(int(target) for target in targets)
    surplus: Counter[int] = Counter()  # of each class in the first half
    first = {}
    for group in sorted(units, key=lambda group: hashlib.sha256(str(group).encode()).digest()):
        lean = sum(count * surplus[label] / totals[label] for label, count in units[group].items())
        first[group] = lean <= 0
        for label, count in units[group].items():
            surplus[label] += count if first[group] else -count
    return np.array([first[int(group)] for group in groups])
