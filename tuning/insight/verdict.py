"""The verdict: do the best trials beat the default? By runs with the same seeds, or on the same validation images."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from tuning.insight import paired
from tuning.insight.analysis import searched, top
from tuning.insight.guessing import with_baseline
from tuning.record.journal import FINAL, loss_like
from tuning.record.predictions import MOST_TRIALS, Predictions, read_predictions
from tuning.record.tables import FINALISTS
from tuning.search.finalists import LEAST_RUNS, candidates, most_epochs, runs_left, saved_epochs
from tuning.settings.config import SearchPlan
from tuning.settings.words import count

LEVEL = 0.05  # probability that any finalist is called better than the default if none does
Losses: TypeAlias = "pd.Series[float]"  # of a configuration's runs, by seed


@dataclass(frozen=True)
class Verdict:
    """The result of the comparison."""

    verdict: str  # winner | tie | nothing beats the default | no significant difference | nothing beats guessing |
    # not enough runs
    trial_id: str | None  # of the chosen configuration; None if no trial had a finite loss
    sentence: str


def more_runs(trials: pd.DataFrame, plan: SearchPlan) -> tuple[int, str] | None:
    """Return how many runs the verdict of a finished search still needs beyond its cap on epochs, and their command."""
    if len(searched(trials)) < plan.trials or not trials["status"].isin(FINAL).all():
        return None
    runs = trials[trials["origin"] == "finalist"]
    asked = set(zip(runs["finalist_of"], runs["seed"], strict=True))
    if runs_left(trials, plan, asked, most_epochs(plan, saved_epochs(trials, plan.epochs))):
        return None  # the search makes these, or --resume
    left = len(runs_left(trials, plan, asked))
    allowed = (len(asked) + left) * plan.epochs
    return (left, f"{plan.resume_command} --set finalist_epochs={allowed}") if left else None


def counted(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the finalist runs that count: those that neither a failure nor the time budget cut short."""
    return trials[(trials["origin"] == "finalist") & trials["status"].isin(["completed", "converged", "diverged"])]


def val_over_train(samples: pd.DataFrame) -> float:
    """Return the number of validation images per training image."""
    splits = samples["split"].value_counts()
    return float(splits.get("val", 0) / max(splits.get("train", 0), 1))


@dataclass(frozen=True)
class Runs:
    """The runs of finalists and the default, and what their differences vary by."""

    losses: dict[str, Losses]  # by the configuration's trial
    trial_ids: dict[str, "pd.Series[str]"]  # ids of the runs by seed, by the configuration's trial
    metric: str
    val_over_train: float  # number of validation images per training image
    predictions: Predictions | None = None  # of the runs on a split that the user gave

    def error(self, differences: "pd.Series[float]", mine: str, other: str) -> tuple[float, float]:
        """Return the standard error of the mean of paired differences by seed, and its degrees of freedom.

        Runs that split train and val at random share images: their variance is corrected to
        variance * (1/runs + val/train) (Nadeau & Bengio 2003, https://doi.org/10.1023/A:1024068626366). On a given
        split, runs differ by seed alone: the variance that the validation images leave is added, with degrees of
        freedom by Satterthwaite (1946).
        """
        runs, variance = len(differences), float(np.var(differences, ddof=1))
        own, others = (list(self.trial_ids[of][differences.index]) for of in (mine, other))
        if self.predictions is None or not {*own, *others} <= set(self.predictions.trial_ids):
            return math.sqrt(variance * (1 / runs + self.val_over_train)), runs - 1
        error, groups = paired.image_error(self.predictions, own, others, self.metric)
        parts = np.array([variance / runs, error**2])
        freedom = parts.sum() ** 2 / (parts**2 / [runs - 1, max(groups - 1, 1)]).sum() if parts.any() else runs - 1
        return math.sqrt(parts.sum()), float(freedom)


def holm(p_values: list[float]) -> list[float]:
    """Return adjusted p-values (Holm 1979): the smallest times their number, the next times one less, never falling."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def judged(
    run: Path, trials: pd.DataFrame, samples: pd.DataFrame, metric: str, *, val_drawn: bool
) -> tuple[pd.DataFrame, Verdict]:
    """Return `judge` of a run's folder, with the predictions in it; `val_drawn`: the search drew the validation set."""
    compared = candidates(trials, metric)[:MOST_TRIALS]
    predictions = read_predictions(run, trials[trials["trial_id"].isin(compared)], samples, metric)
    of_runs = None if val_drawn else read_predictions(run, counted(trials), samples, metric)
    ratio = val_over_train(samples)
    return judge(trials, metric, val_over_train=ratio, predictions=predictions, of_runs=of_runs)


def judge(
    trials: pd.DataFrame,
    metric: str,
    *,
    val_over_train: float,
    predictions: Predictions | None = None,
    of_runs: Predictions | None = None,
) -> tuple[pd.DataFrame, Verdict]:
    """Compare the finalists with the default, seed by seed.

    A finalist beats the default if the one-sided paired t-test is significant after Holm's correction for the number
    of finalists. Those that do, and that the best of them doesn't beat in the same test, are tied with it.

    Runs are compared by `metric` at their best epoch. If there are not enough of them, the best trial is compared with
    the default on the same validation images instead (`paired.compare`), which takes no training.

    Args:
        trials: the table of trials.
        metric: as in `SearchPlan`.
        val_over_train: from the function of this name.
        predictions: of the default, and of the best trials.
        of_runs: predictions of the finalists' runs, if the validation images are the same in all.

    Returns:
        The rows of `finalists.parquet` (none if nothing could be compared), and the verdict.
    """
    grouped = {str(trial_id): group.set_index("seed") for trial_id, group in counted(trials).groupby("finalist_of")}
    losses: dict[str, Losses] = {trial_id: loss_like(metric, group[metric]) for trial_id, group in grouped.items()}
    ids = {trial_id: group["trial_id"] for trial_id, group in grouped.items()}
    runs = Runs(losses, ids, metric, val_over_train, of_runs)
    default, *others = [*candidates(trials, metric), ""]
    rows = [
        {"trial_id": trial_id} | compared
        for trial_id in others
        if {trial_id, default} <= losses.keys() and (compared := _compared(runs, trial_id, default))
    ]
    if not rows:
        return _without_runs(trials, metric, default, predictions)

    _add_intervals(rows)
    for row, p_value in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        row["p_value"] = p_value
    rows.sort(key=lambda row: -row["difference"])
    verdict = _decide(rows, default, runs, trials)
    if others[0] not in {row["trial_id"] for row in rows}:  # the search was resumed after the cap had been spent
        more = f"{others[0]}, the best other trial of the search, was not compared"
        verdict = replace(verdict, sentence=f"{verdict.sentence}; {more}")
    return _table([{"trial_id": default}, *rows], trials, metric, verdict.trial_id), verdict


def _without_runs(
    trials: pd.DataFrame, metric: str, default: str, predictions: Predictions | None
) -> tuple[pd.DataFrame, Verdict]:
    """Compare the best trial of the search with the default on the validation images, as far as that can be done."""
    first, nothing = top(trials, metric), pd.DataFrame(columns=FINALISTS.names)
    if first is None:
        return nothing, Verdict("not enough runs", None, "no trial had a finite loss")
    best = str(first["trial_id"])
    if predictions is not None and (guesses := with_baseline(searched(trials), predictions)) and not guesses.better:
        sentence = f"{best} is the best trial of the search, but does not tell the classes apart significantly better"
        return nothing, Verdict("nothing beats guessing", best, f"{sentence} than guessing")
    if best == default:
        others = len(searched(trials)) > 1
        sentence = f"the default {default} is the best trial of the search"
        return nothing, Verdict("nothing beats the default" if others else "not enough runs", default, sentence)
    tried = int(searched(trials)["val_loss"].notna().sum())
    found = predictions and paired.compare(predictions, best, default, metric, tried=tried)
    if not found:
        lost = trials.loc[trials["trial_id"] == default, metric].isna().all()
        why = "the default failed or had no finite loss" if lost else "their predictions are missing"
        sentence = f"{best} is the best trial of the search; it was not compared with the default, because {why}"
        return nothing, Verdict("not enough runs", best, sentence)
    images = f"on the same {count(found.images, 'validation image')}"
    images += f" of {count(found.groups, 'group')}" if found.groups < found.images else ""
    row = {"trial_id": best, "difference": found.difference, "low": found.low, "high": found.high}
    row |= {"p_value": found.p_value, "confidence": 0.95, "chosen_from": tried}
    if found.better:
        verdict, sentence = "winner", f"{best} beats the default {default} {images}: it {_difference(row, metric)}"
    else:
        verdict = "no significant difference"
        sentence = f"{best} is the best trial of the search, but not significantly better than the default {default} "
        sentence += f"{images}: it {_difference(row, metric)}"
    return _table([{"trial_id": default}, row], trials, metric, best), Verdict(verdict, best, sentence)


def _compared(runs: Runs, mine: str, other: str) -> dict[str, Any] | None:
    """Test whether the configuration `mine` is better than `other`; None with fewer than 3 pairs of runs."""
    from scipy.stats import t

    pairs = pd.concat([runs.losses[mine], runs.losses[other]], axis=1, join="inner", keys=["mine", "other"])
    pairs = pairs[pairs["other"].notna()]
    if len(pairs) < LEAST_RUNS:
        return None
    if pairs["mine"].isna().any():  # a run without a finite loss
        return {"difference": -math.inf, "error": 0.0, "freedom": 1.0, "runs": len(pairs), "p_value": 1.0}
    differences = (pairs["other"] - pairs["mine"]).astype(float)
    difference, (error, freedom) = float(differences.mean()), runs.error(differences, mine, other)
    if error:
        p_value = float(t.sf(difference / error, freedom))
    else:  # all differences are equal, as coarse metrics may give: sign test
        p_value = 0.5 ** len(pairs) if difference > 0 else 1.0
    return {
        "difference": difference,
        "error": error,
        "freedom": freedom,
        "runs": len(pairs),
        "p_value": p_value,
    }


def _add_intervals(rows: list[dict[str, Any]]) -> None:
    """Add two-sided confidence intervals that exclude 0 if the one-sided test at the row's step of Holm is significant.

    Their confidence follows from the step: 1 - 2 * LEVEL / tests, so 95% for the first of two finalists.
    """
    from scipy.stats import t

    tests = len(rows)
    for row in sorted(rows, key=lambda row: row["p_value"]):
        reach = float(t.isf(LEVEL / tests, row["freedom"])) * row["error"]
        row["low"], row["high"] = row["difference"] - reach, row["difference"] + reach
        row["confidence"] = 1 - 2 * LEVEL / tests
        tests -= row["p_value"] <= LEVEL / tests  # Holm's procedure ends at the first that isn't significant


def _decide(rows: list[dict[str, Any]], default: str, runs: Runs, trials: pd.DataFrame) -> Verdict:
    """Return the verdict on compared finalists, given from the best mean down."""
    metric = runs.metric
    better = [row for row in rows if row["p_value"] <= LEVEL]
    if not better:
        best = f"the best, {rows[0]['trial_id']}, {_difference(rows[0], metric)}"
        sentence = f"no finalist is significantly better than the default {default}; {best}"
        return Verdict("nothing beats the default", default, sentence)
    tied = [better[0]]
    for row in better[1:]:
        against = _compared(runs, better[0]["trial_id"], row["trial_id"])
        tied += [row] if against is None or against["p_value"] > LEVEL else []
    if len(tied) == 1:
        winner = tied[0]["trial_id"]
        return Verdict("winner", winner, f"{winner} beats the default {default}: it {_difference(tied[0], metric)}")
    seconds = counted(trials).groupby("finalist_of")["seconds"].mean()
    cheapest = min(tied, key=lambda row: float(seconds[row["trial_id"]]))
    listed = " and ".join(f"{row['trial_id']} ({seconds[row['trial_id']]:.0f} s per run)" for row in tied)
    sentence = (
        f"{listed} beat the default {default} and are not significantly different from each other; the cheapest, "
        f"{cheapest['trial_id']}, is chosen: it {_difference(cheapest, metric)}"
    )
    return Verdict("tie", cheapest["trial_id"], sentence)


def _difference(row: dict[str, Any], metric: str) -> str:
    """Say how a finalist differs from the default, as a predicate."""
    if not math.isfinite(row["difference"]):
        return "had a run without a finite loss"
    direction = "better" if row["difference"] >= 0 else "worse"
    if "runs" in row:
        how = count(row["runs"], "paired run")
    else:
        how = f"corrected for the choice among {count(row['chosen_from'], 'trial')}"
    return (
        f"is {abs(row['difference']):.4f} {direction} in {metric} ({100 * row['confidence']:.3g}% confidence interval "
        f"{row['low']:.4f} to {row['high']:.4f}, {how}, p = {row['p_value']:.2g})"
    )


def _table(rows: list[dict[str, Any]], trials: pd.DataFrame, metric: str, chosen: str | None) -> pd.DataFrame:
    """Return the rows of `finalists.parquet`, the default's first."""
    runs = counted(trials).groupby("finalist_of")
    table = pd.DataFrame(rows).set_index("trial_id").replace([math.inf, -math.inf], math.nan)
    table = table.assign(
        role=["default", *["finalist"] * (len(rows) - 1)],
        chosen=table.index == chosen,
        runs=runs.size(),
        mean=runs[metric].agg(lambda values: values.dropna().mean()),
        sd=runs[metric].agg(lambda values: values.dropna().std()),
        searched=trials.set_index("trial_id")[metric],
        seconds=runs["seconds"].agg(lambda values: values.mean()),
    )
    table["runs"] = table["runs"].fillna(0).astype(int)  # 0: compared on the validation images of the search alone
    table["luck"] = loss_like(metric, table["mean"]) - loss_like(metric, table["searched"])
    return table.reset_index()[FINALISTS.names]
