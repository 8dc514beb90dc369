"""Ensembles of a search's best trials: the mean of their probabilities, at one temperature."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tuning.insight.intervals import mean_interval
from tuning.record.journal import LOSSES
from tuning.record.predictions import Predictions
from tuning.record.targets import PRESENT
from tuning.record.temperature import Floats, Ints, fit_temperature, image_losses, logarithms, tempered, tempered_loss
from tuning.settings.config import SearchPlan

MOST_MEMBERS = 5
NO_LABEL = -1  # stands for the labels of an image that has none


@dataclass(frozen=True)
class Offer:
    """What an ensemble would gain. Losses on each half of the validation set are of what was selected on the other."""

    members: tuple[str, ...]  # that are selected on the whole validation set, the best first
    val_tempered_loss: float  # of the ensemble
    alone: float  # val_tempered_loss of the single trial that it is compared with
    gain: float  # alone - val_tempered_loss
    gain_95: tuple[float, float]  # 95% confidence interval of the gain, by group

    @property
    def better(self) -> bool:
        """Whether the ensemble is significantly better than the best trial."""
        return self.gain_95[0] > 0


def declined(plan: SearchPlan) -> str:
    """Return why the final model is one network even where an ensemble is significantly better; empty if it isn't."""
    if plan.final_data != "train":
        return f"final_data={plan.final_data} trains one network"
    if plan.ensemble is False:
        return "ensemble=false"
    if plan.ensemble == "auto" and plan.metric not in LOSSES:
        return f"the gain is one of val_tempered_loss, and metric={plan.metric}; --set ensemble=true builds it"
    return ""


def offer(predictions: Predictions, chosen: str, *, least: int = 1) -> Offer | None:
    """Return what the ensemble of these trials would gain over the trial `chosen`.

    None if `chosen` isn't among these, or if there are too few trials or groups to judge it. `least` is as in
    `selected`. The trials' best epochs were selected on the whole validation set, which favours ensemble and single
    trial alike.
    """
    first = halves(predictions.targets, predictions.groups)
    if chosen not in predictions.trial_ids or len(predictions.trial_ids) < 2 or first.all() or not first.any():
        return None
    ensemble, alone = np.empty(len(first)), np.empty(len(first))
    for half in (first, ~first):
        ranked, size = selected(predictions.probabilities[:, half], predictions.targets[half], least=least)
        single = [predictions.trial_ids.index(chosen)]
        for losses, averaged in ((ensemble, ranked[:size]), (alone, single)):
            several = predictions.multi_label
            logs = logarithms(predictions.probabilities[averaged].mean(axis=0), multi_label=several)
            temperature = fit_temperature(logs[half], predictions.targets[half])
            others = tempered(logs[~half], temperature, multi_label=several)
            losses[~half] = image_losses(others, predictions.targets[~half])
    gain, low, high = mean_interval(alone - ensemble, predictions.groups)
    return Offer(members(predictions, least=least), float(ensemble.mean()), float(alone.mean()), gain, (low, high))


def members(predictions: Predictions, *, least: int = 1) -> tuple[str, ...]:
    """Return the trials of the ensemble selected on the whole validation set, the best first; at least so many."""
    ranked, size = selected(predictions.probabilities, predictions.targets, least=least)
    return tuple(predictions.trial_ids[index] for index in ranked[:size])


def selected(probabilities: Floats, targets: Ints, *, least: int = 1) -> tuple[NDArray[np.int64], int]:
    """Return the trials from the best to the worst by tempered loss, and how many of the best make the best mean.

    All members have the same share: shares that are fitted too, greedily (Caruana et al. 2004), follow the few images
    (benchmarks/README.md).

    Args:
        probabilities: [trials, images, classes].
        targets: as in `Predictions`.
        least: members of the mean; all trials if there are fewer.
    """

    def loss(found: Floats) -> float:
        return tempered_loss(logarithms(found, multi_label=targets.ndim == 2), targets)

    ranked = np.argsort([loss(each) for each in probabilities], kind="stable")
    sizes = range(1, 1 + min(MOST_MEMBERS, len(ranked)))
    losses = [loss(probabilities[ranked[:size]].mean(axis=0)) for size in sizes]
    least = min(least, len(losses))
    return ranked, least + int(np.argmin(np.round(losses[least - 1 :], 9)))


def halves(targets: Ints, groups: Sequence[int] | Ints) -> NDArray[np.bool_]:
    """Return whether each image [n] is in the first of two halves, stratified by class, with no group in both.

    Each group, in the order of a hash, goes to the half that has fewer images of its classes or labels.
    """
    units: dict[int, Counter[int]] = {}
    for group, target in zip(groups, targets, strict=True):
        own = [int(target)] if targets.ndim == 1 else np.flatnonzero(target == PRESENT).tolist()
        units.setdefault(int(group), Counter()).update(own or [NO_LABEL])
    totals: Counter[int] = Counter()
    for counts in units.values():
        totals.update(counts)
    surplus: Counter[int] = Counter()  # of each class in the first half
    larger = 0  # by how many groups the first half is
    first = {}
    for group in sorted(units, key=lambda group: hashlib.sha256(str(group).encode()).digest()):
        lean = sum(count * surplus[label] / totals[label] for label, count in units[group].items())
        first[group] = lean < 0 or (lean == 0 and (targets.ndim == 1 or larger <= 0))
        larger += 1 if first[group] else -1
        for label, count in units[group].items():
            surplus[label] += count if first[group] else -count
    return np.array([first[int(group)] for group in groups])
