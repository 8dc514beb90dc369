"""Read a run's folder, and write the sections of its report from the tables alone."""

import dataclasses
import math
import re
import shlex
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
from tuning.record.targets import counted, is_multi_label
from tuning.settings.config import PARAMETERS, SearchPlan
from tuning.settings.documents import plan_in
from tuning.settings.space import Space
from tuning.settings.space_file import parse
from tuning.settings.words import count
from tuning.show import frames
from tuning.show.frames import duration, number
from tuning.show.page import figure, note, section, table, text

TRIALS_SHOWN = 3000  # rows of the table of trials: the best
AUDIT_ROWS = 100  # of each finding
CLASSES_SHOWN = 30  # a longer table of classes is folded


@dataclasses.dataclass(frozen=True)
class Run:
    """The content of a run's folder."""

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
        """The settings, with the storage folder in which the run is found: it may have been moved."""
        plan = plan_in(self.document, self.folder / "plan.yaml")
        return plan if is_uri(plan.storage) else plan.model_copy(update={"storage": str(self.folder.parent)})


def read(folder: Path) -> Run:
    """Read a run, also one that was killed.

    Raises:
        InputError: the folder holds no run.
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
    return Run(folder, settings, document, space, **found, audit=tables.read_table(audit) if audit.exists() else None)


def judged(run: Run) -> tuple[pd.DataFrame, finalists.Verdict]:
    """Return the table of finalists and the verdict so far."""
    val_drawn = run.document["provenance"].get("val_drawn") is not False
    return finalists.judged(run.folder, run.trials, run.samples, run.metric, val_drawn=val_drawn)


def same(run: Run) -> list[str]:
    """Return the configuration columns that have the same value in all trials."""
    names = [f"config_{name}" for name in PARAMETERS]
    return [name for name in names if run.trials[name].nunique(dropna=False) <= 1]


def body(run: Run, compared: pd.DataFrame, verdict: finalists.Verdict, shares: pd.DataFrame) -> list[str]:
    """Return all sections in HTML, the verdict first; `compared` is the table of finalists, `shares` the importance."""
    parts = [_head(run), _verdict(run, verdict), _best(run, verdict)]
    if analysis.searched(run.trials).empty:
        return [*parts, _data(run)]
    parts += [_progress(), _importance(run, shares), _depths(), _gap(run), _ended(run), _costs(), _audit(run)]
    return [*parts, _finalists(run, compared), _errors(run), _data(run), _table(run)]


def _head(run: Run) -> str:
    trials = analysis.searched(run.trials)
    ended = int(trials["status"].isin(FINAL).sum())
    planned, written = run.settings["trials"], time.strftime("%d %B %Y, %H:%M UTC", time.gmtime())
    state = count(planned, "trial") if ended >= planned else f"not finished: {ended} of {count(planned, 'trial')}"
    data = run.settings["data"] or "generated chest radiographs"
    epochs = count(run.settings["epochs"], "epoch")
    words = f"{data} · space {run.settings['space']} · {state} of up to {epochs} · {written}"
    return f"<header><h1>{text(run.settings['name'])}</h1><p>{text(words)}</p></header>"


def _verdict(run: Run, verdict: finalists.Verdict) -> str:
    trials = analysis.searched(run.trials)
    sentence = "No trial has started." if trials.empty else capitalized(verdict.sentence)
    runs = run.trials[run.trials["origin"] == "finalist"]
    left = int((~runs["status"].isin(FINAL)).sum())
    so_far = len(trials) < run.settings["trials"] or not trials["status"].isin(FINAL).all()
    state = f"Verdict{' so far' if so_far else ''}: {verdict.verdict}"
    state = f"Verdict so far, with {count(left, 'unfinished finalist run')}" if left else state
    label = f'<p class="verdict {"" if left else verdict.verdict.partition(" ")[0]}">{text(state)}</p>'
    notes = [
        f'<p class="warning">{text(words)}</p>' if alarming else note(words)
        for words, alarming in remarks(run.folder, trials, run.samples, run.plan, verdict.trial_id)
    ]
    if (more := finalists.more_runs(run.trials, run.plan)) is not None:
        notes.insert(0, note(f"To compare them by {count(more[0], 'more run')}, with other seeds: {more[1]}"))
    sentence = f'<p class="sentence">{text(sentence)}</p>'
    return f'<section id="verdict">{label}{sentence}{_facts(run, trials)}{"".join(notes)}</section>'


def capitalized(sentence: str) -> str:
    """Return a verdict's sentence with a capital letter, unless it begins with a trial's id, and a full stop."""
    first = sentence[0] if re.match(r"t\d", sentence) else sentence[0].upper()
    return f"{first}{sentence[1:]}."


def _facts(run: Run, trials: pd.DataFrame) -> str:
    top = analysis.top(run.trials, run.metric)
    saved = analysis.savings(trials, run.settings["epochs"])
    facts = {
        f"best {run.metric} of the search": "-" if top is None else number(float(top[run.metric])),
        "trials": number(len(trials)),
        "search time": duration(float(run.epochs["wall_s"].max()) if len(run.epochs) else 0.0),
        "saved by early stopping": duration(float(saved["seconds_saved"].sum())),
    }
    items = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{items}</dl>'


def _best(run: Run, verdict: finalists.Verdict) -> str:
    if verdict.trial_id is None:
        return ""
    row = run.trials.set_index("trial_id").loc[verdict.trial_id]
    config = {name: _plain(row[f"config_{name}"]) for name in PARAMETERS}
    config |= {"epochs": run.settings["epochs"], "seed": run.settings["seed"]}
    words = "\n".join(map(text, yaml.safe_dump(config, sort_keys=False).splitlines()))
    button = '<button type="button" data-copy="config">Copy</button>'
    storage = run.settings.get("storage", "")  # of a run in a storage, the folder is only a copy on this machine
    place = joined(storage, run.settings["name"]) if is_uri(storage) else str(run.folder)
    return section(
        "best",
        f"Best configuration: {verdict.trial_id}",
        f'<div class="copy">{button}<pre id="config">{words}</pre></div>',
        note(
            "To test it, or the mean of the best trials, on the held-out test set: "
            f"python tuning/train_final.py {shlex.quote(place)}"
        ),
    )


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _progress() -> str:
    return section(
        "progress",
        "Progress of the search",
        figure("time", "metric against time, with the best so far"),
        note("Each point is a trial at its best epoch; the line is the best epoch of all trials so far."),
        figure("curves", "learning curves by status"),
        note("Learning curves of the trials, coloured by how they ended."),
    )


def _importance(run: Run, shares: pd.DataFrame) -> str:
    title, least = "Parameter importance", analysis.LEAST_RANKED
    if shares.empty:
        words = f"Not computed: importance needs at least {least} ended trials and two parameters."
        return section("importance", title, note(words))
    ended = int(analysis.searched(run.trials)["status"].isin(FINAL).sum())
    best = count(math.ceil(ended / 10), "trial")
    few = "" if ended >= 50 else f" Here the best 10% of {ended} trials is {best}, so take this as a hint only."
    return section(
        "importance",
        title,
        figure("importance", "importance of each parameter"),
        note(
            "PED-ANOVA importance: how much the values of a parameter among the best 10% of trials differ from those "
            "among all trials. It doesn't show which values are better. A parameter of low importance may still "
            f"matter: interactions between parameters, and values that were hardly tried, don't show.{few}"
        ),
        figure("rates", "learning rate against the metric"),
        note("Each point is a trial. Double-click a backbone in the legend to show it alone."),
    )


def _depths() -> str:
    words = "The best trial of each combination. head: only the classifier is trained; all: the whole network."
    return section(
        "depth",
        "Backbone and unfreeze depth",
        figure("depths", "the best trial of each backbone and depth"),
        note(f"{words} A combination that was tried once says little."),
    )


def _gap(run: Run) -> str:
    trials = analysis.searched(run.trials)
    rises = analysis.best_and_last(trials, run.epochs)
    heads = {"trials": "trials", "earlier": "best epoch not the last", "rise": "median change of val_loss"}
    return section(
        "gap",
        "Overfitting",
        figure("gap", "validation loss against training loss"),
        note(
            "Each point is a trial at its best epoch; both losses are measured without augmentation. Its distance "
            "above the line is the gap: val_loss minus the loss on training images."
        ),
        table(frames.overfitting(trials, run.metric), "Best trial by backbone and unfrozen layers"),
        table(frames.gaps(trials), "Median gap by augmentation (number of trials)"),
        table(rises[["unfrozen", *heads]].rename(columns=heads), "From a trial's best epoch to its last"),
        note("The last two tables are of trials of at least 2 epochs."),
    )


def _ended(run: Run) -> str:
    trials = analysis.searched(run.trials)
    rows = analysis.savings(trials, run.settings["epochs"]).round({"seconds_saved": 0})
    heads = {"epochs_saved": "epochs saved", "seconds_saved": "seconds saved"}
    return section(
        "ends",
        "How and when trials ended",
        figure("ends", "trials by status and number of epochs"),
        f"<p>{text(frames.early_stopping(trials, run.settings['epochs']))}</p>",
        table(rows.rename(columns=heads)),
        note("The table of all trials gives the reason for each."),
    )


def _costs() -> str:
    named = {"seconds": "seconds", "latency": "latency", "size": "trained parameters", "parameters": "parameters"}
    figures = "".join(figure(name, f"metric against {words}") for name, words in named.items())
    return section(
        "cost",
        "Performance against cost",
        f'<div class="pair">{figures}</div>',
        note(
            "The line is the Pareto front: the trials that no other trial beats in both. Cached outputs of frozen "
            "layers shorten the training time of a trial. Latency is that of the whole model for one image."
        ),
    )


def _errors(run: Run) -> str:
    rows = analysis.errors(run.trials).head(20).rename(columns={"example": "for example"})
    return section("errors", "Errors", table(rows)) if len(rows) else ""


def _finalists(run: Run, compared: pd.DataFrame) -> str:
    if compared.empty:
        return ""
    return section(
        "finalists",
        "Finalists",
        figure("finalists", "difference from the default with its confidence interval"),
        table(frames.finalists(compared)),
        note(
            f"The default and the finalists, retrained with the same seeds and compared by {run.metric} in one-sided "
            "paired t-tests; p-values and confidence intervals are corrected for the number of finalists (Holm). "
            "Selection bias: how much worse the mean is than the value in the search."
            if compared["runs"].any()
            else f"The default and the best trial, compared by {run.metric} on the same validation images; p-value and "
            "confidence interval are corrected for the choice among all trials. Neither was retrained."
        ),
    )


def _audit(run: Run) -> str:
    if run.audit is None or run.audit.empty:
        return "" if run.audit is None else section("audit", "Data audit", "<p>No findings.</p>")
    order = {"stop": 0, "warn": 1, "info": 2}
    audit = run.audit.sort_values("severity", key=lambda severity: severity.map(order), kind="stable")
    audit = audit.fillna({"path_a": "", "detail": ""})
    kinds = audit.groupby(["severity", "finding"], sort=False)
    first = {name: (name, "first") for name in ("detail", "p_value", "path_a")}
    counts = kinds.agg(rows=("finding", "size"), **first).reset_index()
    parts = [table(counts.rename(columns={"p_value": "p", "path_a": "for example"}))]
    for (_, finding), rows in kinds:
        if len(rows) == 1 and rows["path_b"].isna().all():
            continue  # all of it is in the table
        heads = {name: name.replace("_", " ") for name in rows if name != "finding" and rows[name].notna().any()}
        shown = table(rows.head(AUDIT_ROWS)[[*heads]].rename(columns=heads))
        shown += note(f"{AUDIT_ROWS} of {len(rows):,}; audit.parquet has all.") if len(rows) > AUDIT_ROWS else ""
        parts.append(f"<details><summary>{text(finding)} ({len(rows):,})</summary>{shown}</details>")
    return section("audit", "Data audit", *parts)


def _data(run: Run) -> str:
    images = counted(run.samples).reset_index()
    splits = [name for name in ("train", "val", "test") if name in images]
    several = is_multi_label(run.samples["label"])
    shown = table(images[["label", *splits]].rename(columns={"label": "label" if several else "class"}))
    folded = f"<details><summary>{len(images):,} {'labels' if several else 'classes'}</summary>{shown}</details>"
    words = note("An image may have several labels.") if several else ""
    return section("data", "Images", shown if len(images) <= CLASSES_SHOWN else folded, words)


def _table(run: Run) -> str:
    fixed = {name.removeprefix("config_"): _plain(run.trials[name].iloc[0]) for name in same(run)}
    words = ", ".join(f"{name} {value}" for name, value in fixed.items())
    many = f" The best {TRIALS_SHOWN:,} of {len(run.trials):,} are shown." if len(run.trials) > TRIALS_SHOWN else ""
    return section("trials", "All trials", '<div id="table"></div>', note(f"The same in all trials: {words}.{many}"))
