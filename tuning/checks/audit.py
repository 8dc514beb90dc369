"""What is wrong with the data, found on the decoding pass before any trial; as a command of its own too."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from tuning.checks import findings, leaks
from tuning.checks.alignment import SIDE, Ints
from tuning.checks.duplicates import VERSION, Pairs, bars_of, near_duplicates, shrunk
from tuning.checks.findings import Finding
from tuning.data import images, phantoms, samples
from tuning.record import tables
from tuning.settings.config import SETTINGS, InputError, SearchPlan, cache_folder

MOST_SIZES = 8  # image sizes of one search
MOST_IMAGES = 60_000  # among which near duplicates are sought: all pairs are looked at
IMAGE_SIZE = 128  # of the images that the command decodes


class Checked(NamedTuple):
    """Data that can be searched on."""

    samples: pd.DataFrame
    folders: dict[int, Path]  # of decoded images, by size
    fingerprint: str
    audit: pa.Table | None  # the findings; null where the samples are an earlier run's, which was audited
    told: list[str]  # and in words


def load_checked(
    plan: SearchPlan,
    image_sizes: list[int],
    *,
    table: pd.DataFrame | None = None,
    map: Callable[..., Any] = images.parallel_map,
) -> Checked:
    """Samples with their images decoded, once, and audited.

    Args:
        plan: names the data; without any the generated radiographs are drawn.
        image_sizes: sides in pixels.
        table: the samples of an earlier run, used as they are and not audited again.
        map: decodes images by it; see `images.decode_all`.

    Raises:
        InputError: the data is unusable: all unreadable images are listed together, and all leaks are counted.
    """
    try:
        found = decoded(plan, image_sizes, table, map, skip=plan.skip_unreadable)
    except ConnectionError as error:
        raise InputError(f"{plan.data}: the storage fails ({error}); start again when it works") from None
    checked, rows = found.samples, None
    told: list[str] = []
    if table is None:
        problems, checked, told = audited(plan, found)
        stops = findings.stops(problems)
        if stops:
            raise InputError(stops)
        rows = findings.table(problems)
    return Checked(checked, found.folders, samples.fingerprint(checked, found.hashes), rows, told)


# --- Decoding --------------------------------------------------------------------------------------------------------


class Decoded(NamedTuple):
    samples: pd.DataFrame
    folders: dict[int, Path]
    hashes: list[str]
    lost: list[tuple[str, str]]  # path and reason of each image that was left out


def decoded(
    plan: SearchPlan, image_sizes: list[int], table: pd.DataFrame | None, map: Callable[..., Any], *, skip: bool
) -> Decoded:
    if len(image_sizes) > MOST_SIZES:
        cure = "give a few choices, or a range with a step"
        raise InputError(f"image_size: takes {len(image_sizes)} values, each of which is decoded and kept; {cure}")
    cache = _cache()
    data = plan.data
    if data is None:
        data = str(phantoms.write_phantoms(cache / f"phantoms-{phantoms.VERSION}"))
        if table is not None:  # drawn anew: the run may come from another machine
            table = table.assign(file=[os.path.join(data, path) for path in table["path"]])
    if table is None:
        columns = {key: getattr(plan, key) for key in SETTINGS if key.endswith(("_column", "_fraction"))}
        table = samples.load_samples(data, **columns)
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
        if unreadable:  # rows go, so every size begins anew
            lost = [(str(table["path"][index]), reason) for index, reason in sorted(unreadable.items())]
            again = decoded(plan, image_sizes, _without(table, unreadable, skip), map, skip=skip)
            return again._replace(lost=lost + again.lost)
    return Decoded(table, folders, hashes, [])


def _cache() -> Path:
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{cache}: {error.strerror}; set FINETUNE_SEARCH_CACHE to a folder of yours") from None
    if not os.access(cache, os.W_OK | os.X_OK, effective_ids=True):
        raise InputError(f"{cache}: no permission to write there; set FINETUNE_SEARCH_CACHE to a folder of yours")
    return cache


def _without(table: pd.DataFrame, unreadable: dict[int, str], skip: bool) -> pd.DataFrame:
    listed = [f"{table['file'][index]}: {reason}" for index, reason in sorted(unreadable.items())]
    if not skip:
        cure = "repair or remove them, or leave them out with --set skip_unreadable=true"
        raise InputError([*listed, f"{len(listed)} of {len(table)} images can't be read; {cure}"])
    kept = table.drop(index=list(unreadable)).reset_index(drop=True)
    gone = set(zip(table["label"], table["split"], strict=True)) - set(zip(kept["label"], kept["split"], strict=True))
    if gone:
        lost = ", ".join(f"{label} in {split}" for label, split in sorted(gone))
        raise InputError([*listed, f"no readable image is left of {lost}; repair some of these"])
    return kept


# --- Auditing --------------------------------------------------------------------------------------------------------


def audited(plan: SearchPlan, decoded: Decoded) -> tuple[list[Finding], pd.DataFrame, list[str]]:
    """All findings, the samples as the search is to take them, and what the screen shows."""
    from tuning.checks import shortcuts  # takes a second to load

    folder = decoded.folders[_size(list(decoded.folders))]
    facts = images.read_facts(folder)
    equal = findings.equal_images(facts["pixels_sha256"].tolist())
    table = _with_equals_together(decoded.samples, equal, plan)
    bars = bars_of(images.open_images(folder), facts) if plan.fit == "letterbox" else None
    near = _near(folder, equal, bars)
    copies = np.column_stack([near.a, near.b])[near.copies]
    unit = leaks.units(_groups(table), np.concatenate([np.array(equal, dtype=np.int64).reshape(-1, 2), copies]))
    labels = table["label"].tolist()
    chosen = shortcuts.sampled(labels, unit)
    pictures = shrunk(images.open_images(folder), chosen, shortcuts.SIDE).astype(np.float32)
    rules = shortcuts.shortcuts(pictures, facts.iloc[chosen], [labels[index] for index in chosen], unit[chosen])
    found = findings.of_unreadable(decoded.lost, plan.skip_unreadable)
    found += findings.of_groups(table, plan.on_leak)
    found += findings.of_copies(table, equal, decoded.hashes, near, plan.on_leak)
    found += findings.of_imbalance(table["label"])
    found += findings.of_shortcuts(rules or [], plan.fit, plan.drop_colour)
    moved = table
    if plan.on_leak == "move":
        splits = leaks.brought_together(table["split"].tolist(), unit)
        found = findings.with_moves(found, table, splits, unit)
        moved = table.assign(split=pd.Series(splits, dtype=object))
        _check_classes(table, moved)
    told = findings.summary(found, int((moved["split"] != table["split"]).sum()))
    if equal and table.attrs["drawn"]:
        told.append(f"  {', '.join(table.attrs['drawn'])} were drawn so that equal images lie in one of them")
    if untried := sorted(set(labels) - {labels[index] for index in chosen if rules is not None}):
        classes = f"{len(untried)} of {len(set(labels))} classes, such as {untried[0]}"
        told.append(f"  shortcuts are not sought for {classes}: it takes two, with images of two groups each or more")
    if len(table) > MOST_IMAGES:
        told.append(f"  near duplicates are not sought among more than {MOST_IMAGES:,} images")
    return found, moved.assign(unit=unit), told


def _groups(table: pd.DataFrame) -> list[str | None]:
    return [None if pd.isna(group) else group for group in table["group"]]


def _with_equals_together(table: pd.DataFrame, equal: list[tuple[int, int]], plan: SearchPlan) -> pd.DataFrame:
    """The samples with the splits that aren't the user's drawn by image: no image has an equal in another of them.

    Only equal images: what is nearly one depends on the size that is looked at, and splits should not.
    """
    if not (equal and table.attrs["drawn"]):
        return table
    unit = leaks.units(_groups(table), np.array(equal, dtype=np.int64))
    names = table["group"].where(table["group"].notna(), table["path"]).groupby(unit).transform("first")
    fractions = {"val_fraction": plan.val_fraction, "test_fraction": plan.test_fraction}
    try:
        return samples.drawn(table, names.tolist(), **fractions)
    except InputError as error:
        raise InputError([f"with equal images in one split there are {fault}" for fault in error.faults]) from None


def _size(sizes: list[int]) -> int:
    """The size that is audited: the smallest that shows the details."""
    return min((size for size in sizes if size >= SIDE), default=max(sizes))


def _near(folder: Path, equal: list[tuple[int, int]], bars: Ints | None) -> Pairs:
    """Near duplicates among images that equal no other, kept beside the decoded images."""
    kept = folder / f"near-{VERSION}.parquet"
    if not kept.exists():
        shown = images.open_images(folder)
        if len(shown) > MOST_IMAGES:
            return Pairs(*(np.empty(0, dtype) for dtype in (np.int64, np.int64, np.float32, bool)))
        alone = np.setdiff1d(np.arange(len(shown)), [later for _, later in equal])
        grey = np.empty((len(alone), SIDE, SIDE), dtype=np.uint8)
        bars = np.zeros((len(shown), 2), dtype=np.int64) if bars is None else bars
        for bar in np.unique(bars[alone], axis=0):
            chosen = (bars[alone] == bar).all(axis=1)
            grey[chosen] = shrunk(shown, alone[chosen], SIDE, grey=True, bars=bar)[:, :, :, 0]
        pairs = near_duplicates(grey)
        pairs = pairs._replace(a=alone[pairs.a], b=alone[pairs.b])
        with tables.replacing(kept) as temporary:
            pq.write_table(pa.table(pairs._asdict()), temporary)
    return Pairs(*(column.to_numpy() for column in pq.read_table(kept).itercolumns()))


def _check_classes(before: pd.DataFrame, after: pd.DataFrame) -> None:
    had, has = (set(zip(table["label"], table["split"], strict=True)) for table in (before, after))
    if had - has:
        lost = ", ".join(f"{label} in {split}" for label, split in sorted(had - has))
        cure = "move groups by hand, or take the split column out to have the splits drawn by group"
        raise InputError(f"on_leak=move: bringing groups and copies together would leave no image of {lost}; {cure}")
