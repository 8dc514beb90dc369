"""The report of a run, or the comparison of several: one HTML file that needs nothing else, made from the tables."""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tuning.insight import analysis
from tuning.record import tables
from tuning.record.journal import loss_like
from tuning.settings.config import PARAMETERS
from tuning.show.page import column, columns, duration, figure, note, page, section, table, text
from tuning.show.sections import TRIALS_SHOWN, Run, body, judged, read, same

EPOCHS_KEPT = 105_000  # of the trials' histories; the best trials', if there are more
EPOCHS_WITH_TIMES = 30_000  # of more the page would grow over 6 MB if it told where their time went
TIMES = ("wall_s", "data_seconds", "prefix_seconds", "train_seconds", "evaluate_seconds")
CURVES = 150  # drawn at once
COSTS = ("seconds", "trained_parameters", "parameters", "latency_ms")  # that loss is set against
ERROR_CHARACTERS, REASON_CHARACTERS = 2000, 300  # of a traceback, from its end; of a reason
REFRESH_SECONDS, REFRESH_SHARE = 60.0, 0.05  # between reports of a running search; the driver's time for it, at most


def write(folder: Path) -> Path:
    """Write the report of a run into its folder; returns where."""
    return save(folder / "report.html", report(read(folder)))


def save(path: Path, content: str) -> Path:
    with tables.replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8", errors="replace")
    return path


def write_or_tell(folder: Path) -> Path | None:
    """Write the report; a search is worth more than its report, so a failure of whichever kind is told, not raised."""
    try:
        return write(folder)
    except Exception as error:
        print(f"report.html could not be written ({type(error).__name__}: {error})", file=sys.stderr)
        return None


def refresher(folder: Path, clock: Callable[[], float] = time.monotonic) -> Callable[[], None]:
    """A function to call whenever the tables are new, which writes the report where that is due.

    After a failure, which is told, it does nothing more.
    """
    due = clock() + REFRESH_SECONDS

    def refresh() -> None:
        nonlocal due
        started = clock()
        if started < due:
            return
        written = write_or_tell(folder)
        ended = clock()
        due = float("inf") if written is None else ended + max(REFRESH_SECONDS, (ended - started) / REFRESH_SHARE)

    return refresh


# ---- one run ----------------------------------------------------------------------------------------------------


def report(run: Run) -> str:
    """The page of one run."""
    compared, verdict = judged(run)
    shares = analysis.importance(run.trials, run.space, run.metric)
    ranked = _ranked(run)
    shown, kept = ranked.head(TRIALS_SHOWN), _with_history(ranked)
    fronts = {cost: analysis.pareto(run.trials, cost, run.metric) for cost in COSTS}
    data = {
        "metric": run.metric,
        "lower": run.metric == "val_loss",
        "epochs": run.settings["epochs"],
        "trials": columns(shown.drop(columns=[name for name in same(run) if name != "config_backbone"]), 5),
        "varied": [f"config_{name}" for name in PARAMETERS if f"config_{name}" not in same(run)],
        "ids": list(shown["trial_id"]),
        "curves": _curves(analysis.searched(kept)),
        "best": columns(analysis.best_so_far(run.trials, run.epochs, run.metric)),
        "importance": columns(shares, 4),
        "depths": columns(analysis.by_depth(run.trials, run.metric), 4),
        "ends": columns(analysis.ends(run.trials)),
        "fronts": {cost: list(front["trial_id"]) for cost, front in fronts.items()},
        "finalists": columns(compared),
        "chosen": verdict.trial_id,
    }
    return page(run.settings["name"], body(run, compared, verdict, shares), data, history(run, kept))


def _ranked(run: Run) -> pd.DataFrame:
    """All trials with when they were best: the searched ones from the best on, then probes and finalists' runs."""
    best = run.epochs[["trial_id", "epoch", "wall_s"]].rename(columns={"epoch": "best_epoch", "wall_s": "best_wall_s"})
    trials = run.trials.drop(columns=["error", "started_at", "ended_at"])
    trials = trials.merge(best, how="left", on=["trial_id", "best_epoch"])
    trials["reason"] = trials["reason"].str[:REASON_CHARACTERS]
    beside = trials["origin"].isin(["probe", "finalist"])
    losses = trials[run.metric].map(lambda value: loss_like(run.metric, value))
    order = pd.DataFrame({"beside": beside, "loss": losses}).sort_values(["beside", "loss"], kind="stable")
    return trials.loc[order.index]


def _with_history(ranked: pd.DataFrame) -> pd.DataFrame:
    shown = ranked.head(TRIALS_SHOWN)
    return shown[shown["epochs"].cumsum() <= EPOCHS_KEPT]


def _curves(ranked: pd.DataFrame) -> list[str]:
    """Ids of the trials whose curves are drawn: of many the best third, and the others evenly."""
    ids = list(ranked.loc[ranked["epochs"] > 0, "trial_id"])
    if len(ids) <= CURVES:
        return ids
    rest = np.linspace(CURVES // 3, len(ids) - 1, CURVES - CURVES // 3).round().astype(int)
    return ids[: CURVES // 3] + [ids[place] for place in rest]


def history(run: Run, kept: pd.DataFrame) -> dict[str, Any]:
    """Errors, and every epoch and decision of these trials: columns, then each trial's values column by column."""
    failed = run.trials[run.trials["error"].notna()].head(TRIALS_SHOWN)
    told = failed["error"].str[-ERROR_CHARACTERS:]
    answer: dict[str, Any] = {"errors": dict(zip(failed["trial_id"], told, strict=True))}
    for name, frame in (("epochs", run.epochs), ("decisions", run.decisions)):
        rows = frame[frame["trial_id"].isin(kept["trial_id"])].sort_values(["trial_id", "seq"])
        left_out = ("seq", "trial_id", *(TIMES if len(rows) > EPOCHS_WITH_TIMES else ()))
        names = [key for key in rows if key not in left_out and rows[key].notna().any()]
        values = [column(rows[key], 4) for key in names]
        counts = rows.groupby("trial_id").size()
        ends = counts.cumsum()
        answer[name] = {
            "columns": names,
            "trials": {
                trial_id: [value[end - count : end] for value in values]
                for trial_id, count, end in zip(counts.index, counts, ends, strict=True)
            },
        }
    return answer


# ---- several runs -----------------------------------------------------------------------------------------------


def compare(runs: Sequence[Run]) -> str:
    """The page of several runs: their budgets, the best so far on one axis, and in what they differ."""
    names = analysis.run_names([one.folder for one in runs])
    found = analysis.differences({name: one.document for name, one in zip(names, runs, strict=True)})
    metrics = sorted({one.metric for one in runs})
    prints = {one.document["provenance"]["fingerprint"] for one in runs}
    warnings = [] if len(metrics) == 1 else [f"The runs have different metrics ({', '.join(metrics)})."]
    warnings += [] if len(prints) == 1 else ["The runs have different images, so their losses can't be compared."]
    lines = [
        {"name": name, "metric": one.metric}
        | columns(analysis.best_so_far(one.trials, one.epochs, one.metric).drop(columns="trial_id"), 5)
        | {"end": _spent(one)}
        for name, one in zip(names, runs, strict=True)
    ]
    body = [
        f"<header><h1>{len(runs)} runs</h1><p>{text(' · '.join(names))}</p></header>",
        "".join(f'<p class="warning">{text(words)}</p>' for words in warnings),
        section("budgets", "What they had, and what they found", _budgets(runs, names)),
        section(
            "progress",
            "Best so far",
            figure("compared-time", "best so far against time"),
            figure("compared-epochs", "best so far against epochs trained"),
            note(
                "The best epoch of all trials until then, without probes and finalists' runs, as it was in the search."
            ),
        ),
        section("settings", "Settings that differ", _differences(found, "settings")),
        section("spaces", "Spaces that differ", _differences(found, "space")),
    ]
    data = {"metric": metrics[0], "lower": metrics[0] == "val_loss", "runs": lines}
    return page(" · ".join(names), body, data, {})


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
            | {"trials": f"{len(trials)} of {one.settings['trials']}", "epochs a trial": one.settings["epochs"]}
            | {"epochs run": spent["epochs"], "time": duration(spent["wall_s"])}
            | {"of training": duration(spent["seconds"])}
        )
        verdicts.append(f"<p><strong>{text(name)}</strong> {text(verdict.verdict)}: {text(verdict.sentence)}.</p>")
    return table(rows, {key: key for key in rows[0]}) + "".join(verdicts)


def _differences(found: pd.DataFrame, part: str) -> str:
    rows = found[found["part"] == part].drop(columns="part")
    return (
        table(rows.to_dict("records"), {name: "" if name == "key" else name for name in rows})
        if len(rows)
        else "<p>None.</p>"
    )
