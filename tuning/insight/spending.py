"""What a search spent, on what, what ending trials early saved, and what it had found by when."""

import math

import pandas as pd

from tuning.insight.analysis import EARLY
from tuning.record.journal import loss_like
from tuning.record.tables import searched


def ends(trials: pd.DataFrame) -> pd.DataFrame:
    """How many searched trials ended after how many epochs, and how: columns status, epochs, trials."""
    return searched(trials).groupby(["status", "epochs"]).size().rename("trials").reset_index()


def saved(trials: pd.DataFrame, epochs: int) -> pd.DataFrame:
    """What ending trials early saved, by status.

    Args:
        trials: the table.
        epochs: planned for each trial.

    Returns:
        Columns status, trials, epochs (run), epochs_saved, seconds_saved (at the trial's own seconds an epoch).
        Trials that failed, or go on later, save nothing.
    """
    early = trials["status"].isin(EARLY)
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


def utilisation(epochs: pd.DataFrame, slots: int, since: float = 0.0) -> float | None:
    """The share of the slots' time that went into epochs, from the first epoch's start until the last trial's.

    After that slots stand idle for want of trials. Null where no trial began after the first epoch.

    Args:
        epochs: the table.
        slots: trials at once.
        since: when they were so many, in active seconds: an earlier start of the search may have had others.
    """
    mine = epochs[epochs["wall_s"] - epochs["seconds"] >= since]
    if mine.empty:
        return None
    begins = mine["wall_s"] - mine["seconds"]
    start, end = begins.min(), begins.groupby(mine["trial_id"]).min().max()
    inside = (mine["wall_s"].clip(upper=end) - begins).clip(lower=0)
    # A search that has begun with all its slots at once has an `end` just after its start.
    return float(inside.sum() / (slots * (end - start))) if mine["wall_s"].min() <= end else None


def best_so_far(trials: pd.DataFrame, epochs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Each epoch of a searched trial that was better than all before it.

    Args:
        trials: the table.
        epochs: the table.
        metric: what is better by.

    Returns:
        Columns trial_id, epoch, wall_s, epochs and seconds (of all searched trials until then), value.
    """
    rows = epochs[epochs["trial_id"].isin(searched(trials)["trial_id"])].sort_values("seq")
    rows = rows.assign(epochs=range(1, len(rows) + 1), seconds=rows["seconds"].cumsum(), value=rows[metric])
    rows = rows[rows["value"].notna() & rows["val_loss"].notna()]
    losses = rows["value"].map(lambda value: loss_like(metric, value))
    better = losses < losses.cummin().shift(fill_value=math.inf)
    return rows.loc[better, ["trial_id", "epoch", "wall_s", "epochs", "seconds", "value"]].reset_index(drop=True)
