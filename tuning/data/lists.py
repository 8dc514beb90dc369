"""Manifests that belong together: tables that are joined, and files that list the images of splits."""

import os
import re
from collections import defaultdict
from collections.abc import Mapping

from tuning.data.folders import Sample
from tuning.data.labels import mark_columns, one_hot_columns, text
from tuning.data.manifests import Manifest, read_manifest
from tuning.data.places import Ends, normalised
from tuning.data.reading import Reading
from tuning.settings.config import InputError
from tuning.settings.words import are, count, examples


def with_joined(file: str, manifest: Manifest, how: Reading, remarks: list[str]) -> Manifest:
    """Add the columns of the manifest `join` to the rows that agree in the columns that both have.

    Raises:
        InputError: no column is common, no row agrees, or rows of the other say different things of one.
    """
    other = how.join
    if other is None:
        return manifest
    added = read_manifest(other, manifest.names, None, remarks)
    numbers = re.compile(r"|Unnamed: \d+")  # the columns of row numbers that pandas writes
    names = [name for name in added.names if name in added.columns and not numbers.fullmatch(name)]
    keys = [name for name in names if name in manifest.columns]
    if not keys:
        raise InputError(f"join: {other} has no column of {file} (its columns: {', '.join(map(repr, added.names))})")
    cells = {name: [text(cell) for cell in added.columns[name]] for name in names}
    known: dict[tuple[str | None, ...], int] = {}
    for row, key in enumerate(zip(*(cells[name] for name in keys), strict=True)):
        first = known.setdefault(key, row)
        if any(cells[name][first] != cells[name][row] for name in names):
            raise InputError(f"join: {other} has several rows of {', '.join(map(str, key))} that differ; keep one")
    mine = zip(*([text(cell) for cell in manifest.columns[name]] for name in keys), strict=True)
    places = [None if None in key else known.get(key) for key in mine]
    kept = [row for row, place in enumerate(places) if place is not None]
    if not kept:
        raise InputError(f"join: no row of {other} agrees with one of {file} in {examples(map(repr, keys))}")
    remarks.append(f"{os.path.basename(other)} is joined by {examples(map(repr, keys))}")
    if lacking := len(places) - len(kept):
        what = f"{count(lacking, 'row')} of {os.path.basename(file)} that {os.path.basename(other)} says nothing of"
        remarks.append(f"left out: {what}")
    columns = {name: [manifest.columns[name][row] for row in kept] for name in manifest.columns}
    columns |= {
        name: [added.columns[name][place] for place in places if place is not None]
        for name in names
        if name not in keys
    }
    return Manifest([*manifest.names, *(name for name in names if name not in manifest.names)], columns)


def images_listed(file: str, how: Reading, remarks: list[str]) -> tuple[Manifest, list[str]]:
    """Return a split's file as a manifest, and the names of images in it, in the path's or the first column."""
    try:
        manifest = read_manifest(file, how.wanted, how.columns, remarks)
    except InputError:
        if how.columns is None:
            raise
        manifest = read_manifest(file, how.wanted, None, remarks)  # a list of another form than the manifest
    first = how.path_column if how.path_column in manifest.columns else manifest.names[0]
    cells = [*([] if first == how.path_column else [first]), *manifest.columns[first]]
    return manifest, [name for cell in cells if (name := text(cell)) is not None]


def has_labels(manifest: Manifest, how: Reading) -> bool:
    """Return whether a manifest has paths and labels of its own."""
    columns, labels = manifest.columns, how.label_columns or [how.label_column]
    there = how.label_pattern is not None or all(name in columns for name in labels)
    by_themselves = mark_columns if how.multi_label else one_hot_columns
    return how.path_column in columns and (there or bool(by_themselves(columns, how.not_labels)))


def split_by_lists(
    file: str,
    samples: list[Sample],
    lists: Mapping[str, list[str]],
    how: Reading,
    faults: list[str],
    remarks: list[str],
) -> list[Sample]:
    """Give samples the splits of the files that list them, by the ends of their paths; the others are for training.

    Args:
        lists: names of the images of splits.
    """
    of_path: dict[str, list[int]] = defaultdict(list)
    for row, sample in enumerate(samples):
        of_path[normalised(sample.path)].append(row)
    ends = Ends(of_path)
    of_row: dict[int, str] = {}
    for split, names in lists.items():
        listed = os.path.basename(how.split_files[split])
        hits = {name: ends.find(name) for name in names}
        if several := [f"{name} ({' and '.join(found[:2])})" for name, found in hits.items() if len(found) > 1]:
            faults.append(f"{listed}: {are(len(several), 'name')} of several images ({examples(several)}); add folders")
        if unknown := [name for name, found in hits.items() if not found]:
            what = f"{listed} names {count(len(unknown), 'image')} that {os.path.basename(file)} lacks"
            (faults if len(unknown) == len(hits) else remarks).append(f"{what}: {examples(unknown)}")
        for row in (row for found in hits.values() if len(found) == 1 for row in of_path[found[0]]):
            if of_row.setdefault(row, split) != split:
                faults.append(f"{samples[row].path}: is listed for {of_row[row]} and for {split}; keep one")
                return samples
    kept = [
        sample._replace(split=of_row.get(row) or sample.split or "train")
        for row, sample in enumerate(samples)
        if row in of_row or sample.split or "train" not in lists
    ]
    if len(kept) < len(samples):
        remarks.append(f"left out: {count(len(samples) - len(kept), 'image')} in none of the lists of splits")
    return kept
