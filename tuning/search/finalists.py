"""Which trials are trained again for the verdict, and with which seeds."""

import math
from collections.abc import Sequence

import pandas as pd

from tuning.record.journal import loss_like
from tuning.record.tables import searched
from tuning.settings.config import PARAMETERS, SearchPlan

LEAST_RUNS = 3  # of each configuration
CONFIG = [f"config_{name}" for name in PARAMETERS]


def candidates(trials: pd.DataFrame, metric: str) -> list[str]:
    """Ids of trials to judge: the default (the first trial), then the others from the best on, each config once."""
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
    asked: set[tuple[str, int]],
    epochs: int,
    cap: float,
) -> list[tuple[str, int]]:
    """Runs of the default and the finalists that fit into a cap on epochs, seed by seed.

    First the finalists shrink, to 1, then the seeds, to 3; if even that doesn't fit, none are run.

    Args:
        trial_ids: of `candidates`.
        finalists: wanted, beside the default.
        seeds: wanted of each.
        asked: runs, by trial and seed, made or begun before; those of an earlier verdict take their share of the cap.
        epochs: of a run.
        cap: epochs of all runs together.

    Returns:
        Trial and seed of each run that is still to be made.
    """
    most = min(finalists, len(trial_ids) - 1)
    tries = [(count, len(seeds)) for count in range(most, 0, -1)]
    tries += [(1, count) for count in range(len(seeds) - 1, LEAST_RUNS - 1, -1)] if most > 0 else []
    for count, runs in tries:
        wanted = [(trial_id, seed) for seed in seeds[:runs] for trial_id in trial_ids[: count + 1]]
        if len(asked.union(wanted)) * epochs <= cap:
            return [run for run in wanted if run not in asked]
    return []


def most_epochs(plan: SearchPlan, searched_epochs: int) -> int:
    """Epochs that finalists' runs may take together, after a search that has taken so many."""
    return searched_epochs // 4 if plan.finalist_epochs is None else plan.finalist_epochs


def runs_left(
    trials: pd.DataFrame, plan: SearchPlan, asked: set[tuple[str, int]], cap: float = math.inf
) -> list[tuple[str, int]]:
    """Runs that a search's finalists still need.

    Args:
        trials: `trials.parquet`.
        plan: of the search.
        asked, cap: as `runs_to_make` takes them.
    """
    if not (plan.finalists and plan.early_stopping):
        return []
    return runs_to_make(
        candidates(trials, plan.metric),
        plan.finalists,
        range(plan.seed + 1, plan.seed + 1 + plan.finalist_seeds),
        asked=asked,
        epochs=plan.epochs,
        cap=cap,
    )
