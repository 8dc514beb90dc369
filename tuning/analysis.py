"""Pure functions from tables to tables: what a search found, and why."""

import math
from dataclasses import dataclass
from typing import get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuning.calibration import logarithms
from tuning.config import UNFROZEN, TrialConfig, unfrozen
from tuning.intervals import mean_interval
from tuning.predictions import Predictions
from tuning.space import Space
from tuning.tables import loss_like

AUGMENTATIONS = get_args(TrialConfig.model_fields["augmentation"].annotation)  # from none to strong
LUCK = 0.05  # the chance that guesses are called better than the class frequencies
LEAST_RANKED = 10  # ended trials that importances are made from


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


def importance(trials: pd.DataFrame, space: Space, metric: str) -> pd.DataFrame:
    """How much more often values of a parameter are among the best tenth of trials than among all: PED-ANOVA.

    Watanabe et al. 2023, https://arxiv.org/abs/2304.10255. Diverged trials count as the worst.

    Returns:
        Columns parameter, importance (shares of 1), the greatest first; empty with fewer than 10 trials that ended.
    """
    import optuna  # takes half a second, which opening a table should not

    from tuning.optimizer import frozen_trial, read_priors

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


def pareto(trials: pd.DataFrame, cost: str, metric: str) -> pd.DataFrame:
    """The searched trials that none beats in both cost and metric, cheapest first."""
    rows = searched(trials[trials["val_loss"].notna() & trials[metric].notna() & trials[cost].notna()])
    losses = rows[metric].map(lambda value: loss_like(metric, value)).rename("loss")
    order = pd.concat([rows[cost], losses], axis=1).sort_values([cost, "loss"], kind="stable")
    front = order["loss"] < order["loss"].cummin().shift(fill_value=math.inf)
    return rows.loc[order.index[front]]


def by_depth(trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The best trial of each backbone and depth: columns backbone, depth, trials, trial_id, value (null where none)."""
    rows = []
    for (backbone, depth), group in searched(trials).groupby(["config_backbone", "config_unfreeze_depth"]):
        top = best(group, metric)
        found = (
            {"trial_id": None, "value": None} if top is None else {"trial_id": top["trial_id"], "value": top[metric]}
        )
        rows.append({"backbone": backbone, "depth": depth, "trials": len(group), **found})
    return pd.DataFrame(rows, columns=["backbone", "depth", "trials", "trial_id", "value"])


def ends(trials: pd.DataFrame) -> pd.DataFrame:
    """How many searched trials ended after how many epochs, and how: columns status, epochs, trials."""
    return searched(trials).groupby(["status", "epochs"]).size().rename("trials").reset_index()


def errors(trials: pd.DataFrame) -> pd.DataFrame:
    """Failures by the last line of their error: columns error, trials, example (a trial's id); most frequent first."""
    failed = trials[trials["error"].notna()]
    last = failed["error"].str.strip().str.split("\n").str[-1].rename("error")
    found = failed.groupby(last)["trial_id"].agg(trials="size", example="first").reset_index()
    return found.sort_values("trials", ascending=False, kind="stable", ignore_index=True)
