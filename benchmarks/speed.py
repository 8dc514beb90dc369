"""How fast the search trains fixed configurations, against a plain recipe and against the arithmetic alone.

- recipe: `recipe.py`, Ray Tune and torchvision as their documentation shows them.
- product: `tuning/run_search.py --no-early-stopping` on the same configurations as start points, with an empty cache.
- before: the product at another commit of this repository.
- floor: measured seconds of the layers that have to run, see `floor_seconds`.

The sides run in the order of --sides on one half of the configurations, then in the reverse order on the other, so a
machine that grows slower or faster favours none. Each part is kept in --out as JSON and not run again. Seconds of a
trial are those of its epochs; wall seconds are those of the whole command, imports and all.
"""

if __name__ == "__main__":  # this folder would come first on the path, and its modules would shadow others
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
import yaml
from torch.nn import functional

from tuning.data.phantoms import write_phantoms
from tuning.data.samples import load_samples
from tuning.record.journal import read_journal
from tuning.record.tables import read_table, replacing
from tuning.settings import config
from tuning.settings.config import InputError, TrialConfig
from tuning.settings.values import DEPTH_ALL, Weights
from tuning.training import backbones
from tuning.training.depthwise import speed_up
from tuning.training.device import keep_memory
from tuning.training.folding import fold
from tuning.training.prefix import split
from tuning.training.weights import find_weights

ROOT = Path(__file__).resolve().parent.parent
BACKBONES = ("tf_efficientnet_lite0", "tf_efficientnet_lite1")
POLICIES = ("light", "medium", "none")
FIXED = {"batch_size": 32, "optimizer": "adamw", "schedule": "cosine", "warmup_epochs": 0.5}
WARM_BATCHES, MEASURED_BATCHES, ROUNDS = 2, 5, 3  # of the floor
LOSS_TOLERANCE = 0.15  # nats; two seeds of a head-only configuration on the generated images were up to 0.12 apart
Part = dict[str, Any]
Trial = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Flags:
    """Compare the search's speed with a plain recipe's, on the same configurations."""

    data: str | None = None
    """Folder of class folders, or manifest. Default: generated chest radiographs."""
    configs: int = 16
    """Configurations, spread over depths, backbones and augmentation policies."""
    epochs: int = 6
    """Epochs of each."""
    image_size: int = 128
    """Side in pixels."""
    out: str | None = None
    """Folder of the parts' results; parts that are there are not run again. Default: a new temporary folder."""
    slots: int = 2
    """Trials at once, each on one core."""
    sides: tuple[Literal["recipe", "before", "product"], ...] = ("recipe", "product")
    """Sides: recipe, before, product."""
    commit: str = "9b2477d"
    """Commit of the side `before`."""
    json: str | None = None
    """File for the figures as JSON."""


def configs(count: int) -> list[dict[str, Any]]:
    """Configurations spread evenly over the depths 0 to 5; even and odd ones are the two halves of the benchmark.

    From 13 on a half has the same head-only configuration twice but for its learning rate, so the views of the first
    serve the second; from 8 on there is a head-only one without augmentation. A half begins with its first, so that
    those views are there in time, and goes on with the deepest, so that no slot stands idle for long at its end.
    """
    chosen = []
    for place, half in (divmod(number, 2) for number in range(count)):
        depth = (place + 3 * half) % (DEPTH_ALL + 1)
        chosen.append(
            {
                "backbone": BACKBONES[place % 2],
                "unfreeze_depth": depth,
                "learning_rate": (3e-4 if depth else 1e-3) * 0.5 ** (place // (DEPTH_ALL + 1)),
                "augmentation": POLICIES[(place + 2 * half) % 3],
            }
        )
    for half in (0, 1):
        chosen[half + 2 :: 2] = sorted(chosen[half + 2 :: 2], key=lambda trial: -trial["unfreeze_depth"])
    return chosen


# ---- recipe and product ----------------------------------------------------------------------------------------------


def trial_config(chosen: dict[str, Any], flags: Flags) -> TrialConfig:
    """A whole configuration.

    Raises:
        InputError: `--image-size` or `--epochs` makes no sense.
    """
    values = chosen | FIXED | {"image_size": flags.image_size, "epochs": flags.epochs}
    return config.build(TrialConfig, values, "command line")


def run_recipe(folder: Path, flags: Flags, data: str, chosen: list[dict[str, Any]]) -> Part:
    """The recipe on one half."""
    trials = [trial_config(trial, flags).model_dump() for trial in chosen]
    (folder / "task.json").write_text(json.dumps({"data": data, "slots": flags.slots, "trials": trials}))
    # Ray's workers import `tuning` too.
    environment = {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    part = timed(["benchmarks/recipe.py", str(folder / "task.json")], folder, environment)
    rows = {row["number"]: row["epochs"] for row in json.loads((folder / "rows.json").read_text())}
    return part | {"trials": [{"config": trial, "epochs": rows[number]} for number, trial in enumerate(chosen)]}


def timed(command: list[str], folder: Path, environment: dict[str, str], root: Path = ROOT) -> Part:
    """Run a checkout's script, its output in `folder/log.txt`; when it started (Unix seconds) and how long it took."""
    command = [sys.executable, *command]
    started, clock = time.time(), time.perf_counter()
    with open(folder / "log.txt", "w") as log:
        code = subprocess.run(command, cwd=root, env=os.environ | environment, stdout=log, stderr=log).returncode
    if code:
        raise SystemExit(f"{folder / 'log.txt'}: exit status {code}\n{(folder / 'log.txt').read_text()[-2000:]}")
    return {"started": started, "wall_s": time.perf_counter() - clock}


def space(chosen: list[dict[str, Any]], image_size: int) -> dict[str, Any]:
    """A search space whose start points are these configurations."""
    parameters = {
        "backbone": {"type": "categorical", "choices": list(BACKBONES)},
        "unfreeze_depth": {"type": "int", "low": 0, "high": DEPTH_ALL},
        "learning_rate": {"type": "float", "low": 1e-6, "high": 1e-1, "log": True},
        "augmentation": {"type": "categorical", "choices": list(POLICIES)},
    }
    return {"parameters": parameters, "fixed": FIXED | {"image_size": image_size}, "start": chosen}


def run_before(folder: Path, flags: Flags, data: str, chosen: list[dict[str, Any]]) -> Part:
    """The product at another commit on one half."""
    archive = folder / "tree.tar"
    subprocess.run(["git", "archive", "--output", archive, flags.commit], cwd=ROOT, check=True)
    shutil.unpack_archive(archive, folder / "tree")
    return run_product(folder, flags, data, chosen, root=folder / "tree")


def run_product(folder: Path, flags: Flags, data: str, chosen: list[dict[str, Any]], *, root: Path = ROOT) -> Part:
    """The product on one half, with a cache that is empty at first."""
    (folder / "space.yaml").write_text(yaml.safe_dump(space(chosen, flags.image_size)))
    command = ["tuning/run_search.py", "--no-early-stopping", "--space", str(folder / "space.yaml")]
    command += ["--trials", str(len(chosen)), "--epochs", str(flags.epochs), "--concurrent", str(flags.slots)]
    command += ["--data", data, "--storage", str(folder), "--name", "run"]
    part = timed(command, folder, {"FINETUNE_SEARCH_CACHE": str(folder / "cache"), "PYTHONPATH": str(root)}, root)

    events = read_journal(folder / "run" / "journal.jsonl")
    epochs = read_table(folder / "run" / "epochs.parquet")
    epochs["clock"] = [events[seq - 1]["time"] for seq in epochs["seq"]]
    trials = []
    for row in read_table(folder / "run" / "trials.parquet").sort_values("number").to_dict("records"):
        rows = json.loads(epochs[epochs["trial_id"] == row["trial_id"]].to_json(orient="records"))
        times = {name: row[name].timestamp() for name in ("started_at", "ended_at")}
        trials.append({"config": chosen[row["number"]], "epochs": rows, "status": row["status"], **times})
    return part | {"trials": trials}


# ---- floor ------------------------------------------------------------------------------------------------------


def run_floor(flags: Flags, data: str) -> Part:
    """Seconds a batch takes in each part of each network, by "backbone depth"; all slots measure at the same time."""
    table = load_samples(data)
    train, val = (int((table["split"] == name).sum()) for name in ("train", "val"))
    weights = find_weights(BACKBONES, "auto")
    trials = [trial_config(chosen, flags) for chosen in configs(flags.configs)]
    distinct = {f"{trial.backbone} {trial.unfreeze_depth}": trial for trial in trials}
    tasks = [(trial, table["label"].nunique(), train, weights[trial.backbone]) for trial in distinct.values()]
    context = multiprocessing.get_context("spawn")
    with context.Pool(flags.slots, context.Barrier(flags.slots).wait) as pool:
        slots = pool.map(measure, [tasks] * flags.slots, chunksize=1)
    costs = {
        name: {key: statistics.fmean(cost[key] for cost in measured) for key in measured[0]}
        for name, measured in zip(distinct, zip(*slots, strict=True), strict=True)
    }
    return {"costs": costs, "images": len(table), "train": train, "val": val}


def measure(tasks: list[tuple[TrialConfig, int, int, Path | None]]) -> list[dict[str, float]]:
    """`batch_seconds` of each task, on one thread, with memory kept at hand: the least of some rounds through all."""
    torch.set_num_threads(1)
    keep_memory()
    rounds = [[batch_seconds(*task) for task in tasks] for _ in range(ROUNDS)]
    return [{key: min(cost[key] for cost in costs) for key in costs[0]} for costs in zip(*rounds, strict=True)]


def batch_seconds(trial: TrialConfig, classes: int, train: int, weights: Weights | None) -> dict[str, float]:
    """Seconds that a batch of random images takes in frozen layers, in a training step and in evaluation."""
    size, depth = trial.image_size, trial.unfreeze_depth
    model = backbones.build(trial.backbone, classes=classes, image_size=size, head_dropout=0.0, seed=0, weights=weights)
    speed_up(model)
    stages = backbones.stages(model, size)
    fold(model, stages, size)
    backbones.unfreeze(model, stages, depth, batch_norm=trial.batch_norm)
    rates = {name: getattr(trial, name) for name in ("learning_rate", "stage_lr_decay", "weight_decay")}
    optimizer = torch.optim.AdamW(backbones.parameter_groups(model, stages, depth, **rates), fused=True)
    images = torch.randn(min(trial.batch_size, train), 3, size, size).contiguous(memory_format=torch.channels_last)
    targets = torch.randint(classes, (len(images),))

    cut = split(model, stages, depth, size)
    prefix, suffix = (lambda images: images, model) if cut is None else (cut.prefix, cut.suffix)
    backbones.train_mode(model)
    features = prefix(images)

    def step() -> None:
        loss = functional.cross_entropy(suffix(features), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    seconds = {"prefix": median_seconds(lambda: prefix(images)), "step": median_seconds(step)}
    with backbones.evaluating(model):
        return seconds | {"evaluate": median_seconds(lambda: suffix(features))}


def median_seconds(call: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(WARM_BATCHES + MEASURED_BATCHES):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM_BATCHES:])


def floor_seconds(chosen: list[dict[str, Any]], costs: dict[str, Any], *, epochs: int, train: int, val: int) -> float:
    """Core seconds of the network's arithmetic that configurations can't do without if all frozen outputs are shared.

    Counted, in batches of min(32, train) images:
    - each configuration, each epoch: forward, backward and optimizer step of the trained layers on train // batch
      batches, and their forward pass in eval mode on validation and as many training images;
    - each backbone and policy, each epoch (once in all for `none`): one pass of the augmented train // batch batches
      through the largest frozen part that any of its configurations has;
    - each backbone and depth, once: validation and as many training images through the frozen part.
    Not counted: reading, decoding, augmenting, the loss's bookkeeping, keeping and fetching frozen outputs, start-up.
    """
    batch = min(FIXED["batch_size"], train)
    steps, evaluated = train // batch, (val + min(val, train)) / batch
    seconds, frozen, views = 0.0, {}, {}
    for trial in chosen:
        key = f"{trial['backbone']} {trial['unfreeze_depth']}"
        cost = costs[key]
        seconds += epochs * (steps * cost["step"] + evaluated * cost["evaluate"])
        frozen[key] = evaluated * cost["prefix"]
        view, passes = (trial["backbone"], trial["augmentation"]), 1 if trial["augmentation"] == "none" else epochs
        views[view] = max(views.get(view, 0.0), passes * steps * cost["prefix"])
    return seconds + sum(frozen.values()) + sum(views.values())


# ---- report -----------------------------------------------------------------------------------------------------


def seconds_of(trial: Trial, first_epoch: int = 1) -> float:
    return math.fsum(row["seconds"] for row in trial["epochs"] if row["epoch"] >= first_epoch)


def ratio(recipe: float, product: float) -> float:
    return recipe / product if product else math.nan


def start_up(part: Part) -> float:
    """Seconds from the command's start to the end of the first epoch, less that epoch's own."""
    ends = [(row["clock"], row["seconds"]) for trial in part["trials"] for row in trial["epochs"]]
    clock, seconds = min(ends, default=(math.nan, math.nan))
    return clock - part["started"] - seconds


def utilisation(parts: list[Part], slots: int) -> float:
    """Share of the slots' time that is training, from the first trial's start to the last one's start.

    A trial's epochs are taken to be spread evenly between its start and its end. Not a number where no trial waited.
    """
    busy = available = 0.0
    for trials in (part["trials"] for part in parts if len(part["trials"]) > slots):
        first, last = (pick(trial["started_at"] for trial in trials) for pick in (min, max))
        available += slots * (last - first)
        for trial in trials:
            inside = min(trial["ended_at"], last) - trial["started_at"]
            busy += seconds_of(trial) * inside / (trial["ended_at"] - trial["started_at"])
    return busy / available if available else math.nan


def tolerance(*trials: Trial) -> float:
    """Seed noise allowed between final val_losses: 0.15 nats, or three times either's step from its last epoch but one.

    The two sides draw other batches and other augmentations, so they agree no better than two seeds do. A trial whose
    loss still jumps from epoch to epoch says by how much its last value is a matter of chance.
    """
    losses = [[row["val_loss"] for row in trial["epochs"][-2:]] for trial in trials]
    jumps = [abs(pair[0] - pair[1]) for pair in losses if len(pair) == 2 and None not in pair]
    return max(LOSS_TOLERANCE, 3 * max(jumps, default=0.0))


def faults(trials: dict[str, Trial], epochs: int) -> list[str]:
    """What makes the comparison of one configuration invalid; its trials by side."""
    counts = {side: len(trial["epochs"]) for side, trial in trials.items()}
    short = [f"{side} trained {count} of {epochs} epochs" for side, count in counts.items() if count != epochs]
    if short:
        return short
    ours, found = trials["product"], []
    for side, theirs in trials.items():
        if side == "product":
            continue
        losses, allowed = (final_loss(theirs), final_loss(ours)), tolerance(theirs, ours)
        if not abs(losses[0] - losses[1]) <= allowed:  # also where one is not a number
            of = f"{losses[0]:.4f} of {side} and {losses[1]:.4f} of product"
            found.append(f"final val_loss {of} are over {allowed:.4f} apart")
    return found


def final_loss(trial: Trial) -> float:
    losses = [row["val_loss"] for row in trial["epochs"]]
    return math.nan if not losses or losses[-1] is None else losses[-1]


def note(trials: dict[str, Trial]) -> str:
    """What a head-only configuration shows of kept frozen outputs."""
    product = trials["product"]
    if product["config"]["unfreeze_depth"] or not product["epochs"]:
        return ""
    if product["config"]["augmentation"] == "none" and "recipe" in trials:
        return f"{ratio(seconds_of(trials['recipe'], 2), seconds_of(product, 2)):.1f}x from epoch 2 on"
    return "views from the cache" if product["epochs"][0].get("cache_hits") else ""


def table_lines(rows: list[dict[str, Trial]]) -> list[str]:
    """A line for each configuration: seconds, ratios to the product's and final losses of its trials by side."""
    sides = list(rows[0])
    others = [side for side in sides if side != "product"]
    head = [f"{f'{side} s':>10}" for side in sides] + [f"{f'{side}/product':>15}" for side in others]
    lines = [f"    depth  backbone               policy{''.join(head)}  final val_loss"]
    for number, trials in enumerate(rows):
        chosen = trials["product"]["config"]
        seconds = {side: seconds_of(trial) for side, trial in trials.items()}
        cells = [f"{seconds[side]:>10.1f}" for side in sides]
        cells += [f"{ratio(seconds[side], seconds['product']):>14.2f}x" for side in others]
        losses = "  ".join(f"{final_loss(trials[side]):.4f}" for side in sides)
        lines.append(
            f"{number:>3} {chosen['unfreeze_depth']:>5}  {chosen['backbone']}  {chosen['augmentation']:<6}"
            f"{''.join(cells)}  {losses}  {note(trials)}".rstrip()
        )
    return lines


def totals(parts: dict[str, list[Part]]) -> dict[str, dict[str, Any]]:
    """Wall seconds, the sum of the trials' seconds and start-ups of each side."""
    return {
        side: {
            "wall_s": sum(part["wall_s"] for part in halves),
            "trials_s": sum(seconds_of(trial) for part in halves for trial in part["trials"]),
            "start_up_s": [start_up(part) for part in halves],
        }
        for side, halves in parts.items()
    }


def summary_lines(parts: dict[str, list[Part]], floor_s: float, slots: int) -> list[str]:
    """Totals of the sides, each by its parts; `floor_s` in wall seconds."""
    found, used = totals(parts), utilisation(parts["product"], slots)
    ours = found["product"]
    lines = []
    for title, name in (("wall", "wall_s"), ("trials' sum", "trials_s")):
        told = [f"{side} {each[name]:.1f} s" for side, each in found.items()]
        ratios = [f"{ratio(each[name], ours[name]):.2f}x" for side, each in found.items() if side != "product"]
        lines.append(f"{title:<13} {', '.join(told)}: {', '.join(ratios)}")
    starts = [f"{side} {', '.join(f'{start:.1f}' for start in each['start_up_s'])} s" for side, each in found.items()]
    return [
        *lines,
        f"start-up      {'; '.join(starts)}",
        f"floor         {floor_s:.1f} s of wall, {floor_s / ours['wall_s']:.0%} of the product's",
        f"utilisation   {'-' if math.isnan(used) else f'{used:.0%}'} of the product's slots until its last trial began",
    ]


def _finite(figures: Any) -> Any:
    """Return figures with null where one is not a number, which JSON doesn't know."""
    if isinstance(figures, dict):
        return {key: _finite(value) for key, value in figures.items()}
    if isinstance(figures, list):
        return [_finite(value) for value in figures]
    return None if isinstance(figures, float) and not math.isfinite(figures) else figures


def machine_lines() -> list[str]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    cpu = models[0].partition(":")[2].strip() if models else platform.processor()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "torchvision", "timm", "ray"))
    return [
        f"hardware  {cpu}, {os.cpu_count()} cores, {memory:.0f} GiB",
        f"software  python {platform.python_version()}, {versions}",
    ]


# ---- the command ------------------------------------------------------------------------------------------------


def part(out: Path, name: str, make: Callable[[Path], Part]) -> Part:
    """A part's result: the one that is there, or a new one, made in an empty folder of its own."""
    path = out / f"{name}.json"
    if not path.exists():
        print(f"{time.strftime('%H:%M:%S')}  {name}", flush=True)
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        made = make(folder)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(made, indent=1))
        for large in ("cache", "ray", "run/checkpoints"):
            shutil.rmtree(folder / large, ignore_errors=True)
    return json.loads(path.read_text())


def prepared(flags: Flags) -> tuple[Path, str]:
    """The folder of parts and the data.

    Raises:
        InputError: a flag makes no sense, or the folder's parts were made with other flags.
    """
    for name, low, high in (("configs", 2, 100), ("slots", 1, os.cpu_count() or 1)):
        if not low <= getattr(flags, name) <= high:
            raise InputError(f"--{name} {getattr(flags, name)}: must be {low} to {high}")
    if "product" not in flags.sides or len(set(flags.sides)) < max(len(flags.sides), 2):
        raise InputError(f"--sides {' '.join(flags.sides)}: must be product and at least one other, each once")
    trial_config(configs(1)[0], flags)
    out = Path(tempfile.mkdtemp(prefix="speed-") if flags.out is None else flags.out).expanduser().resolve()
    data = str(out / "images") if flags.data is None else os.path.abspath(os.path.expanduser(flags.data))
    settings = dataclasses.asdict(flags) | {"out": str(out), "data": data, "sides": list(flags.sides), "json": None}
    if (out / "flags.json").exists() and json.loads((out / "flags.json").read_text()) != settings:
        raise InputError(f"--out {out}: its parts were made with other flags, see flags.json; choose another folder")
    if flags.data is None:
        write_phantoms(out / "images")
    for file in load_samples(data)["file"]:  # neither side is to pay for a cold disk
        Path(file).read_bytes()
    out.mkdir(parents=True, exist_ok=True)
    (out / "flags.json").write_text(json.dumps(settings))
    return out, data


def run(flags: Flags) -> int:
    """Measure what isn't there yet and report; 1 where the sides can't be compared."""
    out, data = prepared(flags)
    print(f"parts     {out}")
    halves = [configs(flags.configs)[half::2] for half in (0, 1)]
    makers = {"recipe": run_recipe, "before": run_before, "product": run_product}
    parts: dict[str, list[Part]] = {side: [] for side in flags.sides}
    for half, order in enumerate((flags.sides, flags.sides[::-1])):
        for side in order:
            made = partial(makers[side], flags=flags, data=data, chosen=halves[half])
            parts[side].append(part(out, f"{side}-{half}", made))
    floor = part(out, "floor", lambda _: run_floor(flags, data))

    print("\n".join(machine_lines()))
    print(f"data      {floor['images']} images, {floor['train']} train, {floor['val']} val, {flags.image_size} px")
    print(f"plan      {flags.configs} configurations, {flags.epochs} epochs, {flags.slots} slots\n")
    rows = [
        {side: parts[side][number % 2]["trials"][number // 2] for side in flags.sides}
        for number in range(flags.configs)
    ]
    print("\n".join(table_lines(rows)) + "\n")
    counts = {"epochs": flags.epochs, "train": floor["train"], "val": floor["val"]}
    floor_s = sum(floor_seconds(half, floor["costs"], **counts) for half in halves) / flags.slots
    print("\n".join(summary_lines(parts, floor_s, flags.slots)))
    if flags.json is not None:
        trials = [
            row["product"]["config"]
            | {side: {"seconds": seconds_of(trial), "val_loss": final_loss(trial)} for side, trial in row.items()}
            for row in rows
        ]
        figures = {"machine": machine_lines(), "floor_s": floor_s, "totals": totals(parts), "configurations": trials}
        Path(flags.json).write_text(json.dumps(_finite(figures), indent=1))
    wrong = [f"configuration {n}: {fault}" for n, row in enumerate(rows) for fault in faults(row, flags.epochs)]
    print("\n" + "\n".join(wrong or ["All trials of all sides trained all epochs; their final losses agree."]))
    return 1 if wrong else 0


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        return run(tyro.cli(Flags))
    except InputError as error:
        print("\n".join(f"error: {fault}" for fault in error.faults), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
