"""Decode the images and audit the data before any trial."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from tuning.checks import findings, names, shortcuts
from tuning.checks.alignment import SIDE, Ints
from tuning.checks.duplicates import VERSION, Pairs, bars_of, near_duplicates, shrunk
from tuning.checks.findings import Finding
from tuning.data import images, phantoms, samples, splits
from tuning.data.decoding import Pixels
from tuning.record import tables
from tuning.record.targets import class_names, encoded, is_multi_label, one_row_per_label
from tuning.settings.config import SAMPLE_SETTINGS, InputError, SearchPlan, cache_folder

MOST_SIZES = 8  # image sizes of one search
MOST_IMAGES = 60_000  # for near duplicates: all pairs are compared


class Checked(NamedTuple):
    """Data that can be searched on."""

    samples: pd.DataFrame
    folders: dict[int, Path]  # of decoded images, by size
    fingerprint: str
    audit: pa.Table | None  # the findings; None for the samples of an earlier run, which were audited then
    messages: list[str]  # the findings in words


def load_checked(
    plan: SearchPlan,
    image_sizes: list[int],
    *,
    table: pd.DataFrame | None = None,
    map: Callable[..., Any] = images.parallel_map,
) -> Checked:
    """Return samples, with their images decoded once, and audited.

    Args:
        plan: names the data; if None, the generated radiographs are used.
        image_sizes: sides in pixels.
        table: the samples of an earlier run, used unchanged and not audited again.
        map: as in `images.decode_all`.

    Raises:
        InputError: the data is unusable; all unreadable images are listed together, and all leaks are counted.
    """
    try:
        found = decoded(plan, image_sizes, table, map, skip=plan.skip_unreadable)
    except ConnectionError as error:
        raise InputError(f"{plan.data}: the storage failed ({error}); start again when it works") from None
    if table is not None:
        noted = images.read_facts(next(iter(found.folders.values())))["notes"]
        messages = findings.notes_in_words(found.samples["path"], noted)
        return Checked(found.samples, found.folders, samples.fingerprint(found.samples, found.hashes), None, messages)
    problems, checked, messages = audited(plan, found)
    if stops := findings.stops(problems):
        raise InputError(stops)
    fingerprint = samples.fingerprint(checked, found.hashes)
    return Checked(checked, found.folders, fingerprint, findings.table(problems), messages)


class Decoded(NamedTuple):
    samples: pd.DataFrame
    folders: dict[int, Path]
    hashes: list[str]
    lost: list[tuple[str, str]]  # path and reason of each image that was left out


def decoded(
    plan: SearchPlan, image_sizes: list[int], table: pd.DataFrame | None, map: Callable[..., Any], *, skip: bool
) -> Decoded:
    """Decode the images in all sizes; with `skip`, unreadable ones are left out."""
    if len(image_sizes) > MOST_SIZES:
        cure = f"give {MOST_SIZES} choices at most, or a range with a step"
        raise InputError(f"image_size: has {len(image_sizes)} values, and images are decoded for each; {cure}")
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not os.access(cache, os.W_OK | os.X_OK, effective_ids=True):
            raise PermissionError(errno.EACCES, "no permission to write there")
    except OSError as error:
        cure = "set FINETUNE_SEARCH_CACHE to a folder that you can write in"
        raise InputError(f"{cache}: {error.strerror}; {cure}") from None
    data = plan.data
    if data is None:
        data = str(phantoms.write_phantoms(cache / f"phantoms-{phantoms.VERSION}"))
        if table is not None:  # the run may come from another machine, with another cache
            table = table.assign(file=[os.path.join(data, path) for path in table["path"]])
    if table is None:
        table = samples.load_samples(data, **{key: getattr(plan, key) for key in SAMPLE_SETTINGS})
    hashes = images.content_hashes(list(table["file"]), cache, map)
    folders: dict[int, Path] = {}
    for size in image_sizes:
        folders[size], unreadable = images.decode_all(
            list(table["file"]),
            hashes,
            size,
            fit=plan.fit,
            drop_colour=plan.drop_colour,
            folder=cache,
            disk_cache_bytes=plan.disk_cache_bytes,
            keep=set(folders.values()),
            map=map,
        )
        if unreadable:  # rows are removed, so every size starts again
            lost = [(str(table["path"][index]), reason) for index, reason in sorted(unreadable.items())]
            again = decoded(plan, image_sizes, _without(table, unreadable, skip), map, skip=skip)
            return again._replace(lost=lost + again.lost)
    return Decoded(table, folders, hashes, [])


def _without(table: pd.DataFrame, unreadable: dict[int, str], skip: bool) -> pd.DataFrame:
    listed = [f"{table['file'][index]}: {reason}" for index, reason in sorted(unreadable.items())]
    if not skip:
        cure = "repair or remove them, or leave them out with --set skip_unreadable=true"
        raise InputError([*listed, f"{len(listed)} of {len(table)} images can't be read; {cure}"])
    kept = table.drop(index=list(unreadable)).reset_index(drop=True)
    if is_multi_label(kept["label"]):
        return samples.with_learnable_labels(kept)
    if emptied := _emptied(table, kept):
        raise InputError([*listed, f"no readable image is left of {emptied}; repair some of these"])
    return kept


def _emptied(before: pd.DataFrame, after: pd.DataFrame) -> str:
    """Classes that no longer have an image in a split, in words."""
    rows = map(one_row_per_label, (before, after))
    had, has = (set(zip(table["label"], table["split"], strict=True)) for table in rows)
    return ", ".join(f"{label} in {split}" for label, split in sorted(had - has))


def audited(plan: SearchPlan, decoded: Decoded) -> tuple[list[Finding], pd.DataFrame, list[str]]:
    """Return all findings, the samples for the search, and what the screen shows."""
    size = min((size for size in decoded.folders if size >= SIDE), default=max(decoded.folders))  # shows the details
    folder = decoded.folders[size]
    shown, facts = images.open_images(folder), images.read_facts(folder)
    identical = findings.identical_images(facts["pixels_sha256"].tolist())
    table = _with_identical_together(decoded.samples, identical, plan)
    several = is_multi_label(table["label"])
    if several:
        table = samples.with_learnable_labels(table)
    near = _near(folder, identical, facts, plan.fit)
    together = near.copies | near.steps
    pairs = zip(near.a[together], near.b[together], strict=True)
    unit = splits.number_units(table["group"], [*identical, *pairs])
    labels = table["label"].tolist()
    rules, untried = _shortcuts(folder, shown, facts, labels, unit)
    found = findings.of_unreadable(decoded.lost, plan.skip_unreadable)
    found += findings.of_groups(table, plan.on_leak)
    found += findings.of_copies(table, identical, decoded.hashes, near, plan.on_leak)
    found += findings.of_sequences(table, near)
    found += names.of_names(table)
    found += findings.of_imbalance(table["label"])
    found += findings.of_decoding(table["path"], facts["notes"])
    found += findings.of_shortcuts(rules, plan.fit, plan.drop_colour)
    moved = table
    if plan.on_leak == "move":
        after = splits.in_one_split(table["split"].tolist(), unit)
        found = findings.with_moves(found, table, after, unit)
        moved = table.assign(split=pd.Series(after, dtype=object))
        if several:
            moved = samples.with_learnable_labels(moved)
        elif emptied := _emptied(table, moved):
            cure = "move groups by hand, or remove the split column for random splits by group"
            raise InputError(f"on_leak=move: the moves would leave no image of {emptied}; {cure}")
    messages = findings.notes_in_words(table["path"], facts["notes"])
    messages += moved.attrs.get("remarks", [])
    if drawn := table.attrs["random_splits"]:
        of = "images, since no groups are given" if table["group"].isna().all() else "groups"
        messages.append(f"split at random, by {of}: {', '.join(drawn)}")
    if table["group"].isna().all() and (facts["format"] == "DICOM").any():
        cure = "name a manifest's column by --set group_column=..."
        messages.append(f"patients are unknown: the headers of DICOM files aren't read for them; {cure}")
    messages += findings.summary(found, int((moved["split"] != table["split"]).sum()))
    if identical and table.attrs["random_splits"]:
        messages.append(f"  {', '.join(drawn)} were split at random, with identical images in the same split")
    if untried:
        classes = f"{len(untried)} of {len(class_names(labels))} classes, such as {untried[0]}"
        why = "two or more classes are needed, with images of two or more groups each"
        messages.append(f"  shortcuts were not searched for in {classes}: {why}")
    if len(table) > MOST_IMAGES:
        messages.append(f"  near duplicates were not searched for among more than {MOST_IMAGES:,} images")
    return found, moved.assign(unit=unit), messages


def _with_identical_together(table: pd.DataFrame, identical: list[tuple[int, int]], plan: SearchPlan) -> pd.DataFrame:
    """Make the random splits again, so that no image is identical to one in another split.

    Only identical images: near duplicates depend on the size that is audited, and splits should not.
    """
    if not (identical and table.attrs["random_splits"]):
        return table
    unit = splits.number_units(table["group"], identical)
    of_unit = table["group"].where(table["group"].notna(), table["path"]).groupby(unit).transform("first")
    fractions = {"val_fraction": plan.val_fraction, "test_fraction": plan.test_fraction}
    try:
        return splits.random_splits(table, of_unit.tolist(), **fractions)
    except InputError as error:
        raise InputError([f"with identical images in the same split: {fault}" for fault in error.faults]) from None


def _near(folder: Path, identical: list[tuple[int, int]], facts: pd.DataFrame, fit: str) -> Pairs:
    """Near duplicates among images that are not identical to an earlier one, cached beside the decoded images."""
    cached = folder / f"near-{VERSION}.parquet"
    if not cached.exists():
        shown = images.open_images(folder)
        if len(shown) > MOST_IMAGES:
            return Pairs(*(np.empty(0, dtype) for dtype in (np.int64, np.int64, np.float32, bool, bool)))
        alone = np.setdiff1d(np.arange(len(shown)), [later for _, later in identical])
        grey = np.empty((len(alone), SIDE, SIDE), dtype=np.uint8)
        bars = bars_of(shown, facts)[alone] if fit == "letterbox" else np.zeros((len(alone), 2), dtype=np.int64)
        for bar in np.unique(bars, axis=0):
            chosen = (bars == bar).all(axis=1)
            grey[chosen] = shrunk(shown, alone[chosen], SIDE, grey=True, bars=bar)[:, :, :, 0]
        pairs = near_duplicates(grey)
        pairs = pairs._replace(a=alone[pairs.a], b=alone[pairs.b])
        with tables.replacing(cached) as temporary:
            pq.write_table(pa.table(pairs._asdict()), temporary)
    return Pairs(*(column.to_numpy() for column in pq.read_table(cached).itercolumns()))


def _shortcuts(
    folder: Path, shown: Pixels, facts: pd.DataFrame, labels: list[str], unit: Ints
) -> tuple[list[shortcuts.Shortcut], list[str]]:
    """Return what `shortcuts.shortcuts` finds, and the classes in which nothing could be tried.

    It is remembered beside the decoded images for these labels and units. Of several labels, each is predicted alone.
    """
    asked = json.dumps([shortcuts.VERSION, labels, unit.tolist()])
    cached = folder / f"shortcuts-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.json"
    if cached.exists():
        known, untried = json.loads(cached.read_text())
        return [shortcuts.Shortcut(*rule) for rule in known], untried
    names = class_names(labels)
    if is_multi_label(labels):
        known, untried, cells = [], [], encoded(labels, names)
        for place, name in enumerate(names):
            rows = np.flatnonzero(cells[:, place] >= 0)
            task = [name if cell else f"no {name}" for cell in cells[rows, place]]
            rules, tried = _rules(shown, facts, task, unit[rows], rows)
            known += [rule._replace(rule=rule.rule.replace("predicts the class", f"predicts {name}")) for rule in rules]
            untried += [] if tried else [name]
    else:
        known, tried = _rules(shown, facts, labels, unit, np.arange(len(labels)))
        untried = sorted(set(names) - tried)
    with tables.replacing(cached) as temporary:
        temporary.write_text(json.dumps([known, untried]))
    return known, untried


def _rules(
    shown: Pixels, facts: pd.DataFrame, labels: list[str], unit: Ints, rows: Ints
) -> tuple[list[shortcuts.Shortcut], set[str]]:
    """Return what predicts the labels of some images, `rows`, and the classes that were tried."""
    chosen = shortcuts.sampled(labels, unit)
    pictures = shrunk(shown, rows[chosen], shortcuts.SIDE).astype(np.float32)
    of_chosen = [labels[index] for index in chosen]
    found = shortcuts.shortcuts(pictures, facts.iloc[rows[chosen]], of_chosen, unit[chosen])
    return (found, set(of_chosen)) if found is not None else ([], set())
