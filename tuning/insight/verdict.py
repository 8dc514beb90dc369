"""The verdict: do the best trials beat the default when both are retrained with the same seeds? From tables only."""

import math
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from tuning.insight.analysis import searched, top
from tuning.insight.calibration import Floats
from tuning.record.journal import FINAL, loss_like
from tuning.record.tables import FINALISTS
from tuning.search.finalists import LEAST_RUNS, candidates, most_epochs, runs_left
from tuning.settings.config import SearchPlan
from tuning.settings.words import count

LEVEL = 0.05  # probability that any finalist is called better than the default if none does
Losses: TypeAlias = "pd.Series[float]"  # of a configuration's runs, by seed


@dataclass(frozen=True)
class Verdict:
    """The result of the comparison."""

    verdict: str  # winner | tie | nothing beats the default | not enough runs
    trial_id: str | None  # of the chosen configuration; None if no trial had a finite loss
    sentence: str


def more_runs(trials: pd.DataFrame, plan: SearchPlan) -> tuple[int, str] | None:
    """Return how many runs the verdict of a finished search still needs beyond its cap on epochs, and their command."""
    if len(searched(trials)) < plan.trials or not trials["status"].isin(FINAL).all():
        return None
    runs = trials[trials["origin"] == "finalist"]
    asked = set(zip(runs["finalist_of"], runs["seed"], strict=True))
    if runs_left(trials, plan, asked, most_epochs(plan, int(searched(trials)["epochs"].sum()))):
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


def corrected_t(differences: Floats, val_over_train: float) -> tuple[float, float]:
    """Return the mean of paired differences and its standard error, for runs that split train and val at random.

    Such runs share images, so the variance of the mean is corrected to variance * (1/runs + val/train)
    (Nadeau & Bengio 2003, https://doi.org/10.1023/A:1024068626366).
    """
    variance = float(np.var(differences, ddof=1))
    return float(np.mean(differences)), math.sqrt(variance * (1 / len(differences) + val_over_train))


def holm(p_values: list[float]) -> list[float]:
    """Return adjusted p-values (Holm 1979): the smallest times their number, the next times one less, never falling."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def judge(trials: pd.DataFrame, metric: str, *, val_over_train: float) -> tuple[pd.DataFrame, Verdict]:
    """Compare the finalists with the default, seed by seed.

    A finalist beats the default if the one-sided paired t-test is significant after Holm's correction for the number
    of finalists. Those that do, and that the best of them doesn't beat in the same test, are tied with it.

    Runs are compared by `metric` at their best epoch.

    Returns:
        The rows of `finalists.parquet` (none if there are not enough runs), and the verdict.
    """
    losses: dict[str, Losses] = {
        str(trial_id): loss_like(metric, group.set_index("seed")[metric])
        for trial_id, group in counted(trials).groupby("finalist_of")
    }
    default, *others = [*candidates(trials, metric), ""]
    rows = [
        {"trial_id": trial_id} | compared
        for trial_id in others
        if {trial_id, default} <= losses.keys()
        and (compared := _compared(losses[trial_id], losses[default], val_over_train))
    ]
    if not rows:
        return pd.DataFrame(columns=FINALISTS.names), _without_runs(top(trials, metric), default)

    _add_intervals(rows)
    for row, p_value in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        row["p_value"] = p_value
    rows.sort(key=lambda row: -row["difference"])
    verdict = _decide(rows, default, losses, trials, metric, val_over_train)
    if others[0] not in {row["trial_id"] for row in rows}:  # the search was resumed after the cap had been spent
        more = f"{others[0]}, the best other trial of the search, was not compared"
        verdict = replace(verdict, sentence=f"{verdict.sentence}; {more}")
    return _table([{"trial_id": default}, *rows], trials, metric, verdict.trial_id), verdict


def _without_runs(first: pd.Series | None, default: str) -> Verdict:
    if first is None:
        return Verdict("not enough runs", None, "no trial had a finite loss")
    trial_id, why = first["trial_id"], f"because there are fewer than {LEAST_RUNS} paired runs"
    if trial_id == default:
        sentence = f"the default {default} is the best trial of the search; no other was compared with it, {why}"
    else:
        sentence = f"{trial_id} is the best trial of the search; it was not compared with the default, {why}"
    return Verdict("not enough runs", trial_id, sentence)


def _compared(mine: Losses, other: Losses, val_over_train: float) -> dict[str, Any] | None:
    """Test whether `mine` is better than `other`; None with fewer than 3 pairs of runs."""
    from scipy.stats import t

    pairs = pd.concat([mine, other], axis=1, join="inner", keys=["mine", "other"])
    pairs = pairs[pairs["other"].notna()]
    if len(pairs) < LEAST_RUNS:
        return None
    if pairs["mine"].isna().any():  # a run without a finite loss
        return {"difference": -math.inf, "error": 0.0, "runs": len(pairs), "p_value": 1.0}
    difference, error = corrected_t((pairs["other"] - pairs["mine"]).to_numpy(np.float64), val_over_train)
    if error:
        p_value = float(t.sf(difference / error, len(pairs) - 1))
    else:  # all differences are equal, as coarse metrics may give: sign test
        p_value = 0.5 ** len(pairs) if difference > 0 else 1.0
    return {"difference": difference, "error": error, "runs": len(pairs), "p_value": p_value}


def _add_intervals(rows: list[dict[str, Any]]) -> None:
    """Add two-sided confidence intervals that exclude 0 if the one-sided test at the row's step of Holm is significant.

    Their confidence follows from the step: 1 - 2 * LEVEL / tests, so 95% for the first of two finalists.
    """
    from scipy.stats import t

    tests = len(rows)
    for row in sorted(rows, key=lambda row: row["p_value"]):
        reach = float(t.isf(LEVEL / tests, row["runs"] - 1)) * row["error"]
        row["low"], row["high"] = row["difference"] - reach, row["difference"] + reach
        row["confidence"] = 1 - 2 * LEVEL / tests
        tests -= row["p_value"] <= LEVEL / tests  # Holm's procedure ends at the first that isn't significant


def _decide(
    rows: list[dict[str, Any]],
    default: str,
    losses: dict[str, Losses],
    trials: pd.DataFrame,
    metric: str,
    val_over_train: float,
) -> Verdict:
    """Return the verdict on compared finalists, given from the best mean down."""
    better = [row for row in rows if row["p_value"] <= LEVEL]
    if not better:
        best = f"the best, {rows[0]['trial_id']}, {_difference(rows[0], metric)}"
        sentence = f"no finalist is significantly better than the default {default}; {best}"
        return Verdict("nothing beats the default", default, sentence)
    tied = [better[0]]
    for row in better[1:]:
        against = _compared(losses[better[0]["trial_id"]], losses[row["trial_id"]], val_over_train)
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
    return (
        f"is {abs(row['difference']):.4f} {direction} in {metric} ({100 * row['confidence']:.3g}% confidence interval "
        f"{row['low']:.4f} to {row['high']:.4f}, {count(row['runs'], 'paired run')}, p = {row['p_value']:.2g})"
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
    table["luck"] = loss_like(metric, table["mean"]) - loss_like(metric, table["searched"])
    return table.reset_index()[FINALISTS.names]
