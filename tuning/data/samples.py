"""Read a folder of class folders or a manifest into one table of samples."""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd

from tuning.data.folders import Lister, Sample, local_entries, read_folder, stored_entries
from tuning.data.labels import by_pattern
from tuning.data.reading import Reading
from tuning.data.rows import read_rows
from tuning.data.splits import random_splits
from tuning.record import storage
from tuning.record.subgroups import subgroups_of
from tuning.record.tables import SUBGROUP
from tuning.record.targets import SIGN, class_names, encoded, named, written
from tuning.settings.config import InputError, without_secrets
from tuning.settings.words import are, count, examples

WANTED = "give a folder of class folders, or a manifest such as a CSV file"


def load_samples(
    data: str, *, val_fraction: float = 0.2, test_fraction: float = 0.2, evaluated: bool = False, **reading: Any
) -> pd.DataFrame:
    """Return the table of samples of a data set, each in a split.

    A folder holds class folders, or train, val and test folders with class folders in them; other folders beside a
    train folder are ignored. A manifest's paths are absolute or relative to its own folder; where no image is at its
    path, it is looked for by name below that folder. Given splits are kept, even if a group is in several of them,
    which the audit reports. Without val, train is split at random; without any split all images are.

    Args:
        data: folder, or manifest (text with any delimiter, JSON, Excel, Parquet); a path or a URI.
        val_fraction: share of all images (if train is given: of its images) for validation.
        test_fraction: share of all images for the test set if no split is given.
        evaluated: the images are for a test alone: splits mean nothing, and classes may be missing.
        reading: fields of `reading.Reading`, by which a manifest is read.

    Returns:
        One row per image, sorted by path: `path` (relative to the root if it lies below, with slashes), `file`
        (absolute path or URI), `label`, `split` (train, val or test), `group` (None if no groups are given); Python
        strings; several labels of an image are one text, see `record.targets`. `attrs["random_splits"]` names the
        splits made here: none, train and val, or all three; `attrs["remarks"]` are lines for the user: what was left
        out, and what may not be meant; `attrs["labels"]` the labels that the data names, if images may have several;
        `attrs["listing"]` is a digest of what the data says, before anything is drawn, moved or left out.

    Raises:
        InputError: every fault found in the data.
    """
    root = storage.absolute(data).rstrip("/") or "/"
    settings = {name: value for name, value in reading.items() if value is not None}
    settings |= {name: storage.absolute(settings[name]) for name in ("images", "join") if name in settings}
    if files := settings.get("split_files"):
        settings["split_files"] = {split: storage.absolute(file) for split, file in files.items()}
    how = Reading(**settings, evaluated=evaluated)
    faults: list[str] = []
    if val_fraction + test_fraction >= 1:
        faults.append(
            f"val_fraction + test_fraction: must be below 1 to leave images for training, got {val_fraction} + "
            f"{test_fraction}; lower one of them"
        )
    remarks: list[str] = []
    try:
        read = _read_stored if storage.is_uri(root) else _read_local
        samples = read(root, how, faults, remarks)
        uris = [sample.file for sample in samples if storage.is_uri(sample.file)]
        known = dict(zip(uris, storage.stored(uris), strict=True))
    except OSError as error:
        raise InputError(f"{data}: can't be read ({error}); is the storage reachable, and are its keys set?") from None
    missing = [
        path for path, file, *_ in samples if (known[file] is None if file in known else not os.path.isfile(file))
    ]
    if missing:
        faults.append(
            f"{data}: {are(len(missing), 'image file')} missing ({examples(missing)}); restore them or leave them out"
        )
    if faults:
        raise (AbsentFiles if missing and len(faults) == 1 else InputError)(faults)

    several = bool(samples) and how.multi_label
    if odd := [] if several else sorted({str(label) for _, _, label, *_ in samples if str(label).startswith(SIGN)}):
        raise InputError(f"{data}: the class {odd[0]!r} begins with {SIGN!r}; rename it")
    samples.sort(key=lambda sample: sample.path)
    given = {sample.split for sample in samples}
    table = pd.DataFrame(samples, columns=list(Sample._fields), dtype=object).drop(columns="subgroups")
    table = table.assign(
        **{
            f"{SUBGROUP}{name}": pd.Series([sample.subgroups[place] for sample in samples], dtype=object)
            for place, name in enumerate(how.subgroups)
        }
    )
    splits = [] if "val" in given else ["train", "val"] if "train" in given else ["train", "val", "test"]
    table.attrs |= {"random_splits": splits, "remarks": remarks}
    table.attrs["labels"] = sorted(how.labels)
    parts, left_out = subgroups_of(table)  # of all images, so that they are the same in each split
    remarks += left_out
    table = table.drop(columns=[f"{SUBGROUP}{name}" for name in how.subgroups if name not in parts])
    table = table.assign(**{f"{SUBGROUP}{name}": pd.Series(cells, dtype=object) for name, cells in parts.items()})
    if evaluated:
        return table.assign(split="test")
    units = [sample.group or sample.path for sample in samples]
    try:
        split = random_splits(table, units, val_fraction=val_fraction, test_fraction=test_fraction)
        split.attrs["listing"] = _listing(split)
        return with_learnable_labels(split) if several else split
    except InputError as error:
        raise InputError([f"{data}: {fault}" for fault in error.faults]) from None


def with_learnable_labels(samples: pd.DataFrame) -> pd.DataFrame:
    """Return samples without labels that no image, or every image, of training or validation has; a remark names them.

    Raises:
        InputError: no label is left.
    """
    names = class_names(samples["label"])
    targets = encoded(samples["label"], names)
    inside = [targets[(samples["split"] == split).to_numpy()] for split in ("train", "val")]
    kept = [all((part[:, place] == value).any() for part in inside for value in (0, 1)) for place in range(len(names))]
    if not any(kept):
        which = examples(names) or "none at all"
        what = f"no label has images with it and without it in training and validation ({which})"
        raise InputError(f"{what}; give more images, or splits in which a label is both present and absent")
    if all(kept):
        return samples
    lost = [name for name, keep in zip(names, kept, strict=True) if not keep]
    what = f"left out: {count(len(lost), 'label')} that no image, or every image, of training or validation has"
    line = f"{what}: {examples(lost)}"
    texts = [
        written({name: known for name, known in named(label).items() if name not in lost}) for label in samples["label"]
    ]
    kept_labels = samples.assign(label=pd.Series(texts, index=samples.index, dtype=object))
    kept_labels.attrs["remarks"] = [*samples.attrs.get("remarks", []), line]
    return kept_labels


class AbsentFiles(InputError):
    """The data is listed as it should be, but files are missing."""


def fingerprint(samples: pd.DataFrame, hashes: Sequence[str]) -> str:
    """Return a sha256, in hex, that changes with any path, label, split, group or content hash of an image."""
    digest = hashlib.sha256()
    columns = [samples[name] for name in ("path", "label", "split", "group")]
    for path, label, split, group, content in zip(*columns, hashes, strict=True):
        row = [path, label, split, None if pd.isna(group) else group, content]
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def _listing(table: pd.DataFrame) -> str:
    """Return a digest of what data says of its images: paths, labels, groups, and the splits that it gives."""
    given = table["split"].where(~table["split"].isin(table.attrs["random_splits"]), None)
    return fingerprint(table.assign(split=given), [""] * len(table))


# --- Folders ---------------------------------------------------------------------------------------------------------


def _read_local(root: str, how: Reading, faults: list[str], remarks: list[str]) -> list[Sample]:
    if os.path.isdir(root):
        junk: set[str] = set()
        samples = _read_folder(root, partial(local_entries, faults=faults, junk=junk), how, faults, remarks)
        if junk:
            entries = count(len(junk), "entry", "entries")
            first = os.path.basename(min(junk))
            remarks.append(f"left out: {entries} (hidden, or left by an archive or a system), such as {first}")
        return samples
    if os.path.exists(root):
        return read_rows(root, how, faults, remarks)
    faults.append(f"{root}: no such folder or file; {WANTED}")
    return []


def _read_stored(root: str, how: Reading, faults: list[str], remarks: list[str]) -> list[Sample]:
    """Samples of a folder or manifest in a storage; a folder is listed with all below it in one request."""
    if storage.stored([root]) != [None]:
        return read_rows(root, how, faults, remarks)
    files = storage.files_below(root)
    if not files:
        faults.append(f"{root}: nothing is there; {WANTED}")
        return []
    return _read_folder(root, stored_entries(root, files), how, faults, remarks)


def _read_folder(root: str, entries_of: Lister, how: Reading, faults: list[str], remarks: list[str]) -> list[Sample]:
    remarks += [
        f"{setting} ({without_secrets(str(value))!r}) is of a manifest: names of folders are classes and splits"
        for setting, value in vars(how).items()
        if setting not in ("group_pattern", "evaluated", "multi_label", "subgroups")
        and value != getattr(Reading(), setting)
    ]
    if how.multi_label:
        faults.append(
            f"{root}: multi_label needs a manifest, since an image lies in one class folder only; give a table with a "
            "column of labels, or columns of ones and zeros"
        )
    if how.subgroups:
        faults.append(f"{root}: subgroups are columns of a manifest, which a folder is not; leave them out")
    samples = read_folder(root, entries_of, faults, remarks, evaluated=how.evaluated)
    if how.group_pattern is None:
        return samples
    try:
        groups = by_pattern(how.group_pattern, [sample.path for sample in samples], "group_pattern")
    except InputError as error:
        faults += error.faults
        return samples
    return [sample._replace(group=group) for sample, group in zip(samples, groups, strict=True)]
