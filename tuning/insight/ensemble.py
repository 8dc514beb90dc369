"""What an ensemble of a search's trials would give: greedy selection on validation probabilities.

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

ROUNDS = 50  # of greedy selection


@dataclass(frozen=True)
class Offer:
    """What an ensemble would give. Each image is judged by what was chosen on the half of validation it isn't in."""

    shares: dict[str, float]  # of each member, chosen on all of validation; the largest first; they add up to 1
    val_loss: float  # of ensembles
    alone: float  # of single trials
    gain: float  # alone - val_loss
    gain_95: tuple[float, float]  # interval of the gain, by group

    @property
    def better(self) -> bool:
        """Whether the ensemble is better than the best trial by more than chance."""
        return self.gain_95[0] > 0


def offer(predictions: Predictions) -> Offer | None:
    """What the ensemble of these trials would give; null where there is too little to choose from or to judge on.

    The trials' best epochs were chosen on all of validation, which serves an ensemble and a single trial alike.
    """
    first = halves(predictions.targets, predictions.groups)
    if len(predictions.trial_ids) < 2 or first.all() or not first.any():
        return None
    true = predictions.true
    together, alone = np.empty(len(first)), np.empty(len(first))
    for chosen_on in (first, ~first):
        shares = selected(true[:, chosen_on])
        best = np.log(true[:, chosen_on]).mean(axis=1).argmax()
        together[~chosen_on] = -np.log(shares @ true[:, ~chosen_on])
        alone[~chosen_on] = -np.log(true[best, ~chosen_on])
    gain, low, high = mean_interval(alone - together, predictions.groups)
    members = named_shares(predictions)
    return Offer(members, float(together.mean()), float(alone.mean()), gain, (low, high))


def named_shares(predictions: Predictions) -> dict[str, float]:
    """The ensemble chosen on all of validation: each member's share, the largest first."""
    shares = selected(predictions.true)
    order = np.argsort(-shares, kind="stable")
    return {predictions.trial_ids[index]: float(shares[index]) for index in order if shares[index]}


def selected(true: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shares [trials] in an ensemble of the least cross-entropy, by greedy forward selection with replacement.

    The trial that helps most is added, again and again; of all these ensembles the best is taken, and the smallest one.

    Args:
        true: probability [trials, images] of the class that an image has.
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


def halves(targets: NDArray[np.int64], groups: Sequence[int] | NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each image [n] lies in the first of two halves with as many of each class; no group lies in both.

    Groups go, in an order that is drawn by a hash, to the half that has fewer of their classes.
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
