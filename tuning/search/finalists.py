"""Finalists: which trials are retrained for the verdict, and with which seeds."""

import math
from collections.abc import Collection, Sequence

import pandas as pd

from tuning.record.journal import EARLY, PROMOTED, Record, Trial, loss_like
from tuning.record.tables import make_tables, searched
from tuning.settings.config import PARAMETERS, SearchPlan

LEAST_RUNS = 3  # of each configuration
OF_SAVED = 5  # finalists' runs take at most this part of what early stopping saved
CONFIG = [f"config_{name}" for name in PARAMETERS]
Run = tuple[str, int]  # the trial that is retrained, and the seed


def candidates(trials: pd.DataFrame, metric: str) -> list[str]:
    """Return ids of trials to judge: the default (the first trial), then the others, best first, each config once."""
    rows = searched(trials).sort_values("number")
    if rows.empty or rows["number"].iloc[0] != 0:
        return []
    losses = rows[metric].where(rows["val_loss"].notna()).map(lambda value: loss_like(metric, value))
    order = [rows.index[0], *losses.drop(rows.index[0]).dropna().sort_values(kind="stable").index]
    return list(rows.loc[order].drop_duplicates(CONFIG)["trial_id"])


def runs_to_make(
    trial_ids: Sequence[str],
    finalists: int,
    seeds: Sequence[int],
    *,
    asked: set[Run],
    epochs: int,
    cap: float,
    cheap: Collection[str] = (),
) -> list[Run]:
    """Return the runs of the default and the finalists that fit into a cap on epochs, seed by seed.

    If they don't all fit, there are fewer finalists, at least 1, then fewer seeds, at least 3, then no runs.

    Args:
        trial_ids: from `candidates`; of them the default and the first `finalists` are retrained.
        asked: earlier runs, which are not made again; those of other trials count towards the cap.
        epochs: of one run.
        cap: epochs of all runs together.
        cheap: trials whose runs count as one epoch.
    """
    most = min(finalists, len(trial_ids) - 1)
    tries = [(count, len(seeds)) for count in range(most, 0, -1)]
    tries += [(1, count) for count in range(len(seeds) - 1, LEAST_RUNS - 1, -1)] if most > 0 else []
    for count, runs in tries:
        wanted = [(trial_id, seed) for seed in seeds[:runs] for trial_id in trial_ids[: count + 1]]
        if sum(1 if trial_id in cheap else epochs for trial_id, _ in asked.union(wanted)) <= cap:
            return [run for run in wanted if run not in asked]
    return []


def most_epochs(plan: SearchPlan, saved: int) -> int:
    """Return the cap on the epochs of all finalists' runs, after a search whose early stopping `saved` epochs."""
    return saved // OF_SAVED if plan.finalist_epochs is None else plan.finalist_epochs


def saved_epochs(trials: pd.DataFrame, epochs: int) -> int:
    """Return how many of the planned `epochs` per trial early stopping saved, from `trials.parquet`."""
    rows = searched(trials)
    return int((epochs - rows.loc[rows["status"].isin(EARLY), "epochs"]).sum())


def saved_before_promotions(record: Record, plan: SearchPlan) -> int:
    """Return how many epochs early stopping has saved up to now, of each trial as of its first stop.

    So what promoted trials take, where slots or time are left, takes nothing from the finalists' runs.
    """
    saved = 0
    for trial in record.trials.values():
        promoted = next((row["epoch"] for row in trial.decisions if row["verdict"] == PROMOTED), None)
        if trial.number is not None and (promoted is not None or trial.status in EARLY):
            saved += plan.epochs - (len(trial.rows) if promoted is None else promoted)
    return saved


def runs_left(trials: pd.DataFrame, plan: SearchPlan, asked: set[Run], cap: float = math.inf) -> list[Run]:
    """Return the runs that a search's finalists still need, from `trials.parquet`; arguments as in `runs_to_make`.

    A run of the classifier alone on unchanged images computes the frozen outputs once: it counts as one epoch, unless
    the user has set the number of epochs.
    """
    if not (plan.finalists and plan.early_stopping):
        return []
    trial_ids, seeds = candidates(trials, plan.metric), range(plan.seed + 1, plan.seed + 1 + plan.finalist_seeds)
    once = (trials["config_unfreeze_depth"] == 0) & (trials["config_augmentation"] == "none")
    cheap = set(trials.loc[once, "trial_id"]) if plan.finalist_epochs is None else ()
    epochs = plan.epochs
    return runs_to_make(trial_ids, plan.finalists, seeds, asked=asked, epochs=epochs, cap=cap, cheap=cheap)


def finalist_runs_left(record: Record, plan: SearchPlan) -> list[tuple[Trial, int]]:
    """Return the trials still to be retrained, with their seeds, while the search runs."""
    trials = record.trials.values()
    # From the record, since tables lack runs that have not begun.
    asked = {(str(trial.finalist_of), int(trial.config["seed"])) for trial in trials if trial.origin == "finalist"}
    table = make_tables(record, plan.metric)["trials"].to_pandas()
    cap = most_epochs(plan, saved_before_promotions(record, plan))
    return [(record.trials[trial_id], seed) for trial_id, seed in runs_left(table, plan, asked, cap)]
