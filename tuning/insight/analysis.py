"""Analyse the tables of one run or several: pure functions from frames to frames."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tuning.record.journal import EARLY, loss_like
from tuning.record.tables import TRIALS, read_table
from tuning.record.tables import searched as searched
from tuning.record.targets import class_names, constant_loss, encoded
from tuning.settings.augmentation import POLICIES
from tuning.settings.config import UNFROZEN, InputError, unfrozen
from tuning.settings.documents import read_plan
from tuning.settings.space import Space
from tuning.settings.space_file import parse

LEAST_RANKED = 10  # ended trials that parameter importance needs

# ---- reading runs -----------------------------------------------------------------------------------------------


def load_trials(*runs: str | Path, everything: bool = False) -> pd.DataFrame:
    """Read the trials of run folders into one frame, with `everything` also probes and finalist runs.

    Returns:
        `run` (the folder's name, or its path if two names are equal), then the columns of `trials.parquet` in the
        units of results/README.md. Columns that an older run lacks are null.

    Raises:
        InputError: a folder holds no run.
    """
    names = run_names(runs)
    tables = [read_table(Path(run) / "trials.parquet") for run in runs]
    columns = list(dict.fromkeys(["run", *TRIALS.names, *(name for table in tables for name in table)]))
    frames = [table.assign(run=name).reindex(columns=columns) for name, table in zip(names, tables, strict=True)]
    united = frames[0] if len(frames) == 1 else pd.concat(frames, ignore_index=True)
    return united if everything else searched(united).reset_index(drop=True)


def load_plan(run: str | Path) -> dict[str, Any]:
    """Read a run's `plan.yaml`: its settings, space and provenance.

    Raises:
        InputError: the folder holds no run.
    """
    return read_plan(Path(run))


def load_space(run: str | Path) -> Space:
    """Read the search space of a run.

    Raises:
        InputError: the folder holds no run.
    """
    return parse(load_plan(run)["space"], str(Path(run) / "plan.yaml"))


def run_names(runs: Sequence[str | Path]) -> list[str]:
    """Return the folders' names, or their paths if two names are equal.

    Raises:
        InputError: there are no folders.
    """
    if not runs:
        raise InputError("which run? give its folder, like results/NAME")
    names = [Path(run).resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


# ---- the best trials --------------------------------------------------------------------------------------------


def default_metric(trials: pd.DataFrame) -> str:
    """Return the metric that searches choose by unless told otherwise; `val_loss` if a run is older than it."""
    newest = trials.get("val_tempered_loss")
    lacks = newest is None or bool((newest.isna() & trials["val_loss"].notna()).any())
    return "val_loss" if lacks else "val_tempered_loss"


def best(trials: pd.DataFrame, metric: str | None = None, count: int = 1) -> pd.DataFrame:
    """Return the rows of the best `count` trials of the search (of each `run`, if there is such a column), best first.

    Trials are compared at their best epoch; those without a finite loss are left out. Here and below, `metric` is by
    default that of `default_metric`: give the one that the search was run with if it was another.
    """
    metric = metric or default_metric(trials)
    finite = searched(trials[trials["val_loss"].notna() & trials[metric].notna()])
    losses: pd.Series = loss_like(metric, finite[metric])
    ranked = finite.loc[losses.sort_values(kind="stable").index]
    return ranked.groupby("run", sort=False).head(count) if "run" in ranked else ranked.head(count)


def top(trials: pd.DataFrame, metric: str) -> pd.Series | None:
    """Return the row of the best trial of the search, or None if no trial has a finite loss."""
    ranked = best(trials, metric)
    return None if ranked.empty else ranked.iloc[0]


def pareto(trials: pd.DataFrame, cost: str = "seconds", metric: str | None = None) -> pd.DataFrame:
    """Return the rows of the Pareto front: trials that no other beats in both `cost` and `metric`, cheapest first.

    `cost` is a column of which less is better: seconds, trained_parameters, parameters, latency_ms, ...
    """
    metric = metric or default_metric(trials)
    rows = searched(trials[trials["val_loss"].notna() & trials[metric].notna() & trials[cost].notna()])
    order = rows[[cost]].assign(loss=loss_like(metric, rows[metric])).sort_values([cost, "loss"], kind="stable")
    front = order["loss"] < order["loss"].cummin().shift(fill_value=math.inf)
    return rows.loc[order.index[front]]


def best_so_far(trials: pd.DataFrame, epochs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return each epoch of the search that was better than all before it.

    Returns:
        Columns trial_id, epoch, wall_s, epochs and seconds (of all trials of the search until then), value.
    """
    rows = epochs[epochs["trial_id"].isin(searched(trials)["trial_id"])].sort_values("seq")
    rows = rows.assign(epochs=range(1, len(rows) + 1), seconds=rows["seconds"].cumsum(), value=rows[metric])
    rows = rows[rows["value"].notna() & rows["val_loss"].notna()]
    losses: pd.Series = loss_like(metric, rows["value"])
    better = losses < losses.cummin().shift(fill_value=math.inf)
    return rows.loc[better, ["trial_id", "epoch", "wall_s", "epochs", "seconds", "value"]].reset_index(drop=True)


# ---- parameters -------------------------------------------------------------------------------------------------


def importance(trials: pd.DataFrame, space: Space, metric: str | None = None) -> pd.DataFrame:
    """Compute parameter importance by PED-ANOVA: how the best 10% of trials differ from all trials in each parameter.

    Watanabe et al. 2023, https://arxiv.org/abs/2304.10255. Trials without a finite value count as the worst. Trials of
    several runs must have searched the same space.

    Returns:
        Columns parameter, importance (shares that add up to 1), the largest first; empty if fewer than 10 trials ended.
    """
    import optuna  # takes half a second, which opening a table should not

    from tuning.search.optimizer import frozen_trial, read_priors

    ranked, *_ = read_priors(trials, space, metric or default_metric(trials), 1.0)
    shares: dict[str, float] = {}
    if len(ranked) >= LEAST_RANKED and len(space.parameters) > 1:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study()
        complete = optuna.trial.TrialState.COMPLETE
        study.add_trials([frozen_trial(space, row["params"], complete, row["rank"], {}) for row in ranked])
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of a parameter that one trial had
            shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return pd.DataFrame(sorted(shares.items(), key=lambda item: -item[1]), columns=["parameter", "importance"])


def by_depth(trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the best trial of each backbone and depth: columns backbone, depth, trials, trial_id, value."""
    rows = []
    for (backbone, depth), group in searched(trials).groupby(["config_backbone", "config_unfreeze_depth"]):
        first = top(group, metric)
        trial_id, value = (None, None) if first is None else (first["trial_id"], first[metric])
        rows.append((backbone, depth, len(group), trial_id, value))
    return pd.DataFrame(rows, columns=["backbone", "depth", "trials", "trial_id", "value"])


# ---- overfitting ------------------------------------------------------------------------------------------------


def overfitting(trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the overfitting gap of the best trial of each backbone and unfrozen part (head, part, all).

    Returns:
        Columns backbone, unfrozen, trials, trial_id, train_eval_loss, val_loss, gap; null if no loss was finite.
    """
    rows = []
    for (backbone, part), group in trials.groupby(["config_backbone", trials["config_unfreeze_depth"].map(unfrozen)]):
        first = top(group, metric)
        names = ("trial_id", "train_eval_loss", "val_loss", "gap")
        values = {name: None if first is None else first[name] for name in names}
        rows.append({"backbone": backbone, "unfrozen": part, "trials": len(group), **values})
    rows.sort(key=lambda row: (row["backbone"], UNFROZEN.index(row["unfrozen"])))
    return pd.DataFrame(rows)


def gaps(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the median overfitting gap at the best epoch, by unfrozen part and augmentation.

    Trials of a single epoch are left out: they had no time to overfit.

    Returns:
        Columns unfrozen, augmentation, trials, gap, val_loss (medians).
    """
    frame = _with_part(trials[(trials["epochs"] > 1) & trials["gap"].notna()])
    order = [*POLICIES, *sorted(set(frame["config_augmentation"]) - POLICIES.keys())]  # from none to strong
    frame = frame.assign(augmentation=pd.Categorical(frame["config_augmentation"], order))
    groups = frame.groupby(["unfrozen", "augmentation"], observed=True)
    return groups.agg(trials=("gap", "size"), gap=("gap", "median"), val_loss=("val_loss", "median")).reset_index()


def best_and_last(trials: pd.DataFrame, epochs: pd.DataFrame) -> pd.DataFrame:
    """Return how much worse the last epoch is than the best, by unfrozen part.

    Trials of a single epoch, and trials whose last loss is not finite, are left out.

    Returns:
        Columns unfrozen, trials, earlier (trials whose best epoch was not the last), best, last, rise: medians of
        val_loss at the best epoch, at the last, and of their difference.
    """
    last = epochs.loc[epochs.groupby("trial_id")["epoch"].idxmax(), ["trial_id", "val_loss"]]
    frame = trials[trials["epochs"] > 1].merge(last.rename(columns={"val_loss": "last"}), on="trial_id")
    frame = _with_part(frame[frame["last"].notna() & frame["val_loss"].notna()])
    frame = frame.assign(earlier=frame["best_epoch"] < frame["epochs"], rise=frame["last"] - frame["val_loss"])
    named = {"trials": ("rise", "size"), "earlier": ("earlier", "sum"), "best": ("val_loss", "median")}
    named |= {"last": ("last", "median"), "rise": ("rise", "median")}
    return frame.groupby("unfrozen", observed=True).agg(**named).reset_index()


def _with_part(trials: pd.DataFrame) -> pd.DataFrame:
    return trials.assign(unfrozen=pd.Categorical(trials["config_unfreeze_depth"].map(unfrozen), UNFROZEN))


# ---- time and failures ------------------------------------------------------------------------------------------


def ends(trials: pd.DataFrame) -> pd.DataFrame:
    """Count the trials of the search by how and after how many epochs they ended: columns status, epochs, trials."""
    return searched(trials).groupby(["status", "epochs"]).size().rename("trials").reset_index()


def savings(trials: pd.DataFrame, epochs: int) -> pd.DataFrame:
    """Return what early stopping saved of the planned `epochs` per trial, by status.

    Returns:
        Columns status, trials, epochs (run), epochs_saved, seconds_saved (at the trial's own seconds per epoch).
        Trials that failed, or can be resumed, save nothing.
    """
    left = (epochs - trials["epochs"]).where(trials["status"].isin(EARLY), 0)
    seconds = (left * trials["seconds"] / trials["epochs"].clip(lower=1)).fillna(0.0)
    frame = trials.assign(trials=1, epochs_saved=left, seconds_saved=seconds)
    return frame.groupby("status", as_index=False)[["trials", "epochs", "epochs_saved", "seconds_saved"]].sum()


def backbone_cost(trials: pd.DataFrame) -> pd.DataFrame:
    """Sum what each backbone took, the most expensive first: columns backbone, trials, epochs, seconds."""
    frame = trials.rename(columns={"config_backbone": "backbone"}).assign(trials=1)
    sums = frame.groupby("backbone", as_index=False)[["trials", "epochs", "seconds"]].sum()
    return sums.sort_values("seconds", ascending=False, ignore_index=True)


def time_spent(epochs: pd.DataFrame) -> dict[str, float]:
    """Sum the seconds of all epochs by what they were spent on: data, prefix (frozen layers), train, evaluate."""
    return {part: float(epochs[f"{part}_seconds"].sum()) for part in ("data", "prefix", "train", "evaluate")}


def utilisation(epochs: pd.DataFrame, slots: int, since: float = 0.0) -> float | None:
    """Return the share of the slots' time that epochs took, from the first epoch to the start of the last trial.

    Later, slots are idle because no trials are left to start. None if no trial started after the first epoch ended.
    `since` is the active time at the last start of the search: an earlier one may have had another number of slots.
    """
    mine = epochs[epochs["wall_s"] - epochs["seconds"] >= since]
    if mine.empty:
        return None
    begins = mine["wall_s"] - mine["seconds"]
    start, end = begins.min(), begins.groupby(mine["trial_id"]).min().max()
    inside = (mine["wall_s"].clip(upper=end) - begins).clip(lower=0)
    # If all slots started at once and no trial followed, `end` lies just after `start`.
    return float(inside.sum() / (slots * (end - start))) if mine["wall_s"].min() <= end else None


def errors(trials: pd.DataFrame) -> pd.DataFrame:
    """Count failed trials by the last line of their error: columns error, trials, example (a trial_id)."""
    failed = trials[trials["error"].notna()]
    last = failed["error"].str.strip().str.split("\n").str[-1].rename("error")
    found = failed.groupby(last)["trial_id"].agg(trials="size", example="first").reset_index()
    return found.sort_values("trials", ascending=False, kind="stable", ignore_index=True)


def class_entropy(samples: pd.DataFrame) -> float:
    """Return the loss of always predicting the class frequencies of the training set, in nats."""
    names, trained = class_names(samples["label"]), samples.loc[samples["split"] == "train", "label"]
    return constant_loss(encoded(trained, names), len(names))


# ---- several runs -----------------------------------------------------------------------------------------------


def compare(trials: pd.DataFrame, metric: str | None = None) -> pd.DataFrame:
    """Return what each run spent and found, without probes and finalist runs.

    Returns:
        A row for each run: run, trials, early (how many of them stopped, converged or diverged), failed, epochs,
        seconds, gpu_seconds (summed over trials), and of the best trial trial_id, config_backbone, `metric`, gap.
    """
    rows, metric = searched(trials), metric or default_metric(trials)
    flags = rows.assign(trials=1, early=rows["status"].isin(EARLY), failed=rows["status"] == "failed")
    sums = ["trials", "early", "failed", "epochs", "seconds", "gpu_seconds"]
    totals = flags.groupby("run", sort=False, as_index=False)[sums].sum()
    of_best = ["run", "trial_id", "config_backbone", *dict.fromkeys((metric, "gap"))]
    return totals.merge(best(rows, metric)[of_best], how="left", on="run")


def differences(plans: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Return the settings and space parameters that are not the same in all `plans` (by the run's name).

    Returns:
        Columns part (settings or space), key, then one per run with the value as text; a dash if a run has none.
    """
    parts = {
        "settings": {run: plan["settings"] for run, plan in plans.items()},
        "space": {run: _space(plan["space"]) for run, plan in plans.items()},
    }
    rows = []
    for part, values in parts.items():
        for key in dict.fromkeys(key for one in values.values() for key in one):
            texts = {run: str(one.get(key, "-")) for run, one in values.items()}
            if len(set(texts.values())) > 1 and key not in ("name", "storage"):
                rows.append({"part": part, "key": key, **texts})
    return pd.DataFrame(rows, columns=["part", "key", *plans])


def _space(space: Mapping[str, Any]) -> dict[str, str]:
    parameters = {key: described(value) for key, value in space.get("parameters", {}).items()}
    fixed = {key: f"fixed at {value}" for key, value in space.get("fixed", {}).items()}
    points = {"start points": "start", "enqueued points": "enqueue", "points of the portfolio": "portfolio"}
    return parameters | fixed | {words: str(len(space.get(section, []))) for words, section in points.items()}


def _choice(value: Any) -> str:
    """Describe a choice; a mapping, such as a policy of one's own, as `mine: rotate=7`."""
    if not isinstance(value, Mapping):
        return str(value)
    pairs = " ".join(f"{key}={part}" for key, part in value.items() if key != "name")
    return f"{value['name']}: {pairs}" if "name" in value else pairs


def described(spec: Mapping[str, Any]) -> str:
    """Describe the values of a parameter in words."""
    if spec["type"] == "categorical":
        words = ", ".join(map(_choice, spec["choices"]))
    else:
        low, high = (bound if isinstance(bound, str) else f"{bound:g}" for bound in (spec["low"], spec["high"]))
        words = f"{low} to {high}" + (", log" if spec.get("log") else "")
        words += f", step {spec['step']:g}" if spec.get("step") else ""
    return words + (f" (when {spec['when']})" if "when" in spec else "")
