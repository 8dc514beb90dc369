"""Where trials overfit: by backbone, by how much is unfrozen, by augmentation, and in their last epochs."""

from typing import get_args

import pandas as pd

from tuning.insight.analysis import top
from tuning.settings.config import UNFROZEN, TrialConfig, unfrozen

AUGMENTATIONS = get_args(TrialConfig.model_fields["augmentation"].annotation)  # from none to strong


def overfitting(trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Of each backbone and unfrozen part: how many trials, and the losses and gap of its best.

    Returns:
        Columns backbone, unfrozen, trials, trial_id, train_eval_loss, val_loss, gap; null where no loss was finite.
    """
    rows = []
    for (backbone, part), group in trials.groupby(["config_backbone", trials["config_unfreeze_depth"].map(unfrozen)]):
        first = top(group, metric)
        values = {
            name: None if first is None else first[name] for name in ("trial_id", "train_eval_loss", "val_loss", "gap")
        }
        rows.append({"backbone": backbone, "unfrozen": part, "trials": len(group), **values})
    rows.sort(key=lambda row: (row["backbone"], UNFROZEN.index(row["unfrozen"])))
    return pd.DataFrame(rows)


def gaps(trials: pd.DataFrame) -> pd.DataFrame:
    """The gap by how much is unfrozen and by augmentation, at best epochs.

    Trials of a single epoch are left out: they hadn't the time to overfit.

    Returns:
        Columns unfrozen, augmentation, trials, gap, val_loss (medians).
    """
    longer = trials[(trials["epochs"] > 1) & trials["gap"].notna()]
    frame = longer.assign(
        unfrozen=pd.Categorical(longer["config_unfreeze_depth"].map(unfrozen), UNFROZEN),
        augmentation=pd.Categorical(longer["config_augmentation"], AUGMENTATIONS),
    )
    groups = frame.groupby(["unfrozen", "augmentation"], observed=True)
    return groups.agg(trials=("gap", "size"), gap=("gap", "median"), val_loss=("val_loss", "median")).reset_index()


def best_and_last(trials: pd.DataFrame, epochs: pd.DataFrame) -> pd.DataFrame:
    """How much worse the last epoch is than the best, by how much is unfrozen.

    Args:
        trials: the table; trials of a single epoch, and those whose last loss is not finite, are left out.
        epochs: the table.

    Returns:
        Columns unfrozen, trials, earlier (trials whose best epoch was not the last), best, last, rise: medians of the
        validation loss at the best epoch, at the last, and of their difference.
    """
    last = epochs.loc[epochs.groupby("trial_id")["epoch"].idxmax(), ["trial_id", "val_loss"]]
    frame = trials[trials["epochs"] > 1].merge(last.rename(columns={"val_loss": "last"}), on="trial_id")
    frame = frame[frame["last"].notna() & frame["val_loss"].notna()]
    frame = frame.assign(
        unfrozen=pd.Categorical(frame["config_unfreeze_depth"].map(unfrozen), UNFROZEN),
        earlier=frame["best_epoch"] < frame["epochs"],
        rise=frame["last"] - frame["val_loss"],
    )
    named = {"trials": ("rise", "size"), "earlier": ("earlier", "sum"), "best": ("val_loss", "median")}
    named |= {"last": ("last", "median"), "rise": ("rise", "median")}
    return frame.groupby("unfrozen", observed=True).agg(**named).reset_index()
