"""What trials' validation probabilities say, in words: of guessing, of calibration, and of an ensemble."""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from tuning.insight.analysis import Guessing, guessing
from tuning.insight.calibration import calibration_error
from tuning.insight.ensemble import offer
from tuning.record.predictions import Predictions, read_predictions
from tuning.search.checkpoints import kept


class Remark(NamedTuple):
    """A sentence."""

    words: str
    alarming: bool = False  # to be seen first


def remarks(folder: Path, trials: pd.DataFrame, samples: pd.DataFrame, chosen: str | None) -> list[Remark]:
    """What there is to be said; nothing of what can't be judged.

    Args:
        folder: of the run.
        trials: the searched ones.
        samples: the run's.
        chosen: id of the trial whose calibration is told.
    """
    predictions = read_predictions(folder, trials, samples)
    guessed = guessing(trials, predictions)
    found = [] if guessed is None else [_of_guessing(guessed)]
    if chosen is not None and chosen in predictions.trial_ids:
        found.append(Remark(_of_calibration(predictions, chosen)))
    worthless = guessed is not None and not guessed.better
    words = _of_ensemble(predictions, kept(folder, trials), worthless=worthless)
    return found + ([] if words is None else [Remark(words)])


def _of_guessing(found: Guessing) -> Remark:
    least = f", by {found.least_gain:.4f} at least" if found.better else ""
    losses = f"val_loss {found.val_loss:.4f} against {found.frequencies:.4f}"
    return Remark(
        f"The best of the search, {found.trial_id}, is {'' if found.better else 'no '}better than the class "
        f"frequencies ({losses}){least}, the luck of picking from {found.looks} epochs allowed for.",
        alarming=not found.better,
    )


def _of_calibration(predictions: Predictions, trial_id: str) -> str:
    probabilities = predictions.of({trial_id}).probabilities[0]
    right = (probabilities.argmax(axis=1) == predictions.targets).mean()
    error = calibration_error(probabilities, predictions.targets)
    sure = probabilities.max(axis=1).mean()
    return f"{trial_id} is {sure:.0%} sure and {right:.0%} right: expected calibration error {error:.3f}."


def _of_ensemble(predictions: Predictions, there: Collection[str], *, worthless: bool) -> str | None:
    """What an ensemble of the trials whose weights are there would give; null where that can't be judged."""
    found, every = offer(predictions.of(there)), offer(predictions)
    if found is None or every is None:
        return None
    low, high = found.gain_95
    n_trials = len(predictions.trial_ids)
    others = f" (of all {n_trials} trials {every.val_loss:.4f})" if len(there) < n_trials else ""
    build = "; train_final.py --set ensemble=true builds it" if found.better and not worthless else ""
    return (
        f"An ensemble of the {len(there)} kept trials has val_loss {found.val_loss:.4f}{others}, the best of them "
        f"alone {found.alone:.4f}, on the halves of validation that they weren't chosen on: a gain of {found.gain:.4f} "
        f"(95% {low:.4f} to {high:.4f}){build}."
    )
