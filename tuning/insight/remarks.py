"""What trials' validation probabilities show, in sentences: class-frequency baseline, calibration, ensemble."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from tuning.insight.calibration import Floats, Ints, calibration_error, logarithms
from tuning.insight.ensemble import offer
from tuning.insight.intervals import mean_interval
from tuning.record.predictions import Predictions, read_predictions
from tuning.search.checkpoints import kept
from tuning.settings.words import count

ALPHA = 0.05  # probability that trials that only guess are called better than the baseline


class Remark(NamedTuple):
    """A sentence."""

    words: str
    alarming: bool = False  # shown as a warning


def remarks(folder: Path, trials: pd.DataFrame, samples: pd.DataFrame, chosen: str | None) -> list[Remark]:
    """Return the remarks that a run's predictions allow; the calibration reported is that of the `chosen` trial."""
    predictions = read_predictions(folder, trials, samples)
    compared = with_baseline(trials, predictions)
    found = [] if compared is None else [_on_baseline(compared)]
    if chosen is not None and chosen in predictions.trial_ids:
        found.append(_on_calibration(predictions, chosen))
    worthless = compared is not None and not compared.better
    return found + _on_ensemble(predictions, kept(folder, trials), worthless=worthless)


@dataclass(frozen=True)
class Comparison:
    """The trial with the lowest validation loss, and the baseline: the class frequencies predicted for every image."""

    trial_id: str
    val_loss: float
    baseline: float  # loss of validation's own class frequencies, the lowest that a constant prediction can have
    least_gain: float  # lower bound of the trial's gain at 95% confidence, corrected for selection bias
    epochs: int  # that the trial's best epoch was selected from

    @property
    def better(self) -> bool:
        """Whether the trial is significantly better than the baseline."""
        return self.least_gain > 0


def with_baseline(trials: pd.DataFrame, predictions: Predictions) -> Comparison | None:
    """Compare the best trial with the class-frequency baseline; None if the validation set is too small for it.

    The gain is measured image by image, with a confidence interval by class and group. The trial is the best of all
    epochs of all trials, so the error probability is divided by their number (Bonferroni). Classes with a single group
    in validation can't be judged: the interval is then that of telling the other classes apart.
    """
    if not predictions.trial_ids:
        return None
    targets, groups, probabilities = predictions.targets, predictions.groups, predictions.probabilities[0]
    judged = [index for index in np.unique(targets) if len(np.unique(groups[targets == index])) > 1]
    if len(judged) < 2:
        return None
    epochs = int(trials["epochs"].sum())
    inside = np.isin(targets, judged)
    _, gains = _losses_and_gains(probabilities[inside][:, judged], np.searchsorted(judged, targets[inside]))
    _, least, _ = mean_interval(gains, groups[inside], ALPHA / epochs, targets[inside])
    losses, gains = _losses_and_gains(probabilities, targets)
    return Comparison(predictions.trial_ids[0], float(losses.mean()), float((losses + gains).mean()), least, epochs)


def _losses_and_gains(probabilities: Floats, targets: Ints) -> tuple[Floats, Floats]:
    """Return each image's loss, after scaling probabilities to a sum of 1, and how much higher the baseline's is."""
    losses = -logarithms(probabilities[np.arange(len(targets)), targets] / probabilities.sum(axis=1))
    shares = np.bincount(targets) / len(targets)
    return losses, -np.log(shares[targets]) - losses


def _on_baseline(found: Comparison) -> Remark:
    gain = f"a gain of at least {found.least_gain:.4f} with 95% confidence" if found.better else "no significant gain"
    return Remark(
        f"{found.trial_id}, the best trial of the search, is {'' if found.better else 'not significantly '}better than "
        f"always predicting the class frequencies: val_loss {found.val_loss:.4f} against {found.baseline:.4f}, {gain} "
        f"after correction for selection bias (best of {count(found.epochs, 'epoch')}).",
        alarming=not found.better,
    )


def _on_calibration(predictions: Predictions, trial_id: str) -> Remark:
    probabilities = predictions.of({trial_id}).probabilities[0]
    accuracy = (probabilities.argmax(axis=1) == predictions.targets).mean()
    error = calibration_error(probabilities, predictions.targets)
    return Remark(
        f"Calibration of {trial_id} on the validation set: mean confidence {probabilities.max(axis=1).mean():.0%}, "
        f"accuracy {accuracy:.0%}, expected calibration error {error:.3f}."
    )


def _on_ensemble(predictions: Predictions, saved: Collection[str], *, worthless: bool) -> list[Remark]:
    """Say what an ensemble of the trials with saved weights would gain; nothing if that can't be judged."""
    found, of_all = offer(predictions.of(saved)), offer(predictions)
    if found is None or of_all is None:
        return []
    if found.gain_95 == (0.0, 0.0):
        words = f"An ensemble of the {len(saved)} trials with saved weights gains nothing: its selection"
        return [Remark(f"{words} keeps the best single trial alone.")]
    total = len(predictions.trial_ids)
    others = f" ({of_all.val_loss:.4f} for all {total} trials)" if len(saved) < total else ""
    build = " To build it: train_final.py --set ensemble=true." if found.better and not worthless else ""
    return [
        Remark(
            f"An ensemble of the {len(saved)} trials with saved weights has val_loss {found.val_loss:.4f}{others}, the "
            f"best single trial {found.alone:.4f}, each on the half of the validation set that it was not selected on: "
            "a gain of {:.4f} (95% confidence interval {:.4f} to {:.4f}).".format(found.gain, *found.gain_95)
            + build
        )
    ]
