"""The plan of a run, new or resumed, from a command line; and the folder of a new run."""

import fcntl
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
import pyarrow as pa
import yaml

from tuning.record import tables
from tuning.record.journal import Journal
from tuning.record.mirror import fetch, run_folder
from tuning.record.storage import absolute, is_uri, joined, stored
from tuning.settings.config import ADDED, FORMERLY, RESUME_MAY_CHANGE, InputError, SearchPlan, build, check_value
from tuning.settings.documents import read_plan
from tuning.settings.space import Space, configurations, largest
from tuning.settings.space_file import fix, is_same, load, parse, with_portfolio
from tuning.settings.words import count
from tuning.training.digests import plain

PACKAGES = ("torch", "torchvision", "timm", "ray", "optuna", "numpy")  # whose versions a run records


def new_plan(given: dict[str, Any], overrides: Mapping[str, Any]) -> tuple[SearchPlan, Space, Path]:
    """Return the plan, the space and the folder of a new run; settings `given` override the space's and the defaults.

    Raises:
        InputError: a fault in the space or a setting, or a folder that exists or can't be created.
    """
    name = given.get("space", "quick")
    space = load(name)
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", Path(name).stem).lstrip("._-") or "run"
    while True:
        settings = {"name": f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"} | space.search | given
        plan = build(SearchPlan, _absolute(settings), "command line")
        folder = run_folder(plan.storage, plan.name)
        if "name" in given or not folder.exists():
            break
        time.sleep(0.1)  # another search without a name began in this second
    check_new(folder, plan)
    space = fix(space, overrides)
    return plan, with_portfolio(space) if plan.portfolio else space, folder


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Hold the name of a new run while it is made; yield False if another process holds it or has made the run."""
    path = _claim(folder)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield not folder.exists()
        finally:
            path.unlink(missing_ok=True)


def within(space: Space, plan: SearchPlan) -> SearchPlan:
    """Return the plan with no more trials than the space has configurations: others would repeat them to the bit."""
    every = configurations(space)
    return plan if every is None else plan.model_copy(update={"trials": min(plan.trials, len(every))})


def without_effect(space: Space, plan: SearchPlan) -> list[str]:
    """Return, in words, what is set so that it can't do what it is for."""
    found = short_training(largest(space, "warmup_epochs"), plan.epochs)
    if plan.early_stopping and plan.grace_epochs >= plan.epochs > 1:
        found.append(f"grace_epochs={plan.grace_epochs} of {count(plan.epochs, 'epoch')}: ASHA stops no trial")
    return found


def short_training(warmup_epochs: float, epochs: int) -> list[str]:
    """Return, in words, that the warm-up is longer than the training, if it is."""
    if warmup_epochs <= epochs:
        return []
    of = f"warmup_epochs={warmup_epochs:g} of {count(epochs, 'epoch')}"
    return [f"{of}: the learning rate doesn't reach its peak; give less, or more epochs"]


def other_packages(provenance: Mapping[str, Any]) -> list[str]:
    """Return, in words, the packages that have another version than when `provenance` was recorded."""
    recorded = provenance.get("packages")
    known = recorded if isinstance(recorded, dict) else {}
    return [
        f"{name} {version} (was {known[name]})"
        for name, version in _packages().items()
        if name in known and known[name] != version
    ]


def _packages() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}


def check_new(folder: Path, plan: SearchPlan) -> None:
    """Check that the folder of a new run doesn't exist and can be created; raise InputError if not."""
    place = joined(plan.storage, plan.name)
    try:
        exists = folder.exists() or (is_uri(plan.storage) and stored([joined(place, "plan.yaml")]) != [None])
    except OSError as error:
        raise InputError(
            f"--storage {plan.storage}: can't be read ({error}); is the storage reachable, and are its keys set?"
        ) from None
    if exists:
        raise InputError(f"--name {plan.name}: {place} exists; resume it by --resume, or choose another name")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=folder.parent).cleanup()
    except PermissionError:
        raise InputError(f"--storage {plan.storage}: no permission to write there; choose another") from None
    except OSError as error:
        raise InputError(f"--storage {plan.storage}: can't be created ({error.strerror}); choose another") from None


def _claim(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.claim")


def resumed_plan(given: dict[str, Any], overrides: Mapping[str, Any]) -> tuple[SearchPlan, Space, Path]:
    """Return the plan, the space and the folder of a run to resume; of `given`, `RESUME_MAY_CHANGE` may differ from it.

    Raises:
        InputError: there is no such run, it is damaged or in use, or another setting or parameter differs.
    """
    if "name" not in given:
        raise InputError("--resume: give the name of the run by --name")
    name, storage = given["name"], given.get("storage", "results")
    folder, place = run_folder(storage, name), joined(storage, name)
    if is_uri(storage):
        fetch(folder, place)
    path = folder / "plan.yaml"
    if not path.is_file():
        runs = ", ".join(sorted(other.parent.name for other in folder.parent.glob("*/plan.yaml"))) or "none"
        raise InputError(f"--resume: there is no run {place}" + ("" if is_uri(storage) else f"; runs there: {runs}"))
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        raise InputError(f"--resume: no permission to write in {folder}")
    if (folder / "journal.jsonl").exists():  # raises before Ray starts if another search writes this run
        Journal(folder / "journal.jsonl").close()
    document = read_plan(folder)
    settings = document["settings"]
    anew = "start a new run under another --name"
    # Without one of those that can change or were added, an older version did what its default does, or FORMERLY says.
    missing = sorted(SearchPlan.model_fields.keys() - settings.keys() - {*RESUME_MAY_CHANGE, *ADDED, *FORMERLY})
    if missing:
        lacks = f"is of an older version (without {', '.join(missing)})"
        raise InputError(f"--resume: {path} {lacks}; resume it with the version that started it, or {anew}")
    settings = {name: SearchPlan.model_fields[name].default for name in ADDED} | FORMERLY | settings
    space = parse(document["space"], str(path))
    if settings["name"] != name:
        cure = f"rename the folder to {settings['name']}, and give that --name"
        raise InputError(f"--resume: {joined(place, 'plan.yaml')} is of the run {settings['name']!r}; {cure}")
    differing = [
        f"{key} ({settings[key]!r} in this run, not {value!r})"
        for key, value in _absolute(given).items()
        if key not in (*RESUME_MAY_CHANGE, "storage", "space") and value != settings[key]
    ]
    differing += [key for key, value in overrides.items() if space.fixed.get(key) != value]
    if "space" in given and not is_same(fix(load(given["space"]), overrides), document["space"]):
        differing.append(f"the space ({settings['space']!r} in this run, as it was then)")
    if differing:
        raise InputError(f"--resume: can't change {', '.join(differing)}; leave these out, or {anew}")
    changed = {key: value for key, value in _absolute(given).items() if key in RESUME_MAY_CHANGE}
    changed["storage"] = storage  # the run may have been moved
    return build(SearchPlan, settings | changed, str(path)), space, folder


def _absolute(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings whose paths hold in any folder: a run may be resumed in another, and workers run elsewhere."""
    found = dict(settings)
    if not isinstance(settings.get("weights", ""), str):
        files = check_value(SearchPlan, "weights", settings["weights"])
        found["weights"] = plain(
            {
                name: each.model_copy(update={"file": Path(_absolute_place(str(each.file)))})
                for name, each in files.items()
            }
        )
    elif settings.get("weights") not in (None, "auto", "random"):
        found["weights"] = _absolute_place(settings["weights"])
    for key in ("data", "images", "join", "warm_start", "optuna_storage"):
        if settings.get(key) is not None:
            found[key] = _absolute_place(settings[key])
    if settings.get("split_files"):
        found["split_files"] = {split: _absolute_place(file) for split, file in settings["split_files"].items()}
    return found


def _absolute_place(place: str) -> str:
    named = re.match(r"sqlite(\+\w+)?:///", place)
    prefix = named[0] if named else ""
    return prefix + absolute(place.removeprefix(prefix))


def write_run(
    folder: Path,
    plan: SearchPlan,
    space: Space,
    samples: pd.DataFrame,
    audit: pa.Table,
    fingerprint: str,
    weights: Mapping[str, str | None] = MappingProxyType({}),
) -> None:
    """Create the folder of a new run, with plan.yaml, samples.parquet and audit.parquet.

    Args:
        weights: sha256 of each backbone's file of weights.
    """
    unfinished = folder.with_name(f".{folder.name}")  # renamed when it is complete: half a run would block its name
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    tables.write_tables({"samples": tables.samples_table(samples), "audit": audit}, unfinished)
    provenance = {
        "run_id": uuid.uuid4().hex,
        "fingerprint": fingerprint,
        "listing": samples.attrs.get("listing"),
        "val_drawn": "val" in samples.attrs["random_splits"],
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": _packages(),
        "weights": dict(weights),
    }
    document = {"settings": plan.model_dump(), "space": space.document, "provenance": provenance}
    write_yaml(unfinished / "plan.yaml", document)
    unfinished.rename(folder)
    _claim(folder).unlink(missing_ok=True)


def write_yaml(path: Path, document: dict[str, Any]) -> None:
    """Write a YAML file, or replace it as a whole."""
    with tables.replacing(path) as temporary:
        temporary.write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True))


def _git_commit() -> str | None:
    git = Path(__file__).resolve().parents[2] / ".git"
    try:
        command = ["git", "--git-dir", str(git), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git on this machine, or no checkout
        return None
