"""Pure functions from tables to tables: what a search found, and why."""

import pandas as pd

from tuning.config import DEPTH_ALL
from tuning.tables import loss_like

HEAD, PART, ALL = "head", "part", "all"


def best(trials: pd.DataFrame, metric: str) -> pd.Series | None:
    """The row of the best trial by `metric` at its best epoch; null where no trial has a finite loss."""
    finite = trials[trials["val_loss"].notna() & trials[metric].notna()]
    if finite.empty:
        return None
    return finite.loc[finite[metric].map(lambda value: loss_like(metric, value)).idxmin()]


def unfrozen(trials: pd.DataFrame) -> pd.Series:
    """How much each trial unfroze: head, part or all."""
    depth = trials["config_unfreeze_depth"]
    return depth.map(lambda value: HEAD if value == 0 else ALL if value == DEPTH_ALL else PART).rename("unfrozen")


def overfitting(trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Of each backbone and unfrozen part: how many trials, and the losses and gap of its best.

    Returns:
        Columns backbone, unfrozen, trials, trial_id, train_eval_loss, val_loss, gap; null where no loss was finite.
    """
    rows = []
    for (backbone, part), group in trials.groupby([trials["config_backbone"], unfrozen(trials)]):
        top = best(group, metric)
        values = {
            name: None if top is None else top[name] for name in ("trial_id", "train_eval_loss", "val_loss", "gap")
        }
        rows.append({"backbone": backbone, "unfrozen": part, "trials": len(group), **values})
    rows.sort(key=lambda row: (row["backbone"], (HEAD, PART, ALL).index(row["unfrozen"])))
    return pd.DataFrame(rows)


def saved(trials: pd.DataFrame, epochs: int) -> pd.DataFrame:
    """What ending trials early saved, by status.

    Args:
        trials: the table.
        epochs: planned for each trial.

    Returns:
        Columns status, trials, epochs (run), epochs_saved, seconds_saved (at the trial's own seconds an epoch).
        Trials that failed, or go on later, save nothing.
    """
    early = trials["status"].isin(["stopped", "converged", "diverged"])
    left = (epochs - trials["epochs"]).where(early, 0)
    seconds = (left * trials["seconds"] / trials["epochs"].clip(lower=1)).fillna(0.0)
    frame = trials.assign(trials=1, epochs_saved=left, seconds_saved=seconds)
    columns = ["trials", "epochs", "epochs_saved", "seconds_saved"]
    return frame.groupby("status", as_index=False)[columns].sum()


def spent(epochs: pd.DataFrame) -> dict[str, float]:
    """Seconds of all epochs by what they went into: data, prefix, train, evaluate."""
    return {part: float(epochs[f"{part}_seconds"].sum()) for part in ("data", "prefix", "train", "evaluate")}


def utilisation(epochs: pd.DataFrame, slots: int) -> float | None:
    """The share of the slots' time that went into epochs, from the first epoch's start until the last trial's.

    After that slots stand idle for want of trials. Null where no trial began after the first epoch.

    Args:
        epochs: the table.
        slots: trials at once.
    """
    begins = epochs["wall_s"] - epochs["seconds"]
    start, end = begins.min(), begins.groupby(epochs["trial_id"]).min().max()
    inside = (epochs["wall_s"].clip(upper=end) - begins).clip(lower=0)
    # A search that has begun with all its slots at once has an `end` just after its start.
    return float(inside.sum() / (slots * (end - start))) if epochs["wall_s"].min() <= end else None
