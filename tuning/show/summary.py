"""The summary that a search prints at its end: verdict, trials, overfitting, time and the best configuration."""

import json
import shlex
from pathlib import Path

import pandas as pd

from tuning.insight import analysis
from tuning.insight import verdict as finalists
from tuning.insight.remarks import remarks
from tuning.record import tables
from tuning.record.journal import loss_like
from tuning.record.storage import joined
from tuning.settings.config import PARAMETERS, SearchPlan
from tuning.settings.words import count
from tuning.show import frames
from tuning.show.frames import duration
from tuning.show.live import depth
from tuning.show.progress import console, plain

PARTS = {
    "data": "loading and augmenting images",
    "prefix": "frozen layers",
    "train": "training",
    "evaluate": "evaluation",
}


def summarize(
    folder: Path,
    place: str,
    plan: SearchPlan,
    verdict: finalists.Verdict,
    judged: pd.DataFrame,
    *,
    halted: str | None,
    slots: int | None,
    since: float,
) -> None:
    """Print the summary.

    Args:
        folder: the run's folder, whose tables are read.
        place: the folder or URI as the user knows it.
        plan, verdict, judged: settings, verdict and table of finalists.
        halted: why the search ended early, if it did.
        slots: the number of concurrent trials, if it is fixed.
        since: active seconds at the last start of the search.
    """
    console.print()
    if halted is not None:
        console.print(f"[bold]The search ended early[/bold]: {plain(halted)}\n")
    everything = tables.read_table(folder / "trials.parquet")
    trials = analysis.searched(everything)
    if trials.empty:
        console.print("No trial has started.")
        return
    epochs = tables.read_table(folder / "epochs.parquet")
    if verdict.trial_id is not None:
        console.print(f"[bold]Verdict: {verdict.verdict}[/bold]: {verdict.sentence}.\n")
    if judged["runs"].any():
        _print_table("Retrained with the same seeds", frames.finalists(judged), f" ({plan.metric})")
        console.print()
    _print_table("Trials, best first", _trials(trials, plan.metric))
    _print_overfitting(trials, epochs, plan.metric)
    _print_time(trials, epochs, analysis.backbone_cost(everything), plan.epochs)
    busy = None if slots is None else analysis.utilisation(epochs, slots, since)
    if busy is not None:
        resumed = ", counted from when the search was resumed" if (epochs["wall_s"] < since).any() else ""
        console.print(
            f"Slots (one for each concurrent trial) were in use {busy:.0%} of the time until the last trial "
            f"started{resumed}."
        )
    if verdict.trial_id is None:
        advice = " Try lower learning rates." if (trials["status"] == "diverged").any() else ""
        console.print(f"\n[bold]No trial had a finite loss[/bold]: there is no best.yaml.{advice}")
        return
    _print_best(trials.set_index("trial_id").loc[verdict.trial_id], plan.metric)
    console.print()
    samples = tables.read_table(folder / "samples.parquet")
    for words, alarming in remarks(folder, trials, samples, plan, verdict.trial_id):
        console.print(words, style="bold" if alarming else None)
    _print_next(place, finalists.more_runs(everything, plan), modelled=(folder / "model").exists())


def _print_table(title: str, frame: pd.DataFrame, note: str = "") -> None:
    console.print(f"[bold]{title}[/bold]{note}")
    columns = []
    for heading, values, numeric in frames.cells(frame):
        width = max(map(len, (heading, *values)))
        columns.append([text.rjust(width) if numeric else text.ljust(width) for text in (heading, *values)])
    for place, row in enumerate(zip(*columns, strict=True)):
        console.print("  ".join(row).rstrip(), style=None if place else "dim", markup=False)


def _trials(trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    losses: pd.Series = loss_like(metric, trials[metric])
    rows = trials.loc[losses.sort_values(na_position="last", kind="stable").index]
    rows = rows.assign(
        config_unfreeze_depth=rows["config_unfreeze_depth"].map(depth),
        config_learning_rate=rows["config_learning_rate"].map("{:.1e}".format),
        ended=rows["status"] + (": " + rows["reason"]).fillna(""),
    )
    heads = {"trial_id": "trial", "config_backbone": "backbone", "config_unfreeze_depth": "unfrozen"}
    heads |= {"config_learning_rate": "lr", "config_augmentation": "aug"}
    return rows.rename(columns=heads)[[*heads.values(), metric, "epochs", "ended"]]


def _print_overfitting(trials: pd.DataFrame, epochs: pd.DataFrame, metric: str) -> None:
    _print_table("\nOverfitting: best trial by backbone and unfrozen layers", frames.overfitting(trials, metric))
    gaps = frames.gaps(trials)
    if gaps.empty:
        return
    _print_table("\nMedian gap by augmentation", gaps, " (number of trials), from trials of at least 2 epochs")
    rises = analysis.best_and_last(trials, epochs).itertuples()
    if words := ", ".join(f"{row.unfrozen} {row.rise:+.4f}" for row in rises):
        console.print(f"Median change of val_loss from a trial's best epoch to its last: {words}.")


def _print_time(trials: pd.DataFrame, epochs: pd.DataFrame, costs: pd.DataFrame, planned: int) -> None:
    ends = ", ".join(
        f"{number} {status}" for status, number in trials["status"].value_counts(sort=False).sort_index().items()
    )
    total = f"{count(trials['epochs'].sum(), 'epoch')}, {duration(trials['seconds'].sum())} of training"
    console.print(f"\n{count(len(trials), 'trial')}: {ends}; {total}.")
    console.print(frames.early_stopping(trials, planned))
    shares = ", ".join(
        f"{plain(row.backbone)} {duration(row.seconds)} ({count(row.epochs, 'epoch')})" for row in costs.itertuples()
    )
    console.print(f"Training time by backbone, with probes and finalist runs: {shares}.")
    if epochs.empty:
        return
    spent = analysis.time_spent(epochs)
    total_seconds = max(sum(spent.values()), 1e-9)
    shares = ", ".join(f"{words} {spent[part] / total_seconds:.0%}" for part, words in PARTS.items())
    hits = count(int(epochs["cache_hits"].sum()), "image")
    console.print(f"Time spent on: {shares}. The frozen layers' outputs of {hits} were read from the cache.")


def _print_best(top: "pd.Series[object]", metric: str) -> None:
    console.print(f"\n[bold]Best[/bold]: {top.name}, {metric} {top[metric]:.4f} at epoch {top['best_epoch']:.0f}")
    for name in PARAMETERS:
        value = top[f"config_{name}"]
        console.print(f"  {name}: {value:.3g}" if isinstance(value, float) else f"  {name}: {value}")


def _print_next(place: str, more: tuple[int, str] | None, *, modelled: bool) -> None:
    lines = []
    if more is not None:
        lines.append(f"{more[1]}        # compares them by {count(more[0], 'more run')}, with other seeds")
    final = f"python tuning/train_final.py {shlex.quote(place)}"
    before = "; model/ is from before, move it away first" if modelled else ""
    lines.append(f"{final}        # test the best, or the mean of the best; write model/{before}")
    table = json.dumps(joined(place, "trials.parquet"), ensure_ascii=False)  # a string of Python too
    lines.append("python -c " + shlex.quote(f"import pandas as pd; print(pd.read_parquet({table}))"))
    console.print("\nNext:")
    for line in lines:
        console.print(f"  {line}", markup=False)
