"""The verdict: do the best trials beat the default when all are trained again with the same seeds? From tables only."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuning.insight.analysis import searched, top
from tuning.record.journal import FINAL, loss_like
from tuning.record.tables import FINALISTS
from tuning.search.finalists import LEAST_RUNS, candidates, most_epochs, runs_left
from tuning.settings.config import SearchPlan

LEVEL = 0.05  # chance that anything is said to beat the default where nothing does
Losses: TypeAlias = "pd.Series[float]"  # of a configuration's runs, by seed


@dataclass(frozen=True)
class Verdict:
    """What came of the comparison."""

    verdict: str  # winner | tie | nothing beats the default | not enough runs
    trial_id: str | None  # of the chosen configuration; null where no trial had a finite loss
    sentence: str


class More(NamedTuple):
    """Runs that a verdict needs and the cap doesn't allow."""

    runs: int
    command: str  # which makes them


def more_runs(trials: pd.DataFrame, plan: SearchPlan) -> More | None:
    """What the verdict of a search that is over still needs; null where that is nothing, or is under way.

    Args:
        trials: `trials.parquet`.
        plan: of the search.
    """
    if len(searched(trials)) < plan.trials or not trials["status"].isin(FINAL).all():
        return None
    runs = trials[trials["origin"] == "finalist"]
    asked = set(zip(runs["finalist_of"], runs["seed"], strict=True))
    if runs_left(trials, plan, asked, most_epochs(plan, int(searched(trials)["epochs"].sum()))):
        return None  # the search makes these, or --resume
    left = len(runs_left(trials, plan, asked))
    allowed = (len(asked) + left) * plan.epochs
    return More(left, f"{plan.resume_command} --set finalist_epochs={allowed}") if left else None


def counted(trials: pd.DataFrame) -> pd.DataFrame:
    """Finalists' runs that show what their configuration is worth: not those that a fault or a budget cut short."""
    return trials[(trials["origin"] == "finalist") & trials["status"].isin(["completed", "converged", "diverged"])]


def val_over_train(samples: pd.DataFrame) -> float:
    """Images in validation over images in training."""
    splits = samples["split"].value_counts()
    return float(splits.get("val", 0) / max(splits.get("train", 0), 1))


def corrected_t(differences: NDArray[np.float64], val_over_train: float) -> tuple[float, float]:
    """Mean of paired differences and its standard error, for runs that redraw training and validation images.

    Such runs share images, so their mean varies more than their spread tells: the variance is multiplied by
    1/runs + val/train (Nadeau & Bengio 2003, https://doi.org/10.1023/A:1024068626366).
    """
    spread = float(np.var(differences, ddof=1))
    return float(np.mean(differences)), math.sqrt(spread * (1 / len(differences) + val_over_train))


def holm(p_values: list[float]) -> list[float]:
    """Adjusted p-values (Holm 1979): the smallest times their number, the next times one less, never decreasing."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def judge(trials: pd.DataFrame, metric: str, *, val_over_train: float) -> tuple[pd.DataFrame, Verdict]:
    """Compare the finalists with the default, seed by seed.

    A finalist beats the default where the one-sided paired t test says so, after Holm's correction for the number of
    finalists. Of several that do, those that the best of them doesn't beat (tested alike) are tied with it.

    Args:
        trials: `trials.parquet`, with the runs of origin `finalist`.
        metric: compared at each run's best epoch.
        val_over_train: images in validation over images in training.

    Returns:
        The rows of `finalists.parquet` (none where there were not enough runs), and the verdict.
    """
    runs = counted(trials)
    losses = {
        str(trial_id): group.set_index("seed")[metric].map(lambda value: loss_like(metric, value))
        for trial_id, group in runs.groupby("finalist_of")
    }
    default, *others = [*candidates(trials, metric), ""]
    rows = []
    for trial_id in others:
        compared = (
            trial_id in losses and default in losses and _compared(losses[trial_id], losses[default], val_over_train)
        )
        if compared:
            rows.append({"trial_id": trial_id} | compared)
    if not rows:
        first = top(trials, metric)
        if first is None:
            return _table([], trials, metric, ""), Verdict("not enough runs", None, "no trial had a finite loss")
        best, other = f"{first['trial_id']} is the best of the search", "it was not compared with the default"
        if first["trial_id"] == default:
            best, other = f"the default {default} is the best of the search", "no other was compared with it"
        sentence = f"{best}; for want of runs {other}"
        return _table([], trials, metric, ""), Verdict("not enough runs", first["trial_id"], sentence)

    _add_intervals(rows)
    for row, p_value in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        row["p_value"] = p_value
    rows.sort(key=lambda row: -row["difference"])
    verdict = _decide(rows, default, losses, trials, metric, val_over_train)
    if others[0] not in {row["trial_id"] for row in rows}:  # a search that went on, with the cap spent before, say
        told = f"{verdict.sentence}; {others[0]}, the best of the others in the search, was not compared"
        verdict = replace(verdict, sentence=told)
    return _table([{"trial_id": default}, *rows], trials, metric, verdict.trial_id), verdict


def _compared(mine: Losses, other: Losses, val_over_train: float) -> dict[str, Any] | None:
    """How much better `mine` is than `other`; null with fewer than 3 pairs of runs."""
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
    else:  # the same difference each time, as coarse metrics may give: the sign test's
        p_value = 0.5 ** len(pairs) if difference > 0 else 1.0
    return {"difference": difference, "error": error, "runs": len(pairs), "p_value": p_value}


def _add_intervals(rows: list[dict[str, Any]]) -> None:
    """Two-sided intervals whose lower end lies above 0 where the one-sided test at the row's step of Holm says so."""
    from scipy.stats import t

    tests = len(rows)
    for row in sorted(rows, key=lambda row: row["p_value"]):
        reach = float(t.isf(LEVEL / tests, row["runs"] - 1)) * row["error"]
        row["low"], row["high"] = row["difference"] - reach, row["difference"] + reach
        tests -= row["p_value"] <= LEVEL / tests  # Holm's procedure ends at the first that isn't better


def _decide(
    rows: list[dict[str, Any]],
    default: str,
    losses: dict[str, Losses],
    trials: pd.DataFrame,
    metric: str,
    val_over_train: float,
) -> Verdict:
    """The verdict on compared finalists, given from the best mean down."""
    better = [row for row in rows if row["p_value"] <= LEVEL]
    if not better:
        return Verdict(
            "nothing beats the default", default, f"nothing beats the default {default}: {_said(rows[0], metric)}"
        )
    tied = [better[0]]
    for row in better[1:]:
        against = _compared(losses[better[0]["trial_id"]], losses[row["trial_id"]], val_over_train)
        tied += [row] if against is None or against["p_value"] > LEVEL else []
    if len(tied) == 1:
        return Verdict("winner", tied[0]["trial_id"], f"it beats the default {default}: {_said(tied[0], metric)}")
    seconds = counted(trials).groupby("finalist_of")["seconds"].mean()
    cheapest = min(tied, key=lambda row: float(seconds[row["trial_id"]]))
    listed = ", ".join(f"{row['trial_id']} ({seconds[row['trial_id']]:.0f} s a run)" for row in tied)
    sentence = (
        f"{listed} beat the default {default} and can't be told apart, so the cheapest: {_said(cheapest, metric)}"
    )
    return Verdict("tie", cheapest["trial_id"], sentence)


def _said(row: Mapping[str, Any], metric: str) -> str:
    if not math.isfinite(row["difference"]):
        return f"{row['trial_id']} had a run without a finite loss"
    direction = "better" if row["difference"] >= 0 else "worse"
    return (
        f"{row['trial_id']} is {abs(row['difference']):.4f} {direction} in {metric} "
        f"(interval {row['low']:.4f} to {row['high']:.4f}, {row['runs']} pairs of runs, p = {row['p_value']:.2g})"
    )


def _table(rows: list[dict[str, Any]], trials: pd.DataFrame, metric: str, chosen: str | None) -> pd.DataFrame:
    found = []
    for place, row in enumerate(rows):
        runs = counted(trials)
        runs = runs[runs["finalist_of"] == row["trial_id"]]
        values = runs[metric].dropna()
        searched_value = trials.loc[trials["trial_id"] == row["trial_id"], metric].iloc[0]
        mean = values.mean() if len(values) else None
        luck = None
        if mean is not None and not pd.isna(searched_value):
            luck = loss_like(metric, mean) - loss_like(metric, searched_value)
        compared = {name: row.get(name) for name in ("difference", "low", "high", "p_value")}
        compared = {
            name: value if value is not None and math.isfinite(value) else None for name, value in compared.items()
        }
        found.append(
            {
                "trial_id": row["trial_id"],
                "role": "finalist" if place else "default",
                "chosen": row["trial_id"] == chosen,
                "runs": len(runs),
                "mean": mean,
                "sd": values.std() if len(values) > 1 else None,
                "searched": searched_value,
                "luck": luck,
                **compared,
                "seconds": runs["seconds"].mean(),
            }
        )
    return pd.DataFrame(found, columns=FINALISTS.names)
