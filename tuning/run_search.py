"""Search: load, check, search, choose, report, in the order that the screen shows."""

if __name__ == "__main__":  # this folder would come first on the path, and its modules would shadow others
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import tyro
import yaml

from tuning.checks.audit import Checked, load_checked
from tuning.data.images import parallel_map, read_facts
from tuning.insight import analysis
from tuning.insight import verdict as finalists
from tuning.record import tables
from tuning.record.journal import Journal, Record, best_epoch
from tuning.record.mirror import Mirror, fetch, mirrored, run_folder
from tuning.record.storage import is_uri, isolated_nodes, joined, stored, unreadable
from tuning.record.track import check_installed, tracking
from tuning.settings.command_line import DONE, INTERRUPTED, NO_FINITE_LOSS, command_line, exit_code
from tuning.settings.config import RESUME_MAY_CHANGE, InputError, SearchPlan, build, without_secrets
from tuning.settings.documents import read_plan
from tuning.settings.space import Space, image_sizes
from tuning.settings.space import backbones as backbones_in
from tuning.settings.space_file import fix, load, parse
from tuning.show.progress import Progress, console, plain
from tuning.show.report import refresher, write_or_tell


@dataclasses.dataclass(frozen=True)
class Flags:
    """Search for the best way to fine-tune an image classifier.

    Example: python tuning/run_search.py --data chest_xrays/ --trials 24 --epochs 8 --set image_size=128 --name xray

    With no flags: the space `quick` on generated chest radiographs. Results go to results/NAME.
    """

    data: str | None = None
    """Folder of class folders (with or without train/val/test above them), or CSV or Parquet manifest."""
    space: str | None = None
    """Shipped space by name (quick, chest_xray), or a YAML file. Default: quick."""
    name: str | None = None
    """Name of the run and of its folder. Default: the space and the time."""
    trials: int | None = None
    """Start points and suggested trials. Default: what the space says."""
    epochs: int | None = None
    """Epochs of a trial that nothing ends early. Default: what the space says."""
    seed: int | None = None
    """Seed of the sampler and of every trial. Default: 0."""
    time_budget: str | None = None
    """End cleanly after this: 90s, 45m, 2h."""
    gpus_per_trial: float | Literal["auto"] | None = None
    """A fraction up to 1, a whole number, or auto: by measured memory. Default: 1, or 0 where there is no GPU."""
    cpus_per_trial: int | None = None
    """Threads of a trial. Default: 1, or the share of a GPU's cores."""
    concurrent: int | None = None
    """Trials at once. Default: as many as the resources allow."""
    storage: str | None = None
    """Folder that the run's folder is made in. Default: results."""
    resume: bool = False
    """Go on with the run that --name names."""
    early_stopping: bool = True
    """Without it ASHA, patience and the finite divergence rules are off, and each trial runs all its epochs."""
    set: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """Any setting of docs/settings.md: --set image_size=128 patience=3."""


def main() -> int:
    """Run the command line; returns the exit code."""
    return exit_code(lambda: run(tyro.cli(Flags)))


def run(flags: Flags) -> int:
    """Search as the flags say; returns the exit code.

    Raises:
        InputError: anything the user gave is wrong; no trial has started then.
    """
    # What is asked for.
    plan, space, folder = _resumed(flags) if flags.resume else _planned(flags)
    check_installed(plan.track)
    console.print(
        f"[bold]{plan.name}[/bold]: {plan.trials} trials of up to {plan.epochs} epochs, space {plain(plan.space)}"
    )

    # Ray starts meanwhile. It and torch take seconds to load, so bad flags are told first.
    from tuning.search.cluster import ray_running

    with mirrored(folder, plan.storage) as mirror, ray_running(plan) as nodes:
        return _search(flags, plan, space, folder, mirror, nodes)


def _search(
    flags: Flags,
    plan: SearchPlan,
    space: Space,
    folder: Path,
    mirror: Mirror | None,
    ray_nodes: Callable[[], list[tuple[int, float]]],
) -> int:
    # What it is to be done with. All of it is checked before anything is written.
    from tuning.search.cluster import cluster_map, serve_images, slots, small_shared_memories, small_shared_memory
    from tuning.search.driver import Search
    from tuning.show.summary import summarize
    from tuning.training import backbones
    from tuning.training.weights import find_weights

    weights = find_weights(backbones_in(space), plan.weights)
    journal = folder / "journal.jsonl"
    priors = [] if journal.exists() and journal.stat().st_size else _priors(plan, space)
    joining = "RAY_ADDRESS" in os.environ  # else Ray starts, on this machine, while images are decoded
    spread = False
    if joining:
        ray_nodes()
        spread = _checked_nodes(plan)
    recorded = tables.read_table(folder / "samples.parquet") if flags.resume else None
    data = _data(plan, space, recorded, map=cluster_map if spread else parallel_map)
    if flags.resume:
        _check_same_data(folder, plan, data.fingerprint)
    for backbone, file in weights.items():  # a damaged file or an image size that can't be is found here, not in trials
        size = image_sizes(space)[0]
        backbones.build(backbone, classes=2, image_size=size, head_dropout=0.0, seed=0, weights=file)

    # Search.
    nodes = ray_nodes()
    for told in small_shared_memories() if joining else filter(None, [small_shared_memory()]):
        console.print(told, markup=False)
    # Ray has laid a handler of its own over ours, which aborts the process 3 s after a SIGTERM.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    resources = slots(plan, nodes, grows=joining)
    if flags.resume:
        _write_yaml(folder / "plan.yaml", read_plan(folder) | {"settings": plan.model_dump()})
    else:
        write_run(folder, plan, space, data)
        if mirror is not None:
            mirror.push_first()
    at_most = "up to " if resources.packed or resources.waiting else ""
    what = f"{resources.gpus:g} GPU" if resources.gpus else f"{resources.cpus} core{'s' * (resources.cpus > 1)}"
    what = "a whole, a half or a quarter GPU" if resources.packed else what
    console.print(f"{at_most}{resources.count} trials at once, {what} each\n")
    _server = serve_images(data.folders.values()) if joining else None  # ends when nothing holds it
    trials_at_once = None if resources.packed or resources.waiting else resources.count
    provenance = read_plan(folder)["provenance"]
    show = Progress(plan, analysis.class_entropy(data.samples), trials_at_once)
    search = Search(
        plan,
        space,
        folder,
        images=data.folders,
        weights=weights,
        resources=resources,
        show=show,
        priors=priors,
        resumed=flags.resume,
        report=refresher(folder),
        redraw=provenance.get("val_drawn") is True,
        mirror=mirror,
        run_id=provenance["run_id"],
    )
    # Ends as Ctrl-C does, where Ray's handler would abort; only here, for Ray's start sets that one.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with tracking(search, provenance["run_id"]), show.watching(search):
        finished = search.run()
    if mirror is not None and mirror.taken is not None:
        raise InputError(mirror.taken)

    # Choose and report, from the tables alone.
    if mirror is not None:
        mirror.fetch_others()
        search.delete_checkpoints()
    trials = tables.read_table(folder / "trials.parquet")
    top = analysis.top(trials, plan.metric)
    ratio = finalists.val_over_train(data.samples)
    judged, verdict = finalists.judge(trials, plan.metric, val_over_train=ratio)
    tables.write_tables({"finalists": pa.Table.from_pandas(judged, schema=tables.FINALISTS)}, folder)
    if verdict.trial_id is not None:
        _write_best(folder, plan, search.record, trials, verdict, data.fingerprint)
    place = joined(plan.storage, plan.name)
    since = search.started_wall_s
    summarize(folder, place, plan, verdict, judged, halted=search.halted, slots=trials_at_once, since=since)
    if (report := write_or_tell(folder)) is not None:
        console.print(f"\nReport: {joined(place, report.name)}", markup=False)
    if not finished:
        console.print(f"\nInterrupted. To go on: {plan.resume_command}", markup=False)
        return INTERRUPTED
    # By a time budget shorter than an epoch.
    interrupted = (analysis.searched(trials)["status"] == "interrupted").all()
    return NO_FINITE_LOSS if top is None and not interrupted else DONE


def _checked_nodes(plan: SearchPlan) -> bool:
    """Whether all nodes can read the data, so that each decodes a part; where one doesn't, this one decodes all.

    Raises:
        InputError: results don't go to one place that this node and all others write.
    """
    from tuning.search.cluster import node_names, on_each_node

    names = node_names()
    place = plan.storage if is_uri(plan.storage) else f"file://{os.path.abspath(plan.storage)}"
    try:
        said = isolated_nodes(place, names, on_each_node)
        said = {node: why for node, why in said.items() if node in node_names()}  # others were lost meanwhile
    except OSError as error:
        raise InputError(f"--storage {plan.storage}: can't be written ({error}); are its keys given?") from None
    cure = "give --storage a folder or URI that all nodes reach, and each node the keys"
    if said:
        raise InputError(
            [f"--storage {plan.storage}: node {names.get(node, node)}: {why}; {cure}" for node, why in said.items()]
        )
    data = plan.data
    if data is None:
        return False
    blind = on_each_node(lambda node: unreadable(data))
    if blind:
        who = plain(", ".join(names.get(node, node) for node in blind))
        console.print(f"  {who} can't read it: images are decoded here, and sent there")
    return not blind


def _planned(flags: Flags) -> tuple[SearchPlan, Space, Path]:
    """Plan and space from the flags, the space's own settings and the defaults, in this order of precedence."""
    space = load(flags.space or "quick")
    given, overrides = _given(flags)
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", Path(flags.space or "quick").stem).lstrip("._-")
    settings = {"name": f"{stem or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}"} | _absolute(space.search) | given
    plan = build(SearchPlan, settings, "command line")
    folder = run_folder(plan.storage, plan.name)
    check_new(folder, plan)
    return plan, fix(space, overrides), folder


def _given(flags: Flags) -> tuple[dict[str, Any], dict[str, Any]]:
    settings = dataclasses.asdict(flags) | {"early_stopping": None if flags.early_stopping else False}
    named = {key: value for key, value in settings.items() if key not in ("resume", "set")}
    given, overrides = command_line(named, flags.set)
    return _absolute(given), overrides


def _absolute(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings whose paths hold in any folder: a run goes on from another one, and workers run elsewhere."""
    paths = {
        key: settings[key]
        for key in ("data", "weights", "warm_start")
        if settings.get(key) not in (None, "auto", "random")
    }
    url = settings.get("optuna_storage") or ""
    prefix = "sqlite:///" if url.startswith("sqlite:///") else ""
    if prefix or url.endswith(".log"):
        settings = settings | {"optuna_storage": prefix + os.path.abspath(url.removeprefix(prefix))}
    return settings | {
        key: path if is_uri(path) else os.path.abspath(os.path.expanduser(path)) for key, path in paths.items()
    }


def _resumed(flags: Flags) -> tuple[SearchPlan, Space, Path]:
    """Plan and space of the run that goes on; only a few settings may be given anew."""
    if flags.name is None:
        raise InputError("--resume: which run? give its --name")
    folder = run_folder(flags.storage or "results", flags.name)
    if flags.storage is not None and is_uri(flags.storage):
        fetch(folder, joined(flags.storage, flags.name))
    if not (folder / "plan.yaml").is_file():
        there = sorted(path.parent.name for path in folder.parent.glob("*/plan.yaml"))
        place = joined(flags.storage or "results", flags.name)
        raise InputError(f"--resume: there is no run {place}; runs there: {', '.join(there) or 'none'}")
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        raise InputError(f"--resume: no permission to write in {folder}")
    journal = folder / "journal.jsonl"
    if journal.exists():  # another search that writes this run is told of before Ray starts
        Journal(journal).close()
    plan_path = folder / "plan.yaml"
    document = read_plan(folder)
    # The default of what a resume may change is what a version did that didn't have it.
    missing = SearchPlan.model_fields.keys() - document["settings"].keys() - set(RESUME_MAY_CHANGE)
    if missing:
        cure = "go on with it by the version that began it, or start a run under another --name"
        raise InputError(f"--resume: {plan_path} is of an older version (without {', '.join(sorted(missing))}); {cure}")
    given, overrides = _given(flags)
    faults = []
    settings = document["settings"]
    if settings["name"] != flags.name:
        place = joined(joined(flags.storage or "results", flags.name), "plan.yaml")
        cure = "call its folder so again, and give that --name"
        raise InputError(f"--resume: {place} is that of the run {settings['name']!r}; {cure}")
    for key, value in given.items():
        if key not in (*RESUME_MAY_CHANGE, "storage", "space") and value != settings[key]:
            cure = "leave it out, or start a run under another --name"
            faults.append(f"--resume: {key} is {settings[key]!r} in this run, not {value!r}; {cure}")
    if flags.space is not None and fix(load(flags.space), overrides).document != document["space"]:
        faults.append(
            f"--resume: the space {flags.space} is not the one of this run; leave --space out, or start a new run"
        )
    for key, value in overrides.items():
        if document["space"].get("fixed", {}).get(key) != value:
            faults.append(f"--resume: {key} can't be changed in a run; leave it out, or start one under another --name")
    if faults:
        raise InputError(faults)
    changed = {key: value for key, value in given.items() if key in RESUME_MAY_CHANGE}
    changed["storage"] = flags.storage or "results"  # the run may have been moved
    plan = build(SearchPlan, settings | changed, str(folder / "plan.yaml"))
    return plan, parse(document["space"], str(folder / "plan.yaml")), folder


def check_new(folder: Path, plan: SearchPlan) -> None:
    """A new run's folder must not exist, and the one it is made in must be writable.

    Raises:
        InputError: one of them is not so.
    """
    if folder.exists() or (is_uri(plan.storage) and _in_storage(plan)):
        place = joined(plan.storage, plan.name)
        raise InputError(f"--name {plan.name}: {place} exists; go on with it by --resume, or choose another name")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=folder.parent).cleanup()
    except PermissionError:
        raise InputError(f"--storage {plan.storage}: no permission to write there; choose another") from None
    except OSError as error:
        raise InputError(f"--storage {plan.storage}: can't be made ({error.strerror}); choose another") from None


def _in_storage(plan: SearchPlan) -> bool:
    try:
        return stored([joined(joined(plan.storage, plan.name), "plan.yaml")]) != [None]
    except OSError as error:
        raise InputError(f"--storage {plan.storage}: can't be read ({error}); are its keys given?") from None


def _data(plan: SearchPlan, space: Space, recorded: pd.DataFrame | None, map: Callable[..., Any]) -> Checked:
    console.print(f"data: {plain(without_secrets(plan.data or 'generated chest radiographs'))}")
    started = time.perf_counter()
    data = load_checked(plan, image_sizes(space), table=recorded, map=map)
    for label, row in data.samples.groupby(["label", "split"]).size().unstack(fill_value=0).iterrows():
        console.print(f"  {plain(label)}: " + ", ".join(f"{count} {split}" for split, count in row.items()))
    audited = "decoded" if data.audit is None else "decoded, audited"
    console.print(f"  read, {audited} in {time.perf_counter() - started:.1f} s")
    for note in [*notes(data.samples, read_facts(next(iter(data.folders.values())))), *data.messages]:
        console.print(f"  {plain(note)}")
    return data


def notes(table: pd.DataFrame, facts: pd.DataFrame) -> list[str]:
    """What decoding has to tell, a line for each kind of note: how many images, an example, and the note."""
    told = pd.DataFrame({"path": table["path"], "note": facts["notes"].str.split("; ")}).explode("note").dropna()
    return [
        f"{count} image{'s' * (count > 1)} ({path}{', ...' * (count > 1)}): {note}"
        for note, count, path in told.groupby("note")["path"].agg(["size", "first"]).itertuples()
    ]


def _priors(plan: SearchPlan, space: Space) -> list[Any]:
    """What the sampler learns from another run."""
    if plan.warm_start is None:
        return []
    from tuning.search.optimizer import read_priors

    trials = tables.read_table(Path(plan.warm_start) / "trials.parquet")
    priors, outside = read_priors(trials, space, plan.metric, plan.warm_start_weight)
    console.print(f"warm start: {len(priors)} trials of {plain(plan.warm_start)}")
    if outside:
        console.print(f"  {outside} of its trials lie outside this space and are left out")
    return priors


def _check_same_data(folder: Path, plan: SearchPlan, fingerprint: str) -> None:
    if read_plan(folder)["provenance"]["fingerprint"] != fingerprint:
        cure = "put it back, or start a run under another --name"
        raise InputError(f"--resume: the data ({plan.data}) has changed since {plan.name} began; {cure}")


def write_run(folder: Path, plan: SearchPlan, space: Space, data: Checked) -> None:
    unfinished = folder.with_name(f".{folder.name}")  # renamed when it is whole: a half-made run would block its name
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    assert data.audit is not None  # new data is audited
    rows = pa.Table.from_pandas(data.samples[tables.SAMPLES.names], schema=tables.SAMPLES, preserve_index=False)
    tables.write_tables({"samples": rows, "audit": data.audit}, unfinished)
    provenance = {
        "run_id": uuid.uuid4().hex,
        "fingerprint": data.fingerprint,
        "val_drawn": "val" in data.samples.attrs["random_splits"],
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {
            name: metadata.version(name) for name in ("torch", "torchvision", "timm", "ray", "optuna", "numpy")
        },
    }
    document = {"settings": plan.model_dump(), "space": space.document, "provenance": provenance}
    _write_yaml(unfinished / "plan.yaml", document)
    unfinished.rename(folder)


def _write_yaml(path: Path, document: dict[str, Any]) -> None:
    with tables.replacing(path) as temporary:
        temporary.write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True))


def _git_commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        said = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # no git on this machine
        return None
    return said.stdout.strip() or None


def _write_best(
    folder: Path,
    plan: SearchPlan,
    record: Record,
    trials: pd.DataFrame,
    verdict: finalists.Verdict,
    fingerprint: str,
) -> None:
    trial = record.trials[str(verdict.trial_id)]
    runs = finalists.counted(trials[trials["finalist_of"] == trial.trial_id])
    provenance = {
        "run": plan.name,
        "trial_id": trial.trial_id,
        "verdict": verdict.verdict,
        "why": verdict.sentence,
        "metric": plan.metric,
        "best_epoch": dict(best_epoch(trial.rows, plan.metric) or {}),
        "best_epochs": [int(epoch) for epoch in runs["best_epoch"].dropna()],
        "fingerprint": fingerprint,
        "settings": plan.model_dump(),
    }
    _write_yaml(folder / "best.yaml", trial.config | {"provenance": provenance})


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # ends as Ctrl-C does
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # taking torch and its like down takes 1.4 s
