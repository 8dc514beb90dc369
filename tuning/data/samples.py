"""Read a folder of class folders or a manifest into one table of samples."""

import csv
import hashlib
import json
import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from io import TextIOWrapper
from typing import Any, BinaryIO

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from tuning.data.folders import SPLIT_WORDS, Sample, class_faults, local_entries, read_folder, stored_entries
from tuning.data.splits import random_splits
from tuning.record import storage
from tuning.settings.config import InputError
from tuning.settings.words import are, count, examples

NO_VALUE = ("NA", "N/A", "<NA>", "NaN", "nan", "NULL", "null", "None")  # as R, pandas and databases write no value
LIKELY = {  # names, without case and punctuation, of columns that are split or group by other names
    "split_column": ("split", "set", "dataset", "fold", "partition", "subset", "phase"),
    "group_column": (
        "group",
        "patient",
        "patientid",
        "patientname",
        "patientno",
        "patientnumber",
        "mrn",
        "recordid",
        "subject",
        "subjectid",
        "pid",
        "case",
        "caseid",
        "study",
        "studyid",
    ),
}
WANTED = "give a folder of class folders, or a CSV or Parquet manifest"


def load_samples(
    data: str,
    *,
    path_column: str = "path",
    label_column: str = "label",
    split_column: str = "split",
    group_column: str = "group",
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
) -> pd.DataFrame:
    """Return the table of samples of a data set, each in a split.

    A folder holds class folders, or train, val and test folders with class folders in them; other folders beside a
    train folder are ignored. A manifest's paths are absolute or relative to its own folder. Given splits are kept, even
    if a group is in several of them, which the audit reports. Without val, train is split at random; without any split
    all images are.

    Args:
        data: folder, or CSV or Parquet manifest; a path or a URI.
        path_column, label_column: columns of the manifest.
        split_column, group_column: columns of the manifest that may be missing if they have their default names.
        val_fraction: share of all images (if train is given: of its images) for validation.
        test_fraction: share of all images for the test set if no split is given.

    Returns:
        One row per image, sorted by path: `path` (relative to the root if it lies below, with slashes), `file`
        (absolute path or URI), `label`, `split` (train, val or test), `group` (None if no groups are given); Python
        strings. `attrs["random_splits"]` names the splits made here: none, train and val, or all three;
        `attrs["remarks"]` are lines for the user: what was left out, and what may not be meant;
        `attrs["listing"]` is a digest of what the data says, before anything is drawn, moved or left out.

    Raises:
        InputError: every fault found in the data.
    """
    root = data.rstrip("/") if storage.is_uri(data) else os.path.abspath(os.path.expanduser(data))
    columns = (path_column, label_column, split_column, group_column)
    faults: list[str] = []
    if val_fraction + test_fraction >= 1:
        faults.append(
            f"val_fraction + test_fraction: must be below 1 to leave images for training, got {val_fraction} + "
            f"{test_fraction}; lower one of them"
        )
    remarks: list[str] = []
    try:
        read = _read_stored if storage.is_uri(root) else _read_local
        samples = read(root, columns, faults, remarks)
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

    samples.sort(key=lambda sample: sample.path)
    given = {sample.split for sample in samples}
    table = pd.DataFrame(samples, columns=list(Sample._fields), dtype=object)
    splits = [] if "val" in given else ["train", "val"] if "train" in given else ["train", "val", "test"]
    table.attrs |= {"random_splits": splits, "remarks": remarks}
    units = [sample.group or sample.path for sample in samples]
    try:
        split = random_splits(table, units, val_fraction=val_fraction, test_fraction=test_fraction)
        split.attrs["listing"] = _listing(split)
        return split
    except InputError as error:
        raise InputError([f"{data}: {fault}" for fault in error.faults]) from None


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


def _read_local(root: str, columns: tuple[str, str, str, str], faults: list[str], remarks: list[str]) -> list[Sample]:
    if os.path.isdir(root):
        remarks += [
            f"{column!r} is a column of a manifest: in a folder the names of folders are classes and splits"
            for column, usual in zip(columns, ("path", "label", "split", "group"), strict=True)
            if column != usual
        ]
        return read_folder(root, partial(local_entries, faults=faults), faults, remarks)
    if os.path.exists(root):
        return _read_manifest(root, columns, faults, remarks)
    faults.append(f"{root}: no such folder or file; {WANTED}")
    return []


def _read_stored(root: str, columns: tuple[str, str, str, str], faults: list[str], remarks: list[str]) -> list[Sample]:
    """Samples of a folder or manifest in a storage; a folder is listed with all below it in one request."""
    if storage.stored([root]) != [None]:
        return _read_manifest(root, columns, faults, remarks)
    files = storage.files_below(root)
    if not files:
        faults.append(f"{root}: nothing is there; {WANTED}")
        return []
    return read_folder(root, stored_entries(root, files), faults, remarks)


# --- Manifests -------------------------------------------------------------------------------------------------------


def _read_manifest(
    file: str, columns: tuple[str, str, str, str], faults: list[str], remarks: list[str]
) -> list[Sample]:
    """Samples of a manifest whose columns of path, label, split and group are given."""
    suffix = os.path.splitext(file)[1].lower()
    if suffix not in (".csv", ".parquet"):
        faults.append(f"{file}: a manifest must end in .csv or .parquet, not in {suffix or 'no suffix'}; convert it")
        return []
    try:
        there, table = _read_csv(file) if suffix == ".csv" else _read_parquet(file, columns)
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        faults.append(f"{file}: can't be read as {suffix} ({error}); save it again (CSV in UTF-8)")
        return []
    except InputError as error:
        faults += error.faults
        return []

    settings = ("path_column", "label_column", "split_column", "group_column")
    cells: list[list[str | None]] = []
    for setting, column in zip(settings, columns, strict=True):
        # Split and group may be missing, unless the user named a column for them.
        optional = setting in ("split_column", "group_column") and column == setting.removesuffix("_column")
        if column not in there and optional:
            remarks += [
                f"column {name!r} isn't used; if it is meant, --set {setting}={name!r}"
                for name in there
                if re.sub(r"[\W_]+", "", name.lower()) in LIKELY[setting]
            ]
        if column not in there and not optional:
            faults.append(
                f"{file}: has no column {column!r} (its columns: {', '.join(map(repr, there)) or 'none'}); name one "
                f"with `--set {setting}=...`"
            )
        if there.count(column) > 1:
            faults.append(f"{file}: has {there.count(column)} columns named {column!r}; rename the others")
        values = [_cell_text(value) for value in table.get(column, [])]
        if setting in ("label_column", "group_column"):
            values = _one_spelling(values)
        if setting == "group_column":
            values = [None if value in NO_VALUE else value for value in values]
        empty = [row for row, value in enumerate(values, start=1) if value is None]
        if empty:
            unique = " (a unique id for each image of an unknown group)" if setting == "group_column" else ""
            cure = "" if setting in ("path_column", "label_column") else f"{unique}, or remove the column"
            what = count(len(empty), "empty cell") + (" or NA" if setting == "group_column" else "")
            rows = f"rows below the header: {examples(empty)}"
            faults.append(f"{file}: column {column!r} has {what} ({rows}); fill them{cure}")
        cells.append(values)
    if table and not any(table.values()):
        faults.append(f"{file}: has no rows; add one for each image")

    n_rows = max(map(len, cells))
    paths, labels, splits, groups = (values or [None] * n_rows for values in cells)
    unknown = sorted({split for split in splits if split is not None and split.lower() not in SPLIT_WORDS})
    if unknown:
        faults.append(
            f"{file}: column {columns[2]!r} contains {examples(map(repr, unknown))}; a split is train, val or test"
        )
    root = os.path.dirname(file)
    samples = [
        Sample(*_located(root, path), label, SPLIT_WORDS.get((split or "").lower()), group)
        for path, label, split, group in zip(paths, labels, splits, groups, strict=True)
        if path is not None
    ]
    faults += [f"{file}: {fault}" for fault in _manifest_faults(samples)]
    return samples


def _read_csv(file: str) -> tuple[list[str], dict[str, list[Any]]]:
    """Column names and columns of text; only an empty cell is empty, for `NA` and `None` may be classes."""
    with _open(file) as raw, TextIOWrapper(raw, encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, skipinitialspace=True, strict=True)
        there = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = there
        if not there:
            raise InputError(f"{file}: is empty; give it a header and a row for each image")
        if there[0].lower().startswith("sep="):
            raise InputError(f"{file}: its first line, {there[0]!r}, is for spreadsheets alone; delete it")
        if len(there) == 1 and (other := next((sign for sign in ";\t" if sign in there[0]), None)):
            raise InputError(f"{file}: its columns are separated by {other!r}; save it with commas")
        table: dict[str, list[Any]] = {name: [] for name in there}
        for row in reader:
            if any(row.pop(None, [])):  # None holds the cells beyond the header
                raise InputError(
                    f"{file}: line {reader.line_num} has more cells than the header; quote texts that contain commas"
                )
            if any(row.values()):  # spreadsheets leave rows of commas behind
                for name, value in row.items():
                    table[name].append(value)
    return there, table


def _read_parquet(file: str, columns: Sequence[str]) -> tuple[list[str], dict[str, list[Any]]]:
    """All column names, and the wanted columns as Python values."""
    with _open(file) as stream:
        content = pq.ParquetFile(stream)
        schema = content.schema_arrow
        wanted = [name for name in dict.fromkeys(columns) if schema.names.count(name) == 1]
        types = {name: schema.field(name).type for name in wanted}
        nested = [f"{name!r} contains {kind}" for name, kind in types.items() if pa.types.is_nested(kind)]
        if nested:
            raise InputError(f"{file}: column {examples(nested)}; give one value per image")
        return schema.names, {name: content.read(columns=[name])[name].to_pylist() for name in wanted}


def _open(file: str) -> BinaryIO:
    return storage.readable(file) if storage.is_uri(file) else open(file, "rb")


def _cell_text(value: Any) -> str | None:
    if value is None or value != value:
        return None
    # pandas makes a column of whole numbers with a gap one of floats: patient 123 must not become 123.0.
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, bytes):  # as Spark and Impala store text
        value = value.decode("utf-8", "backslashreplace")
    return str(value).strip() or None


def _one_spelling(values: list[str | None]) -> list[str | None]:
    """Write a number that is there as 3 and as 3.0 as 3: pandas adds the .0 to whole numbers of a part with a gap."""
    there = set(values)
    matches = [re.fullmatch(r"(-?\d+)\.0+", value or "") for value in values]
    return [
        found[1] if found is not None and found[1] in there else value
        for found, value in zip(matches, values, strict=True)
    ]


def _located(root: str, path: str) -> tuple[str, str]:
    """Path as shown and file of an image, from its path in a manifest that lies in `root`."""
    slashed = path.replace("\\", "/")
    if storage.is_uri(path) or (storage.is_uri(root) and not os.path.isabs(path)):
        file = path if storage.is_uri(path) else storage.joined(root, posixpath.normpath(slashed))
        return file.removeprefix(f"{root}/"), file
    file = os.path.abspath(os.path.join(root, slashed))
    below = file.startswith(os.path.join(root, ""))
    shown = os.path.relpath(file, root) if below or not os.path.isabs(path) else file
    return shown.replace(os.sep, "/"), file


def _manifest_faults(samples: list[Sample]) -> list[str]:
    """Faults between rows: duplicate paths, classes that differ between splits."""
    faults: list[str] = []
    twice = [path for path, rows in Counter(sample.path for sample in samples).items() if rows > 1]
    if twice:
        faults.append(f"{are(len(twice), 'path')} listed more than once ({examples(twice)}); keep one row of each")
    classes: dict[str | None, set[str]] = defaultdict(set)
    for sample in samples:
        if sample.label is not None:
            classes[sample.split].add(sample.label)
    given = {sample.split for sample in samples} - {None}
    if given and "train" not in given:
        faults.append(f"no image is in the split train, only in {', '.join(sorted(map(str, given)))}; assign some")
    if given and None in classes:
        del classes[None]  # rows whose split is empty or unknown, which is already a fault
    return faults + class_faults(classes)
