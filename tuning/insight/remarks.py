"""What trials' validation probabilities show, in sentences: whether they tell classes apart, calibration and so on."""

from pathlib import Path
from typing import NamedTuple

import pandas as pd

from tuning.insight.calibration import calibration_error
from tuning.insight.ensemble import declined, offer
from tuning.insight.guessing import Comparison, with_baseline
from tuning.insight.subgroups import compared, in_words, worse
from tuning.record.predictions import Predictions, read_predictions
from tuning.record.subgroups import subgroups_of
from tuning.record.tables import read_table, warned_shortcuts
from tuning.search.checkpoints import kept
from tuning.settings.config import SearchPlan
from tuning.settings.words import count, examples


class Remark(NamedTuple):
    """A sentence."""

    words: str
    alarming: bool = False  # shown as a warning


def remarks(
    folder: Path, trials: pd.DataFrame, samples: pd.DataFrame, plan: SearchPlan, chosen: str | None
) -> list[Remark]:
    """Return the remarks that a run's predictions and audit allow, some of them on the `chosen` trial."""
    predictions = read_predictions(folder, trials, samples, plan.metric)
    guesses = with_baseline(trials, predictions)
    found = [] if guesses is None else _on_baseline(guesses)
    if chosen is not None and chosen in predictions.trial_ids:
        found.append(_on_calibration(predictions, chosen))
        found += _on_subgroups(predictions, chosen, samples)
    if chosen is not None:
        found += _on_shortcuts(folder / "audit.parquet")
    return found + ([] if chosen is None else _on_ensemble(predictions.of(kept(folder, trials)), chosen, plan))


def _on_baseline(found: Comparison) -> list[Remark]:
    verb = "tells the classes apart" if found.better else "does not tell the classes apart significantly"
    classes = f"class{'es' * (len(found.unjudged) > 1)} {examples(found.unjudged)}"
    without = f" without {classes}, whose validation images are of a single group" if found.unjudged else ""
    remark = Remark(
        f"{found.trial_id}, the best trial of the search, {verb} better than guessing: AUROC "
        f"{found.auroc:.4f}{without}, at least {max(found.least_auroc, 0.0):.4f} with 95% confidence after correction "
        f"for selection bias (best of {count(found.epochs, 'epoch')}). val_loss {found.val_loss:.4f}, of always "
        f"predicting the class frequencies {found.baseline:.4f}.",
        alarming=not found.better,
    )
    if not found.better or found.val_loss < found.baseline:
        return [remark]
    wrong = "overconfident" if found.temperature > 1 else "miscalibrated"
    fits = "a median temperature of {:.2f} (train_final.py fits one for each label)"
    fits = (fits if found.multi_label else "temperature {:.2f} (train_final.py fits it)").format(found.temperature)
    return [
        remark,
        Remark(
            f"The probabilities of {found.trial_id} are {wrong}: always predicting the class frequencies has a lower "
            f"loss. At {fits} val_loss would be {found.tempered_loss:.4f}"
            + (", which is no better either: use the thresholds." if found.tempered_loss >= found.baseline else "."),
            alarming=True,
        ),
    ]


def _on_calibration(predictions: Predictions, trial_id: str) -> Remark:
    probabilities = predictions.of({trial_id}).probabilities[0]
    error = calibration_error(probabilities, predictions.targets)
    if predictions.multi_label:
        known = predictions.targets >= 0
        positive, expected = (predictions.targets == 1)[known].mean(), probabilities[known].mean()
        return Remark(
            f"Calibration of {trial_id} on the validation set: mean probability of a label {expected:.1%}, its "
            f"frequency {positive:.1%}, expected calibration error {error:.3f}, the mean over labels."
        )
    accuracy = (probabilities.argmax(axis=1) == predictions.targets).mean()
    return Remark(
        f"Calibration of {trial_id} on the validation set: mean confidence {probabilities.max(axis=1).mean():.0%}, "
        f"accuracy {accuracy:.0%}, expected calibration error {error:.3f}."
    )


def _on_subgroups(predictions: Predictions, trial_id: str, samples: pd.DataFrame) -> list[Remark]:
    columns, left_out = subgroups_of(samples[samples["split"] == "val"])
    if not columns:
        return [Remark(line) for line in left_out]
    probabilities = predictions.of({trial_id}).probabilities[0]
    rows, comparisons = compared(probabilities, predictions.targets, predictions.groups, columns)
    words = [f"Subgroups of the validation set, {trial_id}: {line}." for line in in_words(rows, comparisons)]
    return [Remark(line, alarming=bool(worse(rows))) for line in words] + [Remark(line) for line in left_out]


def _on_shortcuts(audit: Path) -> list[Remark]:
    kinds = warned_shortcuts(read_table(audit)) if audit.exists() else []
    if not kinds:
        return []
    words = f"A class can be predicted from {', '.join(kinds)} alone: the trials may have learnt this shortcut"
    return [
        Remark(f"{words} (the audit has the rules; evaluate.py shows how a model does on images from elsewhere).", True)
    ]


def _on_ensemble(saved: Predictions, chosen: str, plan: SearchPlan) -> list[Remark]:
    """Say what an ensemble of the trials with saved weights would gain; nothing if that can't be judged."""
    found = offer(saved, chosen, least=2 if plan.ensemble is True else 1)
    if found is None:
        return []
    if len(found.members) == 1:
        words = f"An ensemble of the {len(saved.trial_ids)} trials with saved weights gains nothing: its selection"
        return [Remark(f"{words} keeps the best single trial alone.")]
    words = (
        f"An ensemble of {count(len(found.members), 'trial')} with saved weights has val_tempered_loss "
        f"{found.val_tempered_loss:.4f}, {chosen} alone {found.alone:.4f}, each on the half of the validation set "
        f"that it was not selected on: a gain of {found.gain:.4f} (95% confidence interval "
    )
    words += "{:.4f} to {:.4f}).".format(*found.gain_95)
    if why := declined(plan):
        build = f" train_final.py does not build it: {why}."
    else:
        build = " train_final.py builds it, unless --set ensemble=false."
    return [Remark(words + (build if found.better or plan.ensemble is True else ""))]
