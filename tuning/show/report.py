"""Write the report of a run, or a comparison of several runs: one HTML file, from the tables alone."""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tuning.insight import analysis
from tuning.record import tables
from tuning.record.journal import LOSSES, loss_like
from tuning.settings.config import PARAMETERS
from tuning.settings.words import examples
from tuning.show.frames import duration
from tuning.show.page import column, columns, figure, note, page, section, table, text
from tuning.show.sections import TRIALS_SHOWN, Run, body, capitalized, judged, read, same

EPOCHS_KEPT = 105_000  # in the page; those of the best trials, if there are more
EPOCHS_WITH_TIMES = 30_000  # with more the page would exceed 6 MB, so it leaves out the columns TIMES
TIMES = ("wall_s", "data_seconds", "prefix_seconds", "train_seconds", "evaluate_seconds")
CURVES = 150  # learning curves in the figure
COSTS = ("seconds", "trained_parameters", "parameters", "latency_ms")  # of which Pareto fronts are shown
ERROR_CHARACTERS, REASON_CHARACTERS = 2000, 300  # from the end of a traceback; from the start of a reason
REFRESH_SECONDS, REFRESH_SHARE = 60.0, 0.05  # least time between reports of a running search; most of the driver's time


def write(folder: Path) -> Path:
    """Write the report of a run into its folder and return its path."""
    return save(folder / "report.html", report(read(folder)))


def save(path: Path, content: str) -> Path:
    """Write a page whole, replacing an earlier one, and return its path."""
    with tables.replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8", errors="replace")
    return path


def write_or_warn(folder: Path) -> Path | None:
    """Write the report; print a warning and return None on any failure: the search is worth more than its report."""
    try:
        return write(folder)
    except Exception as error:
        print(f"report.html could not be written ({type(error).__name__}: {error})", file=sys.stderr)
        return None


def refresher(folder: Path, clock: Callable[[], float] = time.monotonic) -> Callable[[], None]:
    """Return a function to call after each update of the tables, which rewrites the report if it is due.

    After a failure it prints a warning and writes no more.
    """
    due = clock() + REFRESH_SECONDS

    def refresh() -> None:
        nonlocal due
        started = clock()
        if started < due:
            return
        written = write_or_warn(folder)
        ended = clock()
        due = float("inf") if written is None else ended + max(REFRESH_SECONDS, (ended - started) / REFRESH_SHARE)

    return refresh


def report(run: Run) -> str:
    """Return the page of one run."""
    compared, verdict = judged(run)
    shares = analysis.importance(run.trials, run.space, run.metric)
    ranked, fixed = _ranked(run), same(run)
    shown, kept = ranked.head(TRIALS_SHOWN), _with_history(ranked)
    data = {
        "metric": run.metric,
        "lower": run.metric in LOSSES,
        "epochs": run.settings["epochs"],
        "trials": columns(shown.drop(columns=[name for name in fixed if name != "config_backbone"]), 5),
        "varied": [f"config_{name}" for name in PARAMETERS if f"config_{name}" not in fixed],
        "ids": list(shown["trial_id"]),
        "curves": _curves(analysis.searched(kept)),
        "best": columns(analysis.best_so_far(run.trials, run.epochs, run.metric)),
        "importance": columns(shares, 4),
        "depths": columns(analysis.by_depth(run.trials, run.metric), 4),
        "ends": columns(analysis.ends(run.trials)),
        "fronts": {cost: list(analysis.pareto(run.trials, cost, run.metric)["trial_id"]) for cost in COSTS},
        "finalists": columns(compared),
        "chosen": verdict.trial_id,
    }
    return page(run.settings["name"], body(run, compared, verdict, shares), data, history(run, kept))


def _ranked(run: Run) -> pd.DataFrame:
    """Return all trials with the time of their best epoch: those of the search, the best first, then the others."""
    best = run.epochs[["trial_id", "epoch", "wall_s"]].rename(columns={"epoch": "best_epoch", "wall_s": "best_wall_s"})
    trials = run.trials.drop(columns=["error", "started_at", "ended_at"])
    trials = trials.merge(best, how="left", on=["trial_id", "best_epoch"])
    trials["reason"] = trials["reason"].str[:REASON_CHARACTERS]
    others = trials["origin"].isin(["probe", "finalist"])
    order = pd.DataFrame({"others": others, "loss": loss_like(run.metric, trials[run.metric])})
    return trials.loc[order.sort_values(["others", "loss"], kind="stable").index]


def _with_history(ranked: pd.DataFrame) -> pd.DataFrame:
    shown = ranked.head(TRIALS_SHOWN)
    return shown[shown["epochs"].cumsum() <= EPOCHS_KEPT]


def _curves(ranked: pd.DataFrame) -> list[str]:
    """Return the ids of the trials whose learning curves are drawn: of many the best, and the others evenly spaced."""
    ids = list(ranked.loc[ranked["epochs"] > 0, "trial_id"])
    if len(ids) <= CURVES:
        return ids
    rest = np.linspace(CURVES // 3, len(ids) - 1, CURVES - CURVES // 3).round().astype(int)
    return ids[: CURVES // 3] + [ids[place] for place in rest]


def history(run: Run, kept: pd.DataFrame) -> dict[str, Any]:
    """Return the errors, and all epochs and decisions of the trials `kept`: their columns, and the values by trial."""
    failed = run.trials[run.trials["error"].notna()].head(TRIALS_SHOWN)
    errors = dict(zip(failed["trial_id"], failed["error"].str[-ERROR_CHARACTERS:], strict=True))
    answer: dict[str, Any] = {"errors": errors}
    for name, frame in (("epochs", run.epochs), ("decisions", run.decisions)):
        rows = frame[frame["trial_id"].isin(kept["trial_id"])].sort_values(["trial_id", "seq"])
        left_out = ("seq", "trial_id", *(TIMES if len(rows) > EPOCHS_WITH_TIMES else ()))
        names = [key for key in rows if key not in left_out and rows[key].notna().any()]
        values = [column(rows[key], 4) for key in names]
        counts = rows.groupby("trial_id").size()
        by_trial = {
            trial_id: [value[end - count : end] for value in values]
            for trial_id, count, end in zip(counts.index, counts, counts.cumsum(), strict=True)
        }
        answer[name] = {"columns": names, "trials": by_trial}
    return answer


def compare(runs: Sequence[Run]) -> str:
    """Return the page of several runs: their budgets and results, the best so far, and how their settings differ."""
    names = analysis.run_names([one.folder for one in runs])
    found = analysis.differences({name: one.document for name, one in zip(names, runs, strict=True)})
    metrics = sorted({one.metric for one in runs})
    fingerprints = {one.document["provenance"]["fingerprint"] for one in runs}
    warnings = [] if len(metrics) == 1 else [f"The runs have different metrics: {', '.join(metrics)}."]
    warnings += (
        [] if len(fingerprints) == 1 else ["The runs used different images, so their losses are not comparable."]
    )
    if other := _other_weights(runs):
        warnings.append(f"The runs used different pretrained weights of {examples(other)}.")
    lines = [
        {"name": name, "metric": one.metric}
        | columns(analysis.best_so_far(one.trials, one.epochs, one.metric).drop(columns="trial_id"), 5)
        | {"end": _spent(one)}
        for name, one in zip(names, runs, strict=True)
    ]
    body = [
        f"<header><h1>{len(runs)} runs</h1><p>{text(' · '.join(names))}</p></header>",
        "".join(f'<p class="warning">{text(words)}</p>' for words in warnings),
        section("budgets", "Budgets and results", _budgets(runs, names)),
        section(
            "progress",
            "Best so far",
            figure("compared-time", "best so far against time"),
            figure("compared-epochs", "best so far against epochs trained"),
            note("The best epoch of all trials so far, without probes and finalist runs."),
        ),
        section("settings", "Differences in settings", _differences(found, "settings")),
        section("spaces", "Differences in search spaces", _differences(found, "space")),
    ]
    data = {"metric": metrics[0], "lower": metrics[0] in LOSSES, "runs": lines}
    return page(" · ".join(names), body, data, {})


def _other_weights(runs: Sequence[Run]) -> list[str]:
    """Return the backbones whose file of weights is not the same in all runs that say which."""
    recorded = [one.document["provenance"].get("weights") for one in runs]
    known = [pair for weights in recorded if isinstance(weights, dict) for pair in weights.items()]
    return sorted({str(backbone) for backbone, digest in known if digest != dict(known)[backbone]})


def _spent(one: Run) -> dict[str, float]:
    epochs = one.epochs[one.epochs["trial_id"].isin(analysis.searched(one.trials)["trial_id"])]
    wall = float(epochs["wall_s"].max()) if len(epochs) else 0.0
    return {"wall_s": round(wall, 1), "epochs": len(epochs), "seconds": round(float(epochs["seconds"].sum()), 1)}


def _budgets(runs: Sequence[Run], names: Sequence[str]) -> str:
    rows, verdicts = [], []
    for name, one in zip(names, runs, strict=True):
        trials, (_, verdict), spent = analysis.searched(one.trials), judged(one), _spent(one)
        top = analysis.top(one.trials, one.metric)
        rows.append(
            {"run": name, "best": None if top is None else float(top[one.metric]), "metric": one.metric}
            | {"trials": f"{len(trials)} of {one.settings['trials']}", "epochs per trial": one.settings["epochs"]}
            | {"epochs trained": spent["epochs"], "search time": duration(spent["wall_s"])}
            | {"training time": duration(spent["seconds"])}
        )
        label = text(f"{name}: {verdict.verdict}.")
        verdicts.append(f"<p><strong>{label}</strong> {text(capitalized(verdict.sentence))}</p>")
    return table(pd.DataFrame(rows)) + "".join(verdicts)


def _differences(found: pd.DataFrame, part: str) -> str:
    rows = found[found["part"] == part].drop(columns="part")
    return table(rows) if len(rows) else "<p>None.</p>"
