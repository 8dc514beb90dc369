"""What a run's folder holds, and the sections of its report, from the tables alone."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from tuning import analysis, finalists, tables
from tuning.config import DEPTH_ALL, PARAMETERS, InputError
from tuning.page import column, columns, duration, figure, note, number, page, section, table, text
from tuning.space import Space, parse

TRIALS_SHOWN = 4000  # rows of the table of trials; the best, if there are more
EPOCHS_KEPT = 100_000  # of their histories; the best trials', if there are more
CURVES = 150  # drawn at once
ERROR_CHARACTERS = 2000  # of a traceback, from its end
AUDIT_ROWS = 100  # of each finding
SAID = {
    "winner": "A winner",
    "tie": "A tie",
    "nothing beats the default": "Nothing beats the default",
    "not enough runs": "Not tested",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run's folder holds."""

    folder: Path
    settings: dict[str, Any]
    document: dict[str, Any]  # the whole plan.yaml
    space: Space
    samples: pd.DataFrame
    trials: pd.DataFrame
    epochs: pd.DataFrame
    decisions: pd.DataFrame
    audit: pd.DataFrame | None

    @property
    def metric(self) -> str:
        return str(self.settings["metric"])


def read(folder: Path) -> Run:
    """What there is of a run, also of one that was killed.

    Raises:
        InputError: the folder is not that of a run.
    """
    if not (folder / "plan.yaml").is_file():
        raise InputError(f"{folder}: no plan.yaml there; give the folder of a run, like results/NAME")
    document = yaml.safe_load((folder / "plan.yaml").read_text())
    settings = document["settings"]
    found = {"samples": tables.read_table(folder / "samples.parquet")}
    if (folder / "trials.parquet").exists():
        found |= {name: tables.read_table(folder / f"{name}.parquet") for name in ("trials", "epochs", "decisions")}
    else:  # killed before the first tables
        journal = folder / "journal.jsonl"
        record = tables.Record.of(tables.read_journal(journal) if journal.exists() else [])
        made = tables.make_tables(record, settings["metric"])
        found |= {name: made[name].to_pandas() for name in made}
    # Tables of an older version lack columns.
    found["trials"] = found["trials"].reindex(columns=tables.TRIALS.names)
    found["epochs"] = found["epochs"].reindex(columns=tables.EPOCHS.names)
    audit = folder / "audit.parquet"
    space = parse(document["space"], str(folder / "plan.yaml"))
    there = tables.read_table(audit) if audit.exists() else None
    return Run(folder, settings, document, space, **found, audit=there)


def judged(run: Run) -> tuple[pd.DataFrame, finalists.Verdict]:
    """The finalists' table and the verdict on what there is."""
    splits = run.samples["split"].value_counts()
    ratio = float(splits.get("val", 0) / max(splits.get("train", 0), 1))
    return finalists.judge(run.trials, run.metric, val_over_train=ratio)


def report(run: Run) -> str:
    """The page of one run, from the verdict down."""
    compared, verdict = judged(run)
    top = _top(head(run, verdict), run, verdict)
    if analysis.searched(run.trials).empty:
        return page(run.settings["name"], [*top, _data(run)], {"figures": {}}, {})
    shares = analysis.importance(run.trials, run.space, run.metric)
    body = [
        *top,
        _progress(),
        _mattered(run, shares),
        _depths(),
        _gap(run),
        _ended(run),
        _costs(),
        _errors(run),
        _finalists(run, compared),
        _audit(run),
        _data(run),
        _table(run),
    ]
    ranked = _ranked(run)
    shown, kept = ranked.head(TRIALS_SHOWN), _with_history(ranked)
    fronts = {cost: analysis.pareto(run.trials, cost, run.metric) for cost in ("seconds", "trained_parameters")}
    data = {
        "metric": run.metric,
        "lower": run.metric == "val_loss",
        "epochs": run.settings["epochs"],
        "trials": columns(shown.drop(columns=_same(run)), 5),
        "ids": list(shown["trial_id"]),
        "curves": _curves(analysis.searched(kept)),
        "best": columns(analysis.best_so_far(run.trials, run.epochs, run.metric)),
        "importance": columns(shares, 4),
        "depths": columns(analysis.by_depth(run.trials, run.metric), 4),
        "ends": columns(analysis.ends(run.trials)),
        "fronts": {cost: list(front["trial_id"]) for cost, front in fronts.items()},
        "finalists": columns(compared),
        "log": [name for name, parameter in run.space.parameters.items() if parameter.log],
        "chosen": verdict.trial_id,
    }
    return page(run.settings["name"], body, data, history(run, kept))


# ---- what report.js is given ------------------------------------------------------------------------------------


def _ranked(run: Run) -> pd.DataFrame:
    """All trials, the best first, with when they were best."""
    best = run.epochs[["trial_id", "epoch", "wall_s"]].rename(columns={"epoch": "best_epoch", "wall_s": "best_wall_s"})
    trials = run.trials.drop(columns=["started_at", "ended_at"]).merge(best, how="left", on=["trial_id", "best_epoch"])
    trials["error"] = trials["error"].str[-ERROR_CHARACTERS:]
    losses = trials[run.metric].map(lambda value: tables.loss_like(run.metric, value))
    return trials.loc[losses.sort_values(kind="stable", na_position="last").index]


def _with_history(ranked: pd.DataFrame) -> pd.DataFrame:
    shown = ranked.head(TRIALS_SHOWN)
    return shown[shown["epochs"].cumsum() <= EPOCHS_KEPT]


def _same(run: Run) -> list[str]:
    """Configuration columns that are the same in all trials."""
    names = [f"config_{name}" for name in PARAMETERS]
    return [name for name in names if run.trials[name].nunique(dropna=False) <= 1]


def _curves(ranked: pd.DataFrame) -> list[str]:
    """Ids of the trials whose curves are drawn: of many the best third, and the others evenly."""
    ids = list(ranked.loc[ranked["epochs"] > 0, "trial_id"])
    if len(ids) <= CURVES:
        return ids
    rest = np.linspace(CURVES // 3, len(ids) - 1, CURVES - CURVES // 3).round().astype(int)
    return ids[: CURVES // 3] + [ids[place] for place in rest]


def history(run: Run, kept: pd.DataFrame) -> dict[str, Any]:
    """Every epoch and decision of these trials: columns, then the values of each trial, column by column."""
    answer: dict[str, Any] = {}
    for name, frame in (("epochs", run.epochs), ("decisions", run.decisions)):
        rows = frame[frame["trial_id"].isin(kept["trial_id"])].sort_values(["trial_id", "seq"])
        names = [key for key in rows if key not in ("seq", "trial_id") and rows[key].notna().any()]
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


# ---- sections, from the top -------------------------------------------------------------------------------------


def head(run: Run, verdict: finalists.Verdict) -> str:
    """The run's name, and how far it is."""
    trials = analysis.searched(run.trials)
    ended = int(trials["status"].isin(tables.FINAL).sum())
    planned, written = run.settings["trials"], time.strftime("%d %B %Y, %H:%M UTC", time.gmtime())
    state = f"{planned} trials" if ended >= planned else f"not finished: {ended} of {planned} trials"
    data = run.settings["data"] or "generated chest radiographs"
    words = f"{data} · space {run.settings['space']} · {state} of up to {run.settings['epochs']} epochs · {written}"
    return f"<header><h1>{text(run.settings['name'])}</h1><p>{text(words)}</p></header>"


def _top(header: str, run: Run, verdict: finalists.Verdict) -> list[str]:
    sentence = verdict.sentence[:1].upper() + verdict.sentence[1:] + "."
    sentence = "No trial has begun." if analysis.searched(run.trials).empty else sentence
    label = f'<p class="verdict {verdict.verdict.partition(" ")[0]}">{text(SAID[verdict.verdict])}</p>'
    parts = [
        header,
        f'<section id="verdict">{label}<p class="sentence">{text(sentence)}</p>{_figures(run, verdict)}</section>',
    ]
    if verdict.trial_id is None:
        return parts
    row = run.trials.set_index("trial_id").loc[verdict.trial_id]
    config = {name: _plain(row[f"config_{name}"]) for name in PARAMETERS} | {"epochs": run.settings["epochs"]}
    yaml_text = yaml.safe_dump(config | {"seed": run.settings["seed"]}, sort_keys=False)
    copy = f'<div class="copy"><button type="button" data-copy="config">Copy</button><pre id="config">{_pre(yaml_text)}</pre></div>'
    train = note(f"Train it again and test it once: python tuning/train_final.py {run.folder}")
    return [*parts, section("best", f"The best configuration: {verdict.trial_id}", copy, train)]


def _pre(words: str) -> str:
    """Text for a `pre` element, whose newlines stay."""
    return "\n".join(text(line) for line in words.split("\n"))


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _figures(run: Run, verdict: finalists.Verdict) -> str:
    trials, top = analysis.searched(run.trials), analysis.best(run.trials, run.metric)
    saved = analysis.saved(trials, run.settings["epochs"])
    wall = float(run.epochs["wall_s"].max()) if len(run.epochs) else 0.0
    facts = {
        f"best {run.metric} of the search": "–" if top is None else number(float(top[run.metric])),
        "trials": number(len(trials)),
        "time": duration(wall),
        "saved by stopping early": duration(float(saved["seconds_saved"].sum())),
    }
    items = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{items}</dl>'


def _progress() -> str:
    return section(
        "progress",
        "How the search went",
        figure("time", "loss against time, with the best so far"),
        note("A point is a trial at its best epoch. The line is the best epoch of all so far."),
        figure("curves", "learning curves by how trials ended"),
    )


def _mattered(run: Run, shares: pd.DataFrame) -> str:
    if shares.empty:
        least = analysis.LEAST_RANKED
        return section(
            "importance", "What mattered", note(f"Not told: fewer than {least} ended trials, or one parameter.")
        )
    count = int(analysis.searched(run.trials)["status"].isin(tables.FINAL).sum())
    few = "" if count >= 50 else f" With {count} trials that tenth is {math.ceil(count / 10)}: hardly more than a hint."
    return section(
        "importance",
        "What mattered",
        figure("importance", "importance of each parameter"),
        note(
            "PED-ANOVA: how differently a parameter's values are spread among the best tenth of trials and among all. It "
            "doesn't say which values are better, nor that a parameter without weight may be set to anything: effects that "
            "only show together with another's are missed, and what was hardly varied can't have mattered." + few
        ),
        figure("rates", "learning rate against the metric"),
        note(
            "Learning-rate slices: each trial, by backbone. Choose a backbone in the legend; a double click shows it alone."
        ),
    )


def _depths() -> str:
    return section(
        "depth",
        "Backbone and unfreeze depth",
        figure("depths", "the best trial of each backbone and depth"),
        note("The best trial of each pair; 0 is the classifier alone. Pairs tried once say little."),
    )


def _gap(run: Run) -> str:
    rows = analysis.overfitting(analysis.searched(run.trials), run.metric)
    heads = {"backbone": "backbone", "unfrozen": "unfrozen", "trials": "trials", "trial_id": "best"}
    heads |= {"train_eval_loss": "training loss", "val_loss": "validation loss", "gap": "gap"}
    return section(
        "gap",
        "The generalisation gap",
        figure("gap", "validation loss against training loss"),
        note(
            "Both losses without augmentation, at the best epoch. Above the line a trial is worse on images it hasn't seen."
        ),
        table(_records(rows), heads),
    )


def _ended(run: Run) -> str:
    trials = analysis.searched(run.trials)
    rows = analysis.saved(trials, run.settings["epochs"])
    on_gpu = float(trials["gpu_seconds"].sum()) > 0
    seconds = analysis.saved(trials.assign(seconds=trials["gpu_seconds"]), run.settings["epochs"]) if on_gpu else rows
    hours, unit = float(seconds["seconds_saved"].sum()) / 3600, "GPU hours" if on_gpu else "hours of training"
    heads = {"status": "ended", "trials": "trials", "epochs": "epochs", "epochs_saved": "epochs saved"}
    words = f"Ending trials early saved {rows['epochs_saved'].sum():,.0f} epochs, about {hours:.3g} {unit}."
    return section(
        "ends",
        "Why and when trials ended",
        figure("ends", "trials by the epoch that they ended after"),
        f"<p>{text(words)}</p>",
        table(_records(rows), heads | {"seconds_saved": "seconds saved"}),
        note("Why each one ended stands in the table of all trials."),
    )


def _costs() -> str:
    return section(
        "cost",
        "Loss against cost",
        f'<div class="pair">{figure("seconds", "loss against seconds")}{figure("size", "loss against trained parameters")}</div>',
        note("The line joins the trials that none beats in both: the Pareto front."),
    )


def _errors(run: Run) -> str:
    rows = analysis.errors(run.trials)
    heads = {"error": "error", "trials": "trials", "example": "for example"}
    return section("errors", "Errors", table(_records(rows.head(20)), heads)) if len(rows) else ""


def _finalists(run: Run, compared: pd.DataFrame) -> str:
    if compared.empty:
        return ""
    heads = {
        "trial_id": "trial",
        "role": "role",
        "runs": "runs",
        "mean": "mean",
        "sd": "sd",
        "searched": "in the search",
    }
    heads |= {
        "luck": "luck",
        "difference": "better by",
        "low": "from",
        "high": "to",
        "p_value": "p",
        "seconds": "s a run",
    }
    return section(
        "finalists",
        "Finalists",
        figure("finalists", "difference from the default with its interval"),
        note(f"Trained again with the same seeds, {run.metric}. Right of the line is better than the default."),
        table(_records(compared), heads),
    )


def _audit(run: Run) -> str:
    if run.audit is None or run.audit.empty:
        return "" if run.audit is None else section("audit", "The audit", "<p>Nothing was found.</p>")
    counts = run.audit.groupby(["severity", "finding"], as_index=False).size()
    parts = [table(_records(counts), {"severity": "severity", "finding": "finding", "size": "rows"})]
    for finding, rows in run.audit.groupby("finding", sort=False):
        heads = {name: name.replace("_", " ") for name in rows if name not in ("finding",) and rows[name].notna().any()}
        more = (
            note(f"The first {AUDIT_ROWS} of {len(rows):,}; audit.parquet has all.") if len(rows) > AUDIT_ROWS else ""
        )
        body = table(_records(rows.head(AUDIT_ROWS)), heads) + more
        parts.append(f"<details><summary>{text(finding)} ({len(rows):,})</summary>{body}</details>")
    return section("audit", "The audit", *parts)


def _data(run: Run) -> str:
    counts = run.samples.groupby(["label", "split"]).size().unstack(fill_value=0).reset_index()
    heads = {"label": "class"} | {name: name for name in ("train", "val", "test") if name in counts}
    return section("data", "The data", table(_records(counts), heads))


def _table(run: Run) -> str:
    same = {name.removeprefix("config_"): _plain(run.trials[name].iloc[0]) for name in _same(run)}
    words = ", ".join(
        f"{name} {'all' if (name, value) == ('unfreeze_depth', DEPTH_ALL) else value}" for name, value in same.items()
    )
    many = f" The best {TRIALS_SHOWN:,} of {len(run.trials):,} are shown." if len(run.trials) > TRIALS_SHOWN else ""
    return section("trials", "All trials", '<div id="table"></div>', note(f"The same in all: {words}.{many}"))


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of plain Python values, null where missing."""
    names = list(frame)
    return [
        dict(zip(map(str, names), row, strict=True))
        for row in zip(*(column(frame[name], 6) for name in names), strict=True)
    ]
