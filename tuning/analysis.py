"""Pure functions from tables to tables: what a search found, and why."""

import math

import pandas as pd

from tuning.config import UNFROZEN, unfrozen
from tuning.tables import loss_like


def class_entropy(samples: pd.DataFrame) -> float:
    """What predicting the classes' shares of the training set would cost, in nats."""
    shares = samples[samples["split"] == "train"]["label"].value_counts(normalize=True)
    return -math.fsum(share * math.log(share) for share in shares)


def searched(trials: pd.DataFrame) -> pd.DataFrame:
    """Start points and suggested trials: without probes and the finalists' runs."""
    return trials[~trials["origin"].isin(["probe", "finalist"])]


def best(trials: pd.DataFrame, metric: str) -> pd.Series | None:
    """The row of the best searched trial by `metric` at its best epoch; null where none has a finite loss."""
    finite = searched(trials[trials["val_loss"].notna() & trials[metric].notna()])
    if finite.empty:
        return None
    return finite.loc[finite[metric].map(lambda value: loss_like(metric, value)).idxmin()]


def overfitting(trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Of each backbone and unfrozen part: how many trials, and the losses and gap of its best.

    Returns:
        Columns backbone, unfrozen, trials, trial_id, train_eval_loss, val_loss, gap; null where no loss was finite.
    """
    rows = []
    for (backbone, part), group in trials.groupby(["config_backbone", trials["config_unfreeze_depth"].map(unfrozen)]):
        top = best(group, metric)
        values = {
            name: None if top is None else top[name] for name in ("trial_id", "train_eval_loss", "val_loss", "gap")
        }
        rows.append({"backbone": backbone, "unfrozen": part, "trials": len(group), **values})
    rows.sort(key=lambda row: (row["backbone"], UNFROZEN.index(row["unfrozen"])))
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


def cost(trials: pd.DataFrame) -> pd.DataFrame:
    """What each backbone's trials took, probes included: columns backbone, trials, epochs, seconds; dearest first."""
    frame = trials.rename(columns={"config_backbone": "backbone"}).assign(trials=1)
    sums = frame.groupby("backbone", as_index=False)[["trials", "epochs", "seconds"]].sum()
    return sums.sort_values("seconds", ascending=False, ignore_index=True)


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
