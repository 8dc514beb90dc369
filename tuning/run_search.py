"""Search: load, check, search, choose, report, in the order that the screen shows."""

import sys
from pathlib import Path

if __name__ == "__main__":  # the checkout comes first on the path, not this folder, whose modules would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pandas as pd
import pyarrow as pa
import tyro

from tuning.data.changes import changes, elsewhere
from tuning.data.images import held, parallel_map
from tuning.insight import analysis
from tuning.insight.best import write_best
from tuning.insight.guessing import guess_error
from tuning.insight.verdict import judged
from tuning.record import tables
from tuning.record.mirror import Mirror, borrowed, mirrored
from tuning.record.storage import is_uri, isolated_nodes, joined, unreadable
from tuning.record.targets import counted
from tuning.record.track import check_installed, tracking
from tuning.search.plans import (
    claimed,
    new_plan,
    other_packages,
    resumed_plan,
    within,
    without_effect,
    write_run,
    write_yaml,
)
from tuning.settings.command_line import (
    DONE,
    INTERRUPTED,
    NO_FINITE_LOSS,
    Pairs,
    command_line,
    endure,
    exit_code,
    flag,
    leave,
)
from tuning.settings.config import InputError, SearchPlan, visible, without_secrets
from tuning.settings.documents import read_plan
from tuning.settings.space import Space, backbones, image_sizes, largest, sizes_of_backbones
from tuning.settings.words import count, examples, nearest
from tuning.show.frames import duration
from tuning.show.progress import Progress, console, plain
from tuning.show.report import refresher, write_or_warn
from tuning.training.checking import Within, weights_checked

if TYPE_CHECKING:  # loaded, with SciPy, once Ray is starting
    from tuning.checks.audit import Checked

Nodes = Callable[[], list[tuple[int, float]]]  # waits for Ray; gives the cores and GPUs of each node
LOOK_SECONDS = 0.5  # between two looks for what a worker has found wrong, while images are decoded
DOWNLOAD_SECONDS = 10.0  # after which a search that only waits for weights says so


@dataclasses.dataclass(frozen=True)
class Flags:
    """Search for the best way to fine-tune an image classifier.

    Example: python tuning/run_search.py --data chest_xrays/ --trials 24 --epochs 8 --set image_size=128 --name xray

    With no flags, the space quick is searched on generated chest radiographs. Results are written to results/NAME.
    """

    data: Annotated[str | None, flag("data", "PATH")] = None
    space: Annotated[str | None, flag("space", "NAME|YAML")] = None
    name: Annotated[str | None, flag("name", "NAME")] = None
    trials: Annotated[int | None, flag("trials", "N")] = None
    epochs: Annotated[int | None, flag("epochs", "N")] = None
    seed: Annotated[int | None, flag("seed", "N")] = None
    time_budget: Annotated[str | None, flag("time_budget", "TIME")] = None
    gpus_per_trial: Annotated[float | Literal["auto"] | None, flag("gpus_per_trial", "N|auto")] = None
    device: Annotated[str | None, flag("device", "auto|cpu|cuda|mps")] = None
    cpus_per_trial: Annotated[int | None, flag("cpus_per_trial", "N")] = None
    concurrent: Annotated[int | None, flag("concurrent", "N")] = None
    storage: Annotated[str | None, flag("storage", "FOLDER|URI")] = None
    resume: bool = False
    """Resume the run that --name gives. Only trials, resources, finalist_epochs, the two time limits, tracking and
    the place of the same data can be changed."""
    early_stopping: bool = True
    """End trials early. With --no-early-stopping only a non-finite loss ends one; there are no probes or finalists."""
    set: Annotated[Pairs, tyro.conf.arg(metavar="KEY=VALUE ...")] = ()
    """Any setting of docs/settings.md, such as --set image_size=128 patience=3."""


def main() -> int:
    """Run the command line; return the exit code."""
    endure()
    return exit_code(lambda: run(tyro.cli(Flags, config=(tyro.conf.DisallowNone,))))


def run(flags: Flags) -> int:
    """Search as the flags say; return the exit code.

    Raises:
        InputError: wrong input; no trial has started.
    """
    with ExitStack() as claims:
        plan, space, folder = planned(flags)
        while not flags.resume and not claims.enter_context(claimed(folder)):
            if flags.name is not None:
                raise InputError(f"--name {flags.name}: another search is starting under this name; choose another")
            time.sleep(0.1)
            plan, space, folder = planned(flags)  # named after a later second
        return _started(plan, space, folder, flags.resume)


def _started(plan: SearchPlan, space: Space, folder: Path, resumed: bool) -> int:
    check_installed(plan.track)
    trials, epochs = count(plan.trials, "trial"), count(plan.epochs, "epoch")
    within_time = "" if plan.time_budget is None else f", in at most {duration(plan.time_budget)}"
    console.print(f"[bold]{plan.name}[/bold]: {trials} of up to {epochs}{within_time}, space {plain(plan.space)}")
    if (bounded := within(space, plan)).trials < plan.trials:
        all_of_it = count(bounded.trials, "configuration")
        console.print(f"  the space has {all_of_it} in all: the search ends when each has been tried once")
        plan = bounded
    left = plan.trials - len(space.start)
    if (tried := min(len(space.enqueue), left)) > 0:
        console.print(f"  after the start points: {count(tried, 'configuration')} that the space enqueues")
    if (tried := min(len(space.portfolio), left - len(space.enqueue))) > 0:
        known = f"up to {count(tried, 'configuration')} of the portfolio, which did well on other data"
        console.print(f"  after the start points: {known}")
    for words in without_effect(space, plan):
        console.print(f"  {words}")

    # Ray starts in the background, and so does the check. Both take seconds, so wrong flags are reported before.
    from tuning.search.cluster import loading_ahead, ray_running
    from tuning.search.gpus import gpus_checked

    sizes = sizes_of_backbones(space)
    checked = {name: sizes[name] for name in backbones(space)}
    if unused := [] if isinstance(plan.weights, str) else [name for name in plan.weights if name not in checked]:
        raise InputError(f"weights: {unused[0]} is no backbone of the space{nearest(unused[0], checked)}")
    with (
        mirrored(folder, plan.storage) as mirror,
        weights_checked(checked, plan.weights, by_worker=loading_ahead(plan) > 0) as weights,
        ray_running(plan) as nodes,
        gpus_checked(plan, nodes) as gpus,
    ):
        return _search(plan, space, folder, mirror, nodes, gpus, weights, resumed)


def planned(flags: Flags) -> tuple[SearchPlan, Space, Path]:
    """Return the plan, the space and the run's folder that the flags ask for; wrong input raises InputError."""
    named = dataclasses.asdict(flags) | {"early_stopping": None if flags.early_stopping else False}
    del named["resume"], named["set"]
    found = (resumed_plan if flags.resume else new_plan)(*command_line(named, flags.set))
    gpus = found[0].gpus_per_trial
    if isinstance(gpus, float) and gpus > 1:  # as runs of older versions may have
        raise InputError(f"--gpus-per-trial {gpus:g}: give at most 1, since a trial trains on one GPU")
    return found


def _search(
    plan: SearchPlan,
    space: Space,
    folder: Path,
    mirror: Mirror | None,
    nodes: Nodes,
    gpus: Callable[[], list[str]],
    weights_within: Within,
    resumed: bool,
) -> int:
    from tuning.search.cluster import cluster_map, serve_images, slots, small_shared_memories, small_shared_memory
    from tuning.search.driver import BUDGET_USED, Search
    from tuning.search.optimizer import check_study
    from tuning.show.summary import summarize
    from tuning.training.digests import digests

    # Load and check. Nothing is written until all of it has been checked.
    if plan.optuna_storage is not None:
        check_study(plan.optuna_storage, plan.name, read_plan(folder)["provenance"]["run_id"] if resumed else None)
    journal = folder / "journal.jsonl"
    priors = [] if journal.exists() and journal.stat().st_size else _priors(plan, space)
    joining = "RAY_ADDRESS" in os.environ  # else Ray starts on this machine, while images are decoded
    spread = joining and _all_nodes_read(plan, nodes)
    recorded = _recorded_samples(folder, plan) if resumed else None
    mapped = cluster_map if spread else parallel_map
    data = _data(plan, space, recorded, map=lambda *given: map(_unless_wrong(weights_within), mapped(*given)))
    trained_on, batch = int((data.samples["split"] == "train").sum()), largest(space, "batch_size")
    if batch > trained_on:
        console.print(
            f"  batch_size={batch:g}: of {count(trained_on, 'training image')} a batch has at most {trained_on}"
        )
    if (answer := weights_within(DOWNLOAD_SECONDS)) is None:
        console.print("  waiting for the backbones' weights")
        while (answer := weights_within(DOWNLOAD_SECONDS)) is None:
            pass
    weights, lines = answer
    for line in lines:
        console.print(f"  {visible(line)}", markup=False)
    of_weights = digests(weights)
    if resumed:
        _check_unchanged(plan, read_plan(folder)["provenance"], data.fingerprint, of_weights)

    # Search.
    nodes()  # waits for Ray
    for warning in small_shared_memories() if joining else filter(None, [small_shared_memory()]):
        console.print(warning, markup=False)
    for line in gpus():
        console.print(line, markup=False)
    # Ray has replaced our handler by its own, which aborts the process 3 s after a SIGTERM.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    resources = slots(plan, nodes(), grows=joining)
    if resumed:
        recorded_plan = read_plan(folder)
        if plan.data != recorded_plan["settings"]["data"]:
            tables.write_tables({"samples": tables.samples_table(data.samples)}, folder)
        write_yaml(folder / "plan.yaml", recorded_plan | {"settings": plan.model_dump()})
    else:
        write_run(folder, plan, space, data.samples, data.audit, data.fingerprint, of_weights)
        if mirror is not None:
            mirror.push_first()
    varies = resources.packed or resources.waiting
    each = f"{resources.gpus:g} GPU" if resources.gpus else count(resources.cpus, "core")
    each = "a whole, a half or a quarter GPU" if resources.packed else each
    console.print(f"{'up to ' if varies else ''}{count(resources.count, 'concurrent trial')}, {each} each\n")
    _server = serve_images(data.folders.values()) if joining else None  # ends when nothing refers to it
    concurrent = None if varies else resources.count
    provenance = read_plan(folder)["provenance"]
    show = Progress(plan, analysis.class_entropy(data.samples), guess_error(data.samples), concurrent)
    search = Search(
        plan,
        space,
        folder,
        images=data.folders,
        weights=weights,
        digests=of_weights,
        resources=resources,
        show=show,
        priors=priors,
        report=refresher(folder),
        redraw=provenance.get("val_drawn") is True,
        mirror=mirror,
        run_id=provenance["run_id"],
    )
    # A SIGTERM ends the search as Ctrl-C does; set here, since Ray sets its handler as it starts.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with held(data.folders.values()), tracking(search, provenance["run_id"]), show.watching(search):
        finished = search.run()
    if mirror is not None and mirror.taken is not None:
        raise InputError(mirror.taken)

    # Choose and report, from the tables alone.
    if mirror is not None:
        mirror.fetch_others()
        search.delete_checkpoints()
    trials = tables.read_table(folder / "trials.parquet")
    compared, verdict = judged(
        folder, trials, data.samples, plan.metric, val_drawn=provenance.get("val_drawn") is not False
    )
    tables.write_tables({"finalists": pa.Table.from_pandas(compared, schema=tables.FINALISTS)}, folder)
    if verdict.trial_id is not None:
        write_best(folder, plan, search.record.trials[verdict.trial_id], trials, verdict, provenance)
    place, since = joined(plan.storage, plan.name), search.started_wall_s
    summarize(folder, place, plan, verdict, compared, halted=search.halted, slots=concurrent, since=since)
    if (report := write_or_warn(folder)) is not None:
        console.print(f"\nReport: {joined(place, report.name)}", markup=False)
    if search.halted == BUDGET_USED:
        console.print(f"\nTo continue for as long again: {plan.resume_command}", markup=False)
    if not finished:
        console.print(f"\nInterrupted. To resume: {plan.resume_command}", markup=False)
        return INTERRUPTED
    # A time budget shorter than an epoch interrupts all trials.
    interrupted = (analysis.searched(trials)["status"] == "interrupted").all()
    return NO_FINITE_LOSS if analysis.top(trials, plan.metric) is None and not interrupted else DONE


def _all_nodes_read(plan: SearchPlan, nodes: Nodes) -> bool:
    """Return whether all nodes can read the data, so that each decodes a part; else this node decodes all.

    Raises:
        InputError: the nodes don't share the storage.
    """
    from tuning.search.cluster import node_names, on_each_node

    nodes()  # waits for Ray
    names = node_names()
    place = plan.storage if is_uri(plan.storage) else f"file://{os.path.abspath(plan.storage)}"
    try:
        isolated = isolated_nodes(place, names, on_each_node)
    except OSError as error:
        cure = "is the storage reachable, and are its keys set?"
        raise InputError(f"--storage {plan.storage}: can't be written ({error}); {cure}") from None
    alive = node_names()  # some may have died meanwhile
    if faults := [f"node {names.get(node, node)}: {why}" for node, why in isolated.items() if node in alive]:
        cure = "give --storage a folder or URI that all nodes reach, and each node its keys"
        raise InputError(f"--storage {plan.storage}: {'; '.join(faults)}; {cure}")
    data = plan.data
    if data is None:
        return False
    blind = on_each_node(lambda node: unreadable(data))
    if blind:
        found = plain(", ".join(names.get(node, node) for node in blind))
        shown = plain(without_secrets(data))
        console.print(f"  {found} can't read {shown}: its images are decoded on this node, and sent there")
    return not blind


def _data(plan: SearchPlan, space: Space, recorded: pd.DataFrame | None, map: Callable[..., Any]) -> "Checked":
    from tuning.checks.audit import load_checked

    console.print(f"data: {plain(without_secrets(plan.data or 'generated chest radiographs'))}")
    started = time.perf_counter()
    data = load_checked(plan, image_sizes(space), table=recorded, map=map)
    for label, row in counted(data.samples).iterrows():
        console.print(f"  {plain(label)}: " + ", ".join(f"{images} {split}" for split, images in row.items()))
    audited = "decoded" if data.audit is None else "decoded, audited"
    console.print(f"  read, {audited} in {time.perf_counter() - started:.1f} s")
    for note in data.messages:
        console.print(f"  {plain(note)}")
    return data


def _unless_wrong(weights_within: Within) -> Callable[[Any], Any]:
    """Return a function that gives back what it is given, or raises InputError once a worker has found it."""
    due = time.monotonic()

    def passed(item: Any) -> Any:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + LOOK_SECONDS
            weights_within(0.0)
        return item

    return passed


def _recorded_samples(folder: Path, plan: SearchPlan) -> pd.DataFrame:
    """Return the samples of a run to resume, with the files of the place that --data gives anew."""
    recorded = tables.read_table(folder / "samples.parquet")
    anew = "or start a new run under another --name"
    started = read_plan(folder)
    listing = started["provenance"].get("listing")
    if plan.data is None or plan.data == started["settings"]["data"]:
        if changed := changes(recorded, plan, listing):
            what = f"{plan.data} has changed since {plan.name} started: {changed}"
            raise InputError(f"--resume: {what}; restore it, {anew}")
        return recorded
    try:
        return elsewhere(recorded, plan, listing)
    except InputError as error:
        cure = f"give the place that all images of the run were moved to, {anew}"
        raise InputError([f"--data {fault}; {cure}" for fault in error.faults]) from None


def _check_unchanged(
    plan: SearchPlan, provenance: dict[str, Any], fingerprint: str, weights: dict[str, str | None]
) -> None:
    """Raise InputError if data or weights differ from the run's; print which packages do."""
    from tuning.training.digests import other_weights

    anew = "or start a new run under another --name"
    if provenance["fingerprint"] != fingerprint:
        what = (
            "of the generated radiographs, which processors draw differently,"
            if plan.data is None
            else f"({plan.data})"
        )
        raise InputError(f"--resume: the data {what} has changed since {plan.name} started; restore it, {anew}")
    if other := other_weights(weights, provenance.get("weights")):
        what = f"the pretrained weights of {examples(other)} have changed since {plan.name} started"
        raise InputError(f"--resume: {what}; restore them, {anew}")
    if packages := other_packages(provenance):
        console.print(f"  other versions than when the run started: {', '.join(packages)}; new trials may differ")


def _priors(plan: SearchPlan, space: Space) -> list[Any]:
    """Return what the sampler learns from another run."""
    if plan.warm_start is None:
        return []
    from tuning.search.optimizer import STARTUP_TRIALS, read_priors

    with borrowed(plan.warm_start, without=("checkpoints/", "predictions/")) as run:
        trials = tables.read_table(run / "trials.parquet")
    priors, outside, otherwise = read_priors(trials, space, plan.metric, plan.warm_start_weight)
    without = f" ({outside} more are outside this space, and are left out)" if outside else ""
    console.print(f"warm start: {count(len(priors), 'trial')} of {plain(plan.warm_start)}{without}")
    if otherwise:
        other = examples(f"{name} of {trials}" for name, trials in otherwise.items())
        console.print(f"  whose {other} had another value than is fixed here")
    if len(priors) < STARTUP_TRIALS and plan.sampler == "tpe":
        few = f"of {STARTUP_TRIALS} trials that TPE needs; until it knows the others, suggestions are random"
        console.print(f"  these are {len(priors)} {few}")
    return priors


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # ends as Ctrl-C does
    leave(main())
