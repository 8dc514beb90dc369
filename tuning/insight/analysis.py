"""Pure functions from tables to tables: what a search found, and why."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuning.insight.calibration import logarithms
from tuning.insight.intervals import mean_interval
from tuning.record.journal import loss_like
from tuning.record.predictions import Predictions
from tuning.record.tables import TRIALS, read_table
from tuning.record.tables import searched as searched
from tuning.settings.config import InputError
from tuning.settings.documents import read_plan
from tuning.settings.space import Space
from tuning.settings.space_file import parse

LUCK = 0.05  # the chance that guesses are called better than the class frequencies
LEAST_RANKED = 10  # ended trials that importances are made from
EARLY = ["stopped", "converged", "diverged"]  # ends of trials that saved epochs

# ---- reading runs -----------------------------------------------------------------------------------------------


def load_trials(*runs: str | Path, everything: bool = False) -> pd.DataFrame:
    """The trials of one run or several in one frame.

    Args:
        runs: their folders.
        everything: also probes and the finalists' runs, which are no trials of the search.

    Returns:
        `run`, the name of the folder (its path, where two have the same name), then the columns of `trials.parquet`
        with the units of results/README.md; those that an older run's table lacks are null there.

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
    """A run's `plan.yaml`: its settings, space and provenance.

    Raises:
        InputError: the folder is not that of a run.
    """
    return read_plan(Path(run))


def load_space(run: str | Path) -> Space:
    """The space that a run searched.

    Raises:
        InputError: the folder is not that of a run.
    """
    return parse(load_plan(run)["space"], str(Path(run) / "plan.yaml"))


def run_names(runs: Sequence[str | Path]) -> list[str]:
    """The folders' names, or their paths where two are the same.

    Raises:
        InputError: there is none.
    """
    if not runs:
        raise InputError("which run? give its folder, like results/NAME")
    names = [Path(run).resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


# ---- trials -----------------------------------------------------------------------------------------------------


def class_entropy(samples: pd.DataFrame) -> float:
    """What predicting the classes' shares of the training set would cost, in nats."""
    shares = samples[samples["split"] == "train"]["label"].value_counts(normalize=True)
    return -math.fsum(share * math.log(share) for share in shares)


def best(trials: pd.DataFrame, metric: str = "val_loss", count: int = 1) -> pd.DataFrame:
    """The best searched trials of each run by `metric` at their best epochs, best first; those with finite losses.

    Returns:
        At most `count` rows of `trials` for each value of its column `run`, or in all where it has none.
    """
    finite = searched(trials[trials["val_loss"].notna() & trials[metric].notna()])
    losses = finite[metric].map(lambda value: loss_like(metric, value))
    ranked = finite.loc[losses.sort_values(kind="stable").index]
    return ranked.groupby("run", sort=False).head(count) if "run" in ranked else ranked.head(count)


def top(trials: pd.DataFrame, metric: str) -> pd.Series | None:
    """The row of the best of all searched trials; null where none has a finite loss."""
    ranked = best(trials, metric)
    return None if ranked.empty else ranked.iloc[0]


def compare(trials: pd.DataFrame, metric: str = "val_loss") -> pd.DataFrame:
    """What each run spent and found, without probes and finalists' runs.

    Args:
        trials: of `load_trials`.
        metric: what is best by.

    Returns:
        A row for each run: run, trials, early (of them stopped, converged or diverged), failed, epochs, seconds,
        gpu_seconds (of training, summed over trials), and of the best trial trial_id, config_backbone, `metric`, gap.
    """
    rows = searched(trials)
    flags = rows.assign(trials=1, early=rows["status"].isin(EARLY), failed=rows["status"] == "failed")
    sums = ["trials", "early", "failed", "epochs", "seconds", "gpu_seconds"]
    spent = flags.groupby("run", sort=False, as_index=False)[sums].sum()
    of_best = ["run", "trial_id", "config_backbone", *dict.fromkeys((metric, "gap"))]
    return spent.merge(best(rows, metric)[of_best], how="left", on="run")


def differences(plans: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Settings, and parameters of the space, that are not the same in all runs.

    Args:
        plans: of `load_plan`, by the run's name.

    Returns:
        Columns part (settings or space), key, then one for each run, in words; a dash where a run has none.
    """
    parts = {
        "settings": {run: plan["settings"] for run, plan in plans.items()},
        "space": {run: _space(plan["space"]) for run, plan in plans.items()},
    }
    rows = []
    for part, values in parts.items():
        for key in dict.fromkeys(key for one in values.values() for key in one):
            said = {run: str(one.get(key, "-")) for run, one in values.items()}
            if len(set(said.values())) > 1 and key not in ("name", "storage"):
                rows.append({"part": part, "key": key, **said})
    return pd.DataFrame(rows, columns=["part", "key", *plans])


def _space(space: Mapping[str, Any]) -> dict[str, str]:
    """What is declared of each parameter, in a few words."""
    parameters = {key: described(value) for key, value in space.get("parameters", {}).items()}
    fixed = {key: f"fixed at {value}" for key, value in space.get("fixed", {}).items()}
    return parameters | fixed | {"start points": str(len(space.get("start", [])))}


def described(spec: Mapping[str, Any]) -> str:
    """A parameter's values, in words."""
    if spec["type"] == "categorical":
        words = ", ".join(map(str, spec["choices"]))
    else:
        words = f"{spec['low']:g} to {spec['high']:g}" + (", log" if spec.get("log") else "")
        words += f", step {spec['step']:g}" if spec.get("step") else ""
    return words + (f" (when {spec['when']})" if "when" in spec else "")


@dataclass(frozen=True)
class Guessing:
    """The trial of the least validation loss beside predicting the class frequencies for every image."""

    trial_id: str
    val_loss: float
    frequencies: float  # loss of validation's own class frequencies: no other constant prediction has a lower one
    least_gain: float  # what it is better by at least, luck allowed for
    looks: int  # epochs that the trial was picked from

    @property
    def better(self) -> bool:
        """Whether there is more than luck in it."""
        return self.least_gain > 0


def guessing(trials: pd.DataFrame, predictions: Predictions) -> Guessing | None:
    """Whether anything is better than the class frequencies; null where that can't be judged.

    The gain of the best trial over the frequencies, image by image, has an interval by class and group; since it is the
    best of so many epochs of all trials, the chance of error is divided by their number (Bonferroni). Classes of which
    validation has but one group can't be judged: the interval is that of telling the others apart.

    Args:
        trials: the table.
        predictions: of these trials.
    """
    if not predictions.trial_ids:
        return None
    targets, groups, probabilities = predictions.targets, predictions.groups, predictions.probabilities[0]
    looks = int(trials["epochs"].sum())
    judged = [index for index in np.unique(targets) if len(np.unique(groups[targets == index])) > 1]
    if len(judged) < 2:
        return None
    inside = np.isin(targets, judged)
    _, gains = _against_frequencies(probabilities[inside][:, judged], np.searchsorted(judged, targets[inside]))
    _, least, _ = mean_interval(gains, groups[inside], LUCK / looks, targets[inside])
    losses, gains = _against_frequencies(probabilities, targets)
    return Guessing(predictions.trial_ids[0], float(losses.mean()), float((losses + gains).mean()), least, looks)


def _against_frequencies(
    probabilities: NDArray[np.float64], targets: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Each image's loss, and what the targets' own frequencies lose more than that.

    Args:
        probabilities: [n, classes] of these classes or more; they are made to add up to 1.
        targets: class indices [n].
    """
    losses = -logarithms(probabilities[np.arange(len(targets)), targets] / probabilities.sum(axis=1))
    shares = np.bincount(targets) / len(targets)
    return losses, -np.log(shares[targets]) - losses


def importance(trials: pd.DataFrame, space: Space, metric: str = "val_loss") -> pd.DataFrame:
    """How much more often values of a parameter are among the best tenth of trials than among all: PED-ANOVA.

    Watanabe et al. 2023, https://arxiv.org/abs/2304.10255. Diverged trials count as the worst.

    Args:
        trials: of one run, or of several that searched the same space.
        space: of `load_space`.
        metric: what is best by.

    Returns:
        Columns parameter, importance (shares of 1), the greatest first; empty with fewer than 10 trials that ended.
    """
    import optuna  # takes half a second, which opening a table should not

    from tuning.search.optimizer import frozen_trial, read_priors

    ranked, _ = read_priors(trials, space, metric, 1.0)
    shares: dict[str, float] = {}
    if len(ranked) >= LEAST_RANKED and len(space.parameters) > 1:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study()
        complete = optuna.trial.TrialState.COMPLETE
        study.add_trials([frozen_trial(space, row["params"], complete, row["rank"], {}) for row in ranked])
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return pd.DataFrame(sorted(shares.items(), key=lambda item: -item[1]), columns=["parameter", "importance"])


def pareto(trials: pd.DataFrame, cost: str = "seconds", metric: str = "val_loss") -> pd.DataFrame:
    """The searched trials that none beats in both cost and metric, cheapest first.

    Args:
        trials: the table, or of `load_trials`.
        cost: any column of which less is better: seconds, trained_parameters, parameters, latency_ms, ...
        metric: what is best by.

    Returns:
        Rows of `trials`.
    """
    rows = searched(trials[trials["val_loss"].notna() & trials[metric].notna() & trials[cost].notna()])
    losses = rows[metric].map(lambda value: loss_like(metric, value)).rename("loss")
    order = pd.concat([rows[cost], losses], axis=1).sort_values([cost, "loss"], kind="stable")
    front = order["loss"] < order["loss"].cummin().shift(fill_value=math.inf)
    return rows.loc[order.index[front]]


def by_depth(trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The best trial of each backbone and depth: columns backbone, depth, trials, trial_id, value (null where none)."""
    rows = []
    for (backbone, depth), group in searched(trials).groupby(["config_backbone", "config_unfreeze_depth"]):
        first = top(group, metric)
        found = (
            {"trial_id": None, "value": None}
            if first is None
            else {"trial_id": first["trial_id"], "value": first[metric]}
        )
        rows.append({"backbone": backbone, "depth": depth, "trials": len(group), **found})
    return pd.DataFrame(rows, columns=["backbone", "depth", "trials", "trial_id", "value"])


def errors(trials: pd.DataFrame) -> pd.DataFrame:
    """Failures by the last line of their error: columns error, trials, example (a trial's id); most frequent first."""
    failed = trials[trials["error"].notna()]
    last = failed["error"].str.strip().str.split("\n").str[-1].rename("error")
    found = failed.groupby(last)["trial_id"].agg(trials="size", example="first").reset_index()
    return found.sort_values("trials", ascending=False, kind="stable", ignore_index=True)
