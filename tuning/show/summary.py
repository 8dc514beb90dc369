"""What a search says at its end: why trials ended, where they overfit, what it cost, and the verdict."""

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
from tuning.show.live import depth
from tuning.show.progress import console, number, plain


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
    """Print it.

    Args:
        folder: of the run, whose tables are read.
        place: what the user calls it: the folder, or a URI.
        judged: the table of finalists.
        halted: why the search ended early, if it did.
        slots: trials at once, if that number is fixed.
        since: when this start of the search began, in active seconds.
    """
    console.print()
    if halted is not None:
        console.print(f"[bold]The search ended early[/bold]: {plain(halted)}\n")
    everything = tables.read_table(folder / "trials.parquet")
    trials = analysis.searched(everything)
    if trials.empty:
        console.print("No trial has begun.")
        return
    epochs = tables.read_table(folder / "epochs.parquet")
    _tell_trials(trials, plan.metric)
    _tell_overfitting(trials, epochs, plan.metric)
    _tell_cost(trials, epochs, analysis.backbone_cost(everything), plan.epochs)
    _tell_slots(epochs, slots, since)
    if verdict.trial_id is None:
        advice = " Try lower learning rates." if (trials["status"] == "diverged").any() else ""
        console.print(f"\n[bold]No trial had a finite loss[/bold]: there is no best.yaml.{advice}")
        return
    _tell_verdict(verdict, judged)
    _tell_best(trials.set_index("trial_id").loc[verdict.trial_id], plan.metric)
    console.print()
    samples = tables.read_table(folder / "samples.parquet")
    for words, alarming in remarks(folder, trials, samples, verdict.trial_id):
        console.print(words, style="bold" if alarming else None)
    console.print("\nNext:")
    more = finalists.more_runs(everything, plan)
    if more is not None:
        console.print(f"  {more[1]}        # {more[0]} more runs for the verdict", markup=False)
    quoted = shlex.quote(place)
    console.print(
        f"  python tuning/train_final.py {quoted}        # train it again, test it, write its model/", markup=False
    )
    table = json.dumps(joined(place, "trials.parquet"), ensure_ascii=False)  # a string of Python too
    code = shlex.quote(f"import pandas as pd; print(pd.read_parquet({table}))")
    console.print(f"  python -c {code}", markup=False)


def _tell_trials(trials: pd.DataFrame, metric: str) -> None:
    """Why each trial ended."""
    console.print("[bold]Trials, best first[/bold]")
    order = trials[metric].map(lambda value: loss_like(metric, value)).sort_values(na_position="last")
    width = trials["config_backbone"].str.len().max()
    header = f"{'trial':<7} {'backbone':<{width}} {'unfrozen':<8} {'lr':<7} {'aug':<6} {metric:>8}  epochs  ended"
    console.print(header, style="dim")
    for row in trials.loc[order.index].to_dict("records"):
        console.print(
            f"{row['trial_id']:<7} {row['config_backbone']:<{width}} {depth(row['config_unfreeze_depth']):<8} "
            f"{row['config_learning_rate']:.1e} {row['config_augmentation']:<6} {number(row[metric]):>8}  "
            f"{row['epochs']:>6}  {row['status']}: {plain(row['reason'])}"
        )


def _tell_overfitting(trials: pd.DataFrame, epochs: pd.DataFrame, metric: str) -> None:
    """The gap by backbone, by how much is unfrozen and by augmentation, and what the last epochs made worse."""
    console.print("\n[bold]Overfitting: the best trial of each backbone and part[/bold]")
    width = trials["config_backbone"].str.len().max()
    header = f"{'backbone':<{width}} unfrozen  trials  best      train loss  val loss      gap"
    console.print(header, style="dim")
    for row in analysis.overfitting(trials, metric).to_dict("records"):
        numbers = [number(row[name]) for name in ("train_eval_loss", "val_loss", "gap")]
        name = "-" if pd.isna(row["trial_id"]) else row["trial_id"]
        console.print(
            f"{row['backbone']:<{width}} {row['unfrozen']:<8}  {row['trials']:>6}  {name:<8}  "
            f"{numbers[0]:>10}  {numbers[1]:>8}  {numbers[2]:>7}",
            markup=False,
        )
    gaps = analysis.gaps(trials)
    if gaps.empty:
        return
    console.print("\n[bold]The gap by augmentation[/bold]: median, of so many trials that ran two epochs or more")
    columns = list(gaps["augmentation"].unique().sort_values())
    console.print("unfrozen  " + "  ".join(f"{name:>11}" for name in columns), style="dim")
    cells = {(row.unfrozen, row.augmentation): f"{row.gap:.4f} ({row.trials})" for row in gaps.itertuples()}
    for part in gaps["unfrozen"].unique():
        console.print(f"{part:<8}  " + "  ".join(f"{cells.get((part, name), '-'):>11}" for name in columns))
    rises = analysis.best_and_last(trials, epochs)
    said = ", ".join(f"{row.unfrozen} {row.rise:+.4f}" for row in rises.itertuples())
    if said:
        console.print(f"val_loss from a trial's best epoch to its last, median: {said}.")


def _tell_cost(trials: pd.DataFrame, epochs: pd.DataFrame, costs: pd.DataFrame, epochs_allowed: int) -> None:
    """What stopping saved, what each backbone cost, and where the time went."""
    saved = analysis.savings(trials, epochs_allowed)
    spent, spared = trials["seconds"].sum(), saved["seconds_saved"].sum()
    by_status = ", ".join(f"{row.trials} {row.status}" for row in saved.itertuples())
    console.print(f"\n{len(trials)} trials: {by_status}. {trials['epochs'].sum()} epochs, {spent:.0f} s of training.")
    console.print(
        f"Ending trials early saved {saved['epochs_saved'].sum():.0f} epochs, about {spared:.0f} s "
        f"({spared / max(spent + spared, 1e-9):.0%} of what all epochs would have taken)."
    )
    shares = ", ".join(f"{row.backbone} {row.seconds:.0f} s in {row.epochs} epochs" for row in costs.itertuples())
    console.print(f"By backbone, with probes and finalists: {shares}.")
    if epochs.empty:
        return
    names = {"data": "images", "prefix": "frozen layers", "train": "training", "evaluate": "evaluation"}
    parts = analysis.time_spent(epochs)
    total = max(sum(parts.values()), 1e-9)
    shares = ", ".join(f"{names[part]} {value / total:.0%}" for part, value in parts.items())
    hits = int(epochs["cache_hits"].sum())
    console.print(f"Time: {shares}. Frozen layers' outputs of {hits:,} images came from the cache.")


def _tell_slots(epochs: pd.DataFrame, slots: int | None, since: float) -> None:
    busy = None if slots is None else analysis.utilisation(epochs, slots, since)
    if busy is not None:
        went_on = ", since the search went on" if (epochs["wall_s"] < since).any() else ""
        console.print(f"Slots were in use {busy:.0%} of the time until the last trial began{went_on}.")


def _tell_verdict(verdict: finalists.Verdict, judged: pd.DataFrame) -> None:
    if not judged.empty:
        console.print("\n[bold]Trained again with the same seeds[/bold]")
        columns = f"{'trial':<7} {'':<8}  runs  {'mean':>7} {'sd':>7}  {'search':>7} {'luck':>8}  {'better by':>9}"
        console.print(columns, style="dim")
        for row in judged.to_dict("records"):
            numbers = [number(row[name]) for name in ("mean", "sd", "searched", "luck", "difference")]
            console.print(
                f"{row['trial_id']:<7} {row['role']:<8}  {row['runs']:>4}  {numbers[0]:>7} {numbers[1]:>7}  "
                f"{numbers[2]:>7} {numbers[3]:>8}  {numbers[4]:>9}",
                markup=False,
            )
    console.print(f"\n[bold]Verdict: {verdict.verdict}[/bold]: {verdict.sentence}.")


def _tell_best(top: "pd.Series[object]", metric: str) -> None:
    console.print(f"\n[bold]Best[/bold]: {top.name}, {metric} {top[metric]:.4f} at epoch {top['best_epoch']:.0f}")
    for name in PARAMETERS:
        value = top[f"config_{name}"]
        console.print(f"  {name}: {value:.3g}" if isinstance(value, float) else f"  {name}: {value}")
