"""What a run's folder holds, and the sections of its report, from the tables alone."""

import dataclasses
import math
import re
import time
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from tuning.insight import analysis
from tuning.insight import verdict as finalists
from tuning.insight.remarks import remarks
from tuning.record import tables
from tuning.record.journal import FINAL, read_record
from tuning.record.storage import is_uri, joined
from tuning.settings.config import PARAMETERS, SearchPlan
from tuning.settings.documents import plan_in
from tuning.settings.space import Space
from tuning.settings.space_file import parse
from tuning.show.page import column, duration, figure, note, number, section, table, text

TRIALS_SHOWN = 3000  # rows of the table of trials; the best, if there are more
AUDIT_ROWS = 100  # of each finding
CLASSES_SHOWN = 30  # of more the table is folded away
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

    @property
    def plan(self) -> SearchPlan:
        """With the storage folder in which the run is found: it may have been moved."""
        plan = plan_in(self.document, self.folder / "plan.yaml")
        return plan if is_uri(plan.storage) else plan.model_copy(update={"storage": str(self.folder.parent)})


def read(folder: Path) -> Run:
    """What there is of a run, also of one that was killed.

    Raises:
        InputError: the folder is not that of a run.
    """
    document = analysis.load_plan(folder)
    settings = document["settings"]
    found = {"samples": tables.read_table(folder / "samples.parquet")}
    if tables.up_to_date(folder):
        found |= {name: tables.read_table(folder / f"{name}.parquet") for name in ("trials", "epochs", "decisions")}
    else:
        made = tables.make_tables(read_record(folder / "journal.jsonl"), settings["metric"])
        found |= {name: made[name].to_pandas() for name in made}
    audit = folder / "audit.parquet"
    space = parse(document["space"], str(folder / "plan.yaml"))
    there = tables.read_table(audit) if audit.exists() else None
    return Run(folder, settings, document, space, **found, audit=there)


def judged(run: Run) -> tuple[pd.DataFrame, finalists.Verdict]:
    """The finalists' table and the verdict on what there is."""
    return finalists.judge(run.trials, run.metric, val_over_train=finalists.val_over_train(run.samples))


def same(run: Run) -> list[str]:
    """Configuration columns that are the same in all trials."""
    names = [f"config_{name}" for name in PARAMETERS]
    return [name for name in names if run.trials[name].nunique(dropna=False) <= 1]


# ---- sections, from the top -------------------------------------------------------------------------------------


def body(run: Run, compared: pd.DataFrame, verdict: finalists.Verdict, shares: pd.DataFrame) -> list[str]:
    """All sections, from the verdict down.

    Args:
        run: what there is.
        compared: the finalists' table.
        verdict: on them.
        shares: of `analysis.importance`.
    """
    parts = [_head(run), _verdict(run, verdict), _best(run, verdict)]
    if analysis.searched(run.trials).empty:
        return [*parts, _data(run)]
    parts += [_progress(), _mattered(run, shares), _depths(), _gap(run), _ended(run), _costs(), _audit(run)]
    return [*parts, _finalists(run, compared), _errors(run), _data(run), _table(run)]


def _head(run: Run) -> str:
    """The run's name, and how far it is."""
    trials = analysis.searched(run.trials)
    ended = int(trials["status"].isin(FINAL).sum())
    planned, written = run.settings["trials"], time.strftime("%d %B %Y, %H:%M UTC", time.gmtime())
    state = f"{planned} trials" if ended >= planned else f"not finished: {ended} of {planned} trials"
    data = run.settings["data"] or "generated chest radiographs"
    words = f"{data} · space {run.settings['space']} · {state} of up to {run.settings['epochs']} epochs · {written}"
    return f"<header><h1>{text(run.settings['name'])}</h1><p>{text(words)}</p></header>"


def _verdict(run: Run, verdict: finalists.Verdict) -> str:
    first, sentence = verdict.sentence[:1], verdict.sentence + "."
    if not re.match(r"t\d", sentence):  # a trial's name stays as it is
        sentence = first.upper() + sentence[1:]
    sentence = "No trial has begun." if analysis.searched(run.trials).empty else sentence
    runs = run.trials[run.trials["origin"] == "finalist"]
    left = int((~runs["status"].isin(FINAL)).sum())
    state = f"So far, with {left} of the finalists' runs unfinished" if left else SAID[verdict.verdict]
    label = f'<p class="verdict {"" if left else verdict.verdict.partition(" ")[0]}">{text(state)}</p>'
    said = [
        f'<p class="warning">{text(words)}</p>' if alarming else note(words)
        for words, alarming in remarks(run.folder, analysis.searched(run.trials), run.samples, verdict.trial_id)
    ]
    more = finalists.more_runs(run.trials, run.plan)
    if more is not None:
        said.insert(0, note(f"{more[0]} more runs for the verdict: {more[1]}"))
    sentence = f'<p class="sentence">{text(sentence)}</p>'
    return f'<section id="verdict">{label}{sentence}{_facts(run)}{"".join(said)}</section>'


def _best(run: Run, verdict: finalists.Verdict) -> str:
    if verdict.trial_id is None:
        return ""
    row = run.trials.set_index("trial_id").loc[verdict.trial_id]
    config = {name: _plain(row[f"config_{name}"]) for name in PARAMETERS}
    config |= {"epochs": run.settings["epochs"], "seed": run.settings["seed"]}
    words = "\n".join(map(text, yaml.safe_dump(config, sort_keys=False).splitlines()))
    button = '<button type="button" data-copy="config">Copy</button>'
    return section(
        "best",
        f"The best configuration: {verdict.trial_id}",
        f'<div class="copy">{button}<pre id="config">{words}</pre></div>',
        note(f"Train it again and test it once: python tuning/train_final.py {_place(run)}"),
    )


def _place(run: Run) -> str:
    """What the user calls the run's folder: what lies in a storage has only a copy on this machine."""
    storage = run.settings.get("storage", "")
    return joined(storage, run.settings["name"]) if is_uri(storage) else str(run.folder)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _facts(run: Run) -> str:
    trials, top = analysis.searched(run.trials), analysis.top(run.trials, run.metric)
    saved = analysis.savings(trials, run.settings["epochs"])
    wall = float(run.epochs["wall_s"].max()) if len(run.epochs) else 0.0
    facts = {
        f"best {run.metric} of the search": "-" if top is None else number(float(top[run.metric])),
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
    count = int(analysis.searched(run.trials)["status"].isin(FINAL).sum())
    few = "" if count >= 50 else f" With {count} trials that tenth is {math.ceil(count / 10)}: hardly more than a hint."
    return section(
        "importance",
        "What mattered",
        figure("importance", "importance of each parameter"),
        note(
            "PED-ANOVA: how differently a parameter's values are spread among the best tenth of trials and among all. "
            "It doesn't say which values are better, nor that a parameter without weight may be set to anything: "
            "effects that only show together with another's are missed, and what hardly varied can't have mattered."
            + few
        ),
        figure("rates", "learning rate against the metric"),
        note("Learning-rate slices: each trial, by backbone. A double click in the legend shows one backbone alone."),
    )


def _depths() -> str:
    return section(
        "depth",
        "Backbone and unfreeze depth",
        figure("depths", "the best trial of each backbone and depth"),
        note(
            "The best trial of each pair. Head: the classifier alone; all: the whole network. Pairs tried once say "
            "little."
        ),
    )


def _gap(run: Run) -> str:
    trials = analysis.searched(run.trials)
    heads = {"backbone": "backbone", "unfrozen": "unfrozen", "trials": "trials", "trial_id": "best"}
    heads |= {"train_eval_loss": "training loss", "val_loss": "validation loss", "gap": "gap"}
    medians = {name: name for name in ("unfrozen", "augmentation", "trials", "gap")}
    rises = {"unfrozen": "unfrozen", "trials": "trials", "earlier": "best before the last epoch", "rise": "rise"}
    return section(
        "gap",
        "The generalisation gap",
        figure("gap", "validation loss against training loss"),
        note("Without augmentation, at the best epoch. Above the line a trial is worse on images it hasn't seen."),
        table(_records(analysis.overfitting(trials, run.metric)), heads),
        note("The gap by augmentation, and how much the validation loss rose from a trial's best epoch to its last:"),
        table(_records(analysis.gaps(trials)), medians),
        table(_records(analysis.best_and_last(trials, run.epochs)), rises),
        note("Medians of the trials that ran two epochs or more."),
    )


def _ended(run: Run) -> str:
    trials = analysis.searched(run.trials)
    rows = analysis.savings(trials, run.settings["epochs"])
    on_gpu = float(trials["gpu_seconds"].sum()) > 0
    seconds = analysis.savings(trials.assign(seconds=trials["gpu_seconds"]), run.settings["epochs"]) if on_gpu else rows
    kept, kind = duration(float(seconds["seconds_saved"].sum())), "GPU time" if on_gpu else "training"
    heads = {"status": "ended", "trials": "trials", "epochs": "epochs", "epochs_saved": "epochs saved"}
    words = f"Ending trials early saved {rows['epochs_saved'].sum():,.0f} epochs, about {kept} of {kind}."
    return section(
        "ends",
        "Why and when trials ended",
        figure("ends", "trials by the epoch that they ended after"),
        f"<p>{text(words)}</p>",
        table(_records(rows.round({"seconds_saved": 0})), heads | {"seconds_saved": "seconds saved"}),
        note("Why each one ended stands in the table of all trials."),
    )


def _costs() -> str:
    named = {"seconds": "seconds", "latency": "latency", "size": "trained parameters", "parameters": "parameters"}
    figures = "".join(figure(name, f"loss against {words}") for name, words in named.items())
    return section(
        "cost",
        "Loss against cost",
        f'<div class="pair">{figures}</div>',
        note(
            "The line joins the trials that none beats in both: the Pareto front. A trial whose frozen "
            "layers' outputs lay in the cache took fewer seconds. Latency is that of the whole model for one image."
        ),
    )


def _errors(run: Run) -> str:
    rows = analysis.errors(run.trials)
    heads = {"error": "error", "trials": "trials", "example": "for example"}
    return section("errors", "Errors", table(_records(rows.head(20)), heads)) if len(rows) else ""


def _finalists(run: Run, compared: pd.DataFrame) -> str:
    if compared.empty:
        return ""
    heads = {"trial_id": "trial", "role": "role", "runs": "runs", "mean": "mean", "sd": "sd", "luck": "luck"}
    heads |= {"searched": "in the search", "difference": "better by", "low": "from", "high": "to", "p_value": "p"}
    compared = compared.round({"seconds": 0})
    chosen = compared["role"].where(~compared["chosen"].astype(bool), compared["role"] + ", chosen")
    return section(
        "finalists",
        "Finalists",
        figure("finalists", "difference from the default with its interval"),
        note(f"Trained again with the same seeds, {run.metric}. Right of the line is better than the default."),
        table(_records(compared.assign(role=chosen)), heads | {"seconds": "s a run"}),
    )


def _audit(run: Run) -> str:
    if run.audit is None or run.audit.empty:
        return "" if run.audit is None else section("audit", "The audit", "<p>Nothing was found.</p>")
    order = run.audit["severity"].map({"stop": 0, "warn": 1, "info": 2})
    audit = run.audit.loc[order.sort_values(kind="stable").index].fillna({"path_a": "", "detail": ""})
    kinds = audit.groupby(["severity", "finding"], sort=False)
    first = {name: (name, "first") for name in ("detail", "p_value")}
    counts = kinds.agg(rows=("finding", "size"), path=("path_a", "first"), **first).reset_index()
    heads = {"severity": "severity", "finding": "finding", "rows": "rows", "detail": "detail", "p_value": "p"}
    parts = [table(_records(counts), heads | {"path": "for example"})]
    for (_, finding), rows in kinds:
        if len(rows) == 1 and rows["path_b"].isna().all():
            continue  # all of it is in the table
        heads = {name: name.replace("_", " ") for name in rows if name != "finding" and rows[name].notna().any()}
        told = table(_records(rows.head(AUDIT_ROWS)), heads)
        told += note(f"{AUDIT_ROWS} of {len(rows):,}; audit.parquet has all.") if len(rows) > AUDIT_ROWS else ""
        parts.append(f"<details><summary>{text(finding)} ({len(rows):,})</summary>{told}</details>")
    return section("audit", "The audit", *parts)


def _data(run: Run) -> str:
    counts = run.samples.groupby(["label", "split"]).size().unstack(fill_value=0).reset_index()
    heads = {"label": "class"} | {name: name for name in ("train", "val", "test") if name in counts}
    told = table(_records(counts), heads)
    many = f"<details><summary>{len(counts):,} classes</summary>{told}</details>"
    return section("data", "The data", told if len(counts) <= CLASSES_SHOWN else many)


def _table(run: Run) -> str:
    fixed = {name.removeprefix("config_"): _plain(run.trials[name].iloc[0]) for name in same(run)}
    words = ", ".join(f"{name} {value}" for name, value in fixed.items())
    many = f" The best {TRIALS_SHOWN:,} of {len(run.trials):,} are shown." if len(run.trials) > TRIALS_SHOWN else ""
    return section("trials", "All trials", '<div id="table"></div>', note(f"The same in all: {words}.{many}"))


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of plain Python values, null where missing."""
    names = list(frame)
    return [
        dict(zip(map(str, names), row, strict=True))
        for row in zip(*(column(frame[name], 6) for name in names), strict=True)
    ]
