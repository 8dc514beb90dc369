"""Evaluate a final model on labelled images from elsewhere, such as another hospital's."""

import sys
from pathlib import Path

if __name__ == "__main__":  # the checkout comes first on the path, not this folder, whose modules would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import dataclasses
import json
import os
import re
import shutil
import tempfile
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import tyro

from tuning import __version__
from tuning.api import CommandModule
from tuning.checks.audit import decoded
from tuning.data.images import open_images, parallel_map, read_facts
from tuning.data.samples import fingerprint, load_samples
from tuning.insight.intervals import measure
from tuning.insight.operating import at, prevalences
from tuning.insight.per_group import By, measured
from tuning.insight.shift import described, shifts
from tuning.model import evaluation
from tuning.model.folder import Ensemble, Model, load_model
from tuning.model.held_out import by_subgroup, estimate, few_images, print_per_group, print_predictive_values
from tuning.record.mirror import borrowed
from tuning.record.predictions import group_numbers, write_tested
from tuning.record.storage import is_uri
from tuning.record.targets import class_names, encoded, is_multi_label, named, written
from tuning.settings.command_line import Pairs, command_line, exit_code, leave
from tuning.settings.config import SAMPLE_SETTINGS, InputError, SearchPlan, visible
from tuning.settings.words import count, examples, nearest

NOT_OF_DATA = ("split_column", "val_fraction", "test_fraction")  # splits mean nothing here
OF_DATA = (*(name for name in SAMPLE_SETTINGS if name not in NOT_OF_DATA), "skip_unreadable", "disk_cache_bytes")


@dataclasses.dataclass(frozen=True)
class Flags:
    """Evaluate a model on labelled images that it wasn't trained on, wherever they are from.

    Its figures with 95% confidence intervals by patient, beside those of its own test set; calibration; how the images
    differ from those that it was trained on; copies of these are left out. The test set's count of evaluations stays.

    Example: python tuning/evaluate.py results/xray/model other_hospital/ --name other_hospital
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder of a model, such as results/NAME/model."""
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Labelled images, as --data of a search: folder of class folders, manifest, or URI. Splits mean nothing here."""
    name: Annotated[tyro.conf.DisallowNone[str | None], tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None
    """Results are written to evaluation-NAME. Default: the name of the data."""
    out: Annotated[tyro.conf.DisallowNone[str | None], tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Folder for evaluation-NAME. Default: beside the model's folder; of a model in a storage the current one."""
    rename: Annotated[tuple[str, ...], tyro.conf.arg(metavar="THEIRS=OURS ...", help_behavior_hint="")] = ()
    """Classes of the data that have another name in the model."""
    prevalence: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CLASS=SHARE ...", help_behavior_hint="")] = ()
    """Share of a class where the model is to be used, by which its PPV and NPV are given: pneumonia=0.02."""
    per_group: Annotated[
        tyro.conf.DisallowNone[By | None], tyro.conf.arg(metavar="mean|max", help_behavior_hint="")
    ] = None
    """Gives the figures also per group, such as a patient, by the mean or the maximum of its images' probabilities."""
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], tyro.conf.arg(metavar="auto|cpu|cuda|mps")] = "auto"
    """Device: `cpu`, `cuda`, `mps` (Apple's GPU), or `auto`: a GPU if there is one."""
    set: Annotated[Pairs, tyro.conf.arg(metavar="KEY=VALUE ...")] = ()
    """Settings of the data, such as --set label_column=finding group_column=patient_id."""


def main() -> int:
    """Run the command line; return the exit code."""
    return exit_code(lambda: print(f"\n{run(tyro.cli(Flags))}/evaluation.html"))


def run(flags: Flags) -> Path:
    """Evaluate, and write `evaluation-NAME/`; return it.

    Raises:
        InputError: no model, no labelled images of its classes, no place for the results, or wrong settings.
    """
    plan, target = _settings(flags), _target(flags)
    with borrowed(flags.model, without=("model.onnx", "mistakes.html")) as folder:
        model = load_model(folder, flags.device)
        known, as_before = evaluation.read_known_images(folder)
        own, chosen, digest = _own(folder), _own(folder, "thresholds"), evaluation.digest(folder)
    prevalence = prevalences(flags.prevalence, model.classes)
    reading = {key: getattr(plan, key) for key in SAMPLE_SETTINGS} | {"multi_label": model.multi_label}
    samples = load_samples(flags.data, evaluated=True, **reading)
    samples, lines = _of_classes(samples, flags, model.classes)

    # Decode; what can't be read, what the model knows and what is there twice is left out.
    sizes, shaped = evaluation.image_sizes(model), evaluation.shaping(model)
    try:
        found = decoded(plan.model_copy(update=shaped), sizes, samples, parallel_map, skip=plan.skip_unreadable)
    except ConnectionError as error:
        raise InputError(f"{flags.data}: the storage failed ({error}); start again when it works") from None
    samples = found.samples
    if found.lost:
        lines.append(f"left out: {count(len(found.lost), 'image')} that can't be read")
    images = {size: open_images(place) for size, place in found.folders.items()}
    facts = read_facts(found.folders[sizes[0]])
    shapes = evaluation.outlines(images[sizes[0]], np.arange(len(samples)))
    rows, copies = _new(samples, found.hashes, facts, shapes, known, lines)
    if not as_before:
        why = "this version decodes images in another way than the model's"
        lines.append(f"{why}, so copies in another file are known by their outlines alone")
    tested = samples.iloc[rows].reset_index(drop=True)
    if tested.empty:
        raise InputError(
            f"{flags.data}: the model was trained, validated or tested on all of these images; give others"
        )
    if tested["group"].isna().all():
        lines.append("no patients are known, so each image counts as one; name a column by --set group_column=...")

    # Measure.
    probabilities, unlike = evaluation.outputs(model, images, rows)
    if unlike is not None and (odd := int((unlike > 1).sum())):
        said = f"{count(odd, 'image')} ({odd / len(unlike):.0%}) unlike those that the model was trained on"
        first = examples(tested["path"][unlike > 1])
        lines.append(f"{said} (of the validation images 1%): {first}")
    targets = encoded(tested["label"], model.classes)
    if model.multi_label and not (targets >= 0).any():
        raise InputError(f"{flags.data}: no label of any image is known; give others")
    groups = group_numbers(tested)
    figures = evaluation.without_absent(measure(probabilities, targets, groups, model.classes))
    figures["operating_points"] = at(chosen or {}, probabilities, targets, groups, model.classes, prevalence)
    figures |= by_subgroup(probabilities, targets, groups, tested)
    figures |= measured(probabilities, targets, groups, model.classes, flags.per_group)
    if "per_group" in figures:
        figures["per_group"] = evaluation.without_absent(figures["per_group"])
    if judged := [name for name, values in figures["classes"].items() if values["auroc"] is not None]:
        if len(judged) < len(model.classes):
            lines.append(f"means are over {count(len(judged), 'label')} of {len(model.classes)}: {examples(judged)}")
    whole = figures["balanced_accuracy"] is not None
    trained = None if known is None else known[known["split"] != "test"]
    shift = [] if trained is None else shifts(trained, described(images[sizes[0]], rows, facts))
    metrics = {
        "model": {"folder": flags.model, "config_sha256": digest},
        "data": {"place": flags.data, "fingerprint": fingerprint(tested, [found.hashes[row] for row in rows])},
        "made": {"at": datetime.now(UTC).isoformat(timespec="seconds"), "version": __version__},
        "settings": {
            "rename": list(flags.rename),
            "prevalence": prevalence,
            "set": [pair for group in flags.set for pair in group],
        },
        "evaluation": figures,
        "recalibrated": evaluation.recalibrated(probabilities, targets) if whole else None,
        "test": own,
        "differences": evaluation.differences(figures, own),
        "shift": [each._asdict() for each in shift],
        "unfamiliar": None if unlike is None else int((unlike > 1).sum()),
        "copies": copies,
        "remarks": lines,
    }
    _write(target, metrics, tested, probabilities, targets, model, images[sizes[0]], rows, shaped)
    _print(metrics)
    return target


def _settings(flags: Flags) -> SearchPlan:
    given, overrides = command_line({"data": flags.data}, flags.set)
    unused = sorted({*overrides, *given} - {"data", *OF_DATA})
    if unused:
        raise InputError([f"--set {name}: has no effect here; leave it out" for name in unused])
    return SearchPlan(name="evaluation", **given)


def _target(flags: Flags) -> Path:
    """Return the folder that is to be written, which isn't there yet."""
    name = flags.name or re.sub(r"[^\w.-]+", "_", _place_name(flags.data)).strip("._-")
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise InputError(f"--name {name!r}: must be letters, digits, '.', '_' and '-'; give one by --name")
    parent = Path(flags.out) if flags.out else Path.cwd() if is_uri(flags.model) else Path(flags.model).resolve().parent
    target = parent / f"evaluation-{name}"
    if target.exists():
        raise InputError(f"{target} exists; give another --name, or move it away")
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK, effective_ids=True):
        raise InputError(f"{parent}: no folder to write in; give another by --out")
    return target


def _place_name(data: str) -> str:
    """Return the name of a folder, or of a file without its suffix."""
    name = data.rstrip("/").rpartition("/")[2] if is_uri(data) else Path(data).resolve().name
    return re.sub(r"(\.\w+)(\.gz)?$", "", name) if is_uri(data) or Path(data).is_file() else name


def _of_classes(samples: pd.DataFrame, flags: Flags, classes: tuple[str, ...]) -> tuple[pd.DataFrame, list[str]]:
    """Return the images of the model's classes, by their names in the model, and lines on what was left out."""
    several = is_multi_label(samples["label"])
    lines = list(samples.attrs["remarks"])
    there = list(samples.attrs["labels"] if several else class_names(samples["label"]))
    if wrong := [pair for pair in flags.rename if pair.partition("=")[2] not in classes]:
        raise InputError(f"--rename {wrong[0]}: give THEIRS=OURS, where OURS is {' or '.join(classes)}")
    names = dict(pair.split("=", 1) for pair in flags.rename)
    if absent := sorted(names.keys() - set(there)):
        raise InputError(f"--rename {absent[0]}: the data has no such class, but {examples(there)}")
    renamed = {names.get(name, name) for name in there}
    others, missing = sorted(renamed - set(classes)), [name for name in classes if name not in renamed]
    if (missing and others and not (several and renamed & set(classes))) or not len(samples):
        close = nearest(missing[0], others)
        raise InputError(
            f"{flags.data}: has the classes {examples(there) or 'none'}, the model {examples(classes)}{close}; name "
            "them by --rename THEIRS=OURS, or leave their images out"
        )
    if several:
        if others:
            lines.append(f"not evaluated: labels that the model lacks: {examples(others)} (--rename THEIRS=OURS)")
        if missing:
            lines.append(f"unknown in all images: {examples(missing)}, which the data doesn't name")
        unsaid: dict[str, bool | None] = dict.fromkeys(missing)
        texts = []
        for label in samples["label"]:
            own: dict[str, bool | None] = {}
            for name, known in named(label).items():  # of several labels that become one, one that is there decides
                own[names.get(name, name)] = known or own.get(names.get(name, name))
            texts.append(written(own | unsaid))
        return samples.assign(label=pd.Series(texts, dtype=object)), lines
    labels = samples["label"].map(lambda label: names.get(label, label))
    if others:
        number = count(int(labels.isin(others).sum()), "image")
        lines.append(f"left out: {number} of classes that the model lacks: {examples(others)} (--rename THEIRS=OURS)")
    if missing:
        lines.append(f"no images of {examples(missing)}: what needs them is not measured")
    return samples.assign(label=labels)[labels.isin(classes)].reset_index(drop=True), lines


def _new(
    samples: pd.DataFrame,
    hashes: list[str],
    facts: pd.DataFrame,
    shapes: list[str | None],
    known: pd.DataFrame | None,
    lines: list[str],
) -> tuple[Any, int]:
    """Return the rows that are new to the model, each image once, and how many are not; `lines` say so."""
    left = np.zeros(len(samples), dtype=bool)
    if known is None:
        lines.append("copies and shift are unknown: this model, of an older version, doesn't know its images")
    else:
        tested = known["split"] == "test"
        for part, what in ((known[~tested], "that the model was trained on"), (known[tested], "of its own test set")):
            same = evaluation.copies(part, hashes, facts) & ~left
            near = evaluation.near_copies(part, shapes) & ~same & ~left
            left |= same | near
            for some, kinds in ((same, ("copy", "copies")), (near, ("near copy", "near copies"))):
                if some.any():
                    number = count(int(some.sum()), *kinds)
                    lines.append(f"left out: {number} of images {what} ({examples(samples['path'][some])})")
        if "outline" not in known:
            lines.append("near copies are unknown: this model, of an older version, has no outlines of its images")
    copies = int(left.sum())
    again = facts["pixels_sha256"].duplicated().to_numpy() & ~left
    if again.any():
        labels = samples["label"].groupby(facts["pixels_sha256"].to_numpy()).nunique()
        said = f", {count(int((labels > 1).sum()), 'image')} with several labels" if (labels > 1).any() else ""
        lines.append(f"left out: {count(int(again.sum()), 'image')} identical to another one here{said}")
    return np.flatnonzero(~left & ~again), copies


def _own(folder: Path, part: str = "test") -> dict[str, Any] | None:
    """Return the figures on the model's own test set, or another part of its `metrics.json`, if there is one."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found: Any = json.loads((folder / "metrics.json").read_text())[part]
        return found if isinstance(found, dict) else None
    return None


def _write(
    target: Path,
    metrics: dict[str, Any],
    tested: pd.DataFrame,
    probabilities: Any,
    targets: Any,
    model: Model | Ensemble,
    images: Any,
    rows: Any,
    shaped: dict[str, Any],
) -> None:
    """Write the figures and predictions, then what shows them, which must not fail the command."""
    unfinished = Path(tempfile.mkdtemp(prefix=".evaluation-", dir=target.parent))
    try:
        unfinished.chmod(0o755)
        (unfinished / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        write_tested(
            unfinished / "predictions.parquet", tested, model.classes, probabilities, temperature=model.temperature
        )
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    try:
        from tuning.model.evaluation_page import write_page  # loads matplotlib

        given: dict[str, Any] = {"temperature": model.temperature, "shaped": shaped}
        write_page(target, metrics, tested, probabilities, targets, model.classes, images, rows, **given)
    except Exception as error:
        print(f"plots or evaluation.html are missing ({type(error).__name__}: {error})", file=sys.stderr)


def _print(metrics: dict[str, Any]) -> None:
    here, own, differences = metrics["evaluation"], metrics["test"], metrics["differences"]

    def line(words: str, values: Any, others: Any, change: Any, name: str) -> None:
        said = f"  {visible(words):<34} {estimate(values, name)}"
        if own is not None:
            said += f"   own test set {estimate(others, name)}"
        if evaluation.significant(change):
            said += f"   {'higher' if change['difference'] > 0 else 'lower'} by {abs(change['difference']):.3f}"
        print(said)

    for remark in metrics["remarks"]:
        print(visible(remark))
    groups = "" if here["groups"] == here["images"] else f" from {count(here['groups'], 'group')}"
    print(f"\n{count(here['images'], 'image')}{groups}, 95% confidence intervals in brackets:")
    for name in evaluation.COMPARED:
        line(name.replace("_", " ").replace("auroc", "AUROC"), here, own, differences.get(name), name)
    for label, values in here["classes"].items():
        others = ((own or {}).get("classes") or {}).get(label)
        for name in ("sensitivity", "specificity"):
            line(f"{label}: {name}", values, others, differences.get("classes", {}).get(label, {}).get(name), name)
    print(f"  expected calibration error {here['calibration_error']:.3f}, loss {here['loss']:.3f}")
    if (fitted := metrics["recalibrated"]) is not None:
        few = few_images(fitted)
        print(f"  with the temperature that fits these images the loss would be {fitted['loss']:.3f}{few}")
    print_predictive_values(here)
    print_per_group(here)
    for words in here.get("subgroups_in_words", []):
        print(f"  {visible(words)}")
    notable = [shift for shift in metrics["shift"] if shift["notable"]]
    for shift in notable:
        apart = f"tells {shift['separation']:.0%} of the images apart"
        print(f"  {shift['fact']}: {shift['here']} here, {shift['trained']} in training ({apart})")
    if metrics["shift"] and not notable:
        print("  no clear difference from the training images in brightness, contrast, sizes and formats")


if __name__ == "__main__":
    leave(main())
else:  # `from tuning import evaluate` is called as the command is
    sys.modules[__name__].__class__ = CommandModule
