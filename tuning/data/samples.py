"""Read a folder of class folders or a manifest into one table of samples, split alike on every machine."""

import csv
import hashlib
import json
import os
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import TextIOWrapper
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from tuning.record import storage
from tuning.settings.config import FORMATS, InputError

IMAGE_SUFFIXES = tuple(FORMATS)
SPLIT_WORDS = {"train": "train", "training": "train"}
SPLIT_WORDS |= {"val": "val", "valid": "val", "validation": "val", "test": "test", "testing": "test"}
SHOWN = 5  # examples in one message


class Sample(NamedTuple):
    """One row of the table; what isn't known yet is None."""

    path: str
    file: str
    label: str | None
    split: str | None
    group: str | None


class Entry(NamedTuple):
    """A file or folder in a storage, as `os.scandir` gives those of this machine."""

    name: str
    path: str
    folder: bool

    def is_dir(self) -> bool:
        return self.folder


Lister: TypeAlias = Callable[[str, list[str]], Sequence[os.DirEntry[str] | Entry]]


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
    """The table of samples of a data set, each in a split.

    A folder holds class folders, or train, val and test folders with class folders in them; folders beside a train
    folder that name no split are left out. A manifest's paths are absolute or relative to its own folder.
    Given splits are kept, even where they tear a group apart, which is for the audit to tell; without val it is drawn
    from train; with no split at all every split is drawn.

    Args:
        data: folder, or CSV or Parquet manifest; a path or a URI.
        path_column, label_column: columns of the manifest.
        split_column, group_column: columns of the manifest that may be missing if they have their default names.
        val_fraction: share of all images (where train is given: of its images) drawn for validation.
        test_fraction: share of all images drawn for the test where no split is given.

    Returns:
        One row per image, sorted by path: `path` (relative to the root where it lies below, with slashes), `file`
        (absolute path or URI), `label`, `split` (train, val or test), `group` (None where no groups are given); Python
        strings. `attrs["drawn"]` names the splits that were drawn here: none, or train and val, or all three.

    Raises:
        InputError: every fault found in the data.
    """
    root = data.rstrip("/") if storage.is_uri(data) else os.path.abspath(os.path.expanduser(data))
    columns = (path_column, label_column, split_column, group_column)
    faults: list[str] = []
    if val_fraction + test_fraction >= 1:
        faults.append(
            f"val_fraction + test_fraction: must be below 1 so that images are left to train on, got {val_fraction} + "
            f"{test_fraction}; lower one of them"
        )
    samples: list[Sample] = []
    try:
        samples = _read_stored(root, columns, faults) if storage.is_uri(root) else _read_local(root, columns, faults)
        missing = [sample.path for sample, there in zip(samples, _there(samples), strict=True) if not there]
    except OSError as error:
        raise InputError(f"{data}: can't be read ({error}); is the storage reached, and are its keys given?") from None
    if missing:
        faults.append(
            f"{data}: {len(missing)} image files are missing ({_examples(missing)}); bring them or take them out"
        )
    if faults:
        raise InputError(faults)

    samples.sort(key=lambda sample: sample.path)
    given = {sample.split for sample in samples}
    table = pd.DataFrame(samples, columns=list(Sample._fields), dtype=object)
    table.attrs["drawn"] = [] if "val" in given else ["train", "val"] if "train" in given else ["train", "val", "test"]
    units = [sample.group or sample.path for sample in samples]
    try:
        return drawn(table, units, val_fraction=val_fraction, test_fraction=test_fraction)
    except InputError as error:
        raise InputError([f"{data}: {fault}" for fault in error.faults]) from None


def drawn(samples: pd.DataFrame, units: Sequence[str], *, val_fraction: float, test_fraction: float) -> pd.DataFrame:
    """The same samples with those splits drawn that the user has not given, which `attrs["drawn"]` names.

    Args:
        samples: table of `load_samples`; those splits may be missing yet.
        units: of each sample, the name of what is to lie in one split.
        val_fraction, test_fraction: as there.

    Raises:
        InputError: a class has too few units.
    """
    names = samples.attrs["drawn"]
    train_fraction = 1 - val_fraction - (test_fraction if "test" in names else 0.0)
    fractions = {"train": train_fraction, "val": val_fraction, "test": test_fraction}
    pool = samples["split"].isna() | samples["split"].isin(names)
    faults: list[str] = []
    found = _with_splits(samples, pool, units, {name: fractions[name] for name in names}, faults)
    if faults:
        raise InputError(faults)
    return found


def _read_local(root: str, columns: tuple[str, str, str, str], faults: list[str]) -> list[Sample]:
    if os.path.isdir(root):
        return _read_folder(root, _entries, faults)
    if os.path.exists(root):
        return _read_manifest(root, columns, faults)
    faults.append(f"{root}: no such folder or file; give a folder of class folders, or a CSV or Parquet manifest")
    return []


def _read_stored(root: str, columns: tuple[str, str, str, str], faults: list[str]) -> list[Sample]:
    """Samples of a folder or manifest in a storage; a folder is listed in one go."""
    if storage.stored([root]) != [None]:
        return _read_manifest(root, columns, faults)
    files = storage.files_below(root)
    if not files:
        faults.append(f"{root}: nothing is there; give a folder of class folders, or a CSV or Parquet manifest")
        return []
    below: dict[str, dict[str, Entry]] = defaultdict(dict)
    for name in files:
        folder, parts = root, name.split("/")
        for part in parts[:-1]:
            below[folder][part] = Entry(part, storage.joined(folder, part), True)
            folder = storage.joined(folder, part)
        below[folder].setdefault(parts[-1], Entry(parts[-1], storage.joined(folder, parts[-1]), False))

    def entries(folder: str, faults: list[str]) -> list[Entry]:
        return sorted(entry for entry in below[folder].values() if not entry.name.startswith("."))

    return _read_folder(root, entries, faults)


def _there(samples: list[Sample]) -> list[bool]:
    """Whether each file is there."""
    uris = [sample.file for sample in samples if storage.is_uri(sample.file)]
    known = dict(zip(uris, storage.stored(uris), strict=True))
    return [
        known[file] is not None if file in known else os.path.isfile(file) for file in (row.file for row in samples)
    ]


def redrawn(samples: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The same samples with training and validation drawn anew, by unit and class, in their shares; test stays.

    A `unit` is what the audit found to belong together: a group with all copies of its images.

    Where a draw leaves training or validation without a class another is made; if none of 20 will do, the samples are
    given back as they are.
    """
    pool = samples["split"] != "test"
    units = list(samples["unit"].map("unit {}".format))
    val_share = float((samples["split"] == "val").sum() / pool.sum())
    for attempt in range(20):
        faults: list[str] = []
        fractions = {"train": 1 - val_share, "val": val_share}
        found = _with_splits(samples, pool, units, fractions, faults, salt=f"{seed} {attempt} ")
        if not faults:
            return found
    return samples


def fingerprint(samples: pd.DataFrame, hashes: Sequence[str]) -> str:
    """What tells one data set from another: a change of any path, label, split, group or image changes it.

    Args:
        samples: table of `load_samples`.
        hashes: content hash of each row's image.

    Returns:
        sha256, in hex.
    """
    digest = hashlib.sha256()
    columns = [samples[name] for name in ("path", "label", "split", "group")]
    for path, label, split, group, content in zip(*columns, hashes, strict=True):
        row = [path, label, split, None if pd.isna(group) else group, content]
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def _examples(values: Iterable[Any]) -> str:
    values = list(values)
    return ", ".join(map(str, values[:SHOWN])) + (f" and {len(values) - SHOWN} more" if len(values) > SHOWN else "")


# --- Folders ---------------------------------------------------------------------------------------------------------


def _read_folder(root: str, entries_of: Lister, faults: list[str]) -> list[Sample]:
    """Samples of a folder of class folders, with or without split folders; faults are appended to `faults`."""
    split_of = {
        entry.name: SPLIT_WORDS[entry.name.lower()]
        for entry in entries_of(root, faults)
        if entry.is_dir() and entry.name.lower() in SPLIT_WORDS
    }
    if len(set(split_of.values())) < len(split_of):
        faults.append(f"{root}: two of the folders {', '.join(split_of)} mean the same split; keep one of each")
    if split_of and "train" not in split_of.values():
        faults.append(
            f"{root}: has {', '.join(split_of)} but no train folder; add one, or rename the folder if it is a class"
        )

    samples: list[Sample] = []
    classes: dict[str | None, set[str]] = defaultdict(set)
    parts: list[str | None] = [*split_of] or [None]
    for part in parts:
        split = split_of[part] if part else None
        folder = storage.joined(root, part) if part else root
        entries = entries_of(folder, faults)
        class_folders = [entry for entry in entries if entry.is_dir()]
        loose = [entry.name for entry in entries if not entry.is_dir() and _is_image(entry.name)]
        if loose:
            faults.append(
                f"{folder}: {len(loose)} images lie directly in it ({_examples(loose)}); put each into the folder of "
                "its class"
            )
        elif not class_folders:
            faults.append(f"{folder}: no class folders; put the images of each class into a folder of its name")
        for entry in class_folders:
            classes[split].add(entry.name)
            files = _list_files(entry.path, entries_of, faults, set())
            images = [file for file in files if _is_image(file)]
            if not images:
                suffixes = sorted({os.path.splitext(file)[1] or "none" for file in files})
                found = f"{len(files)} files with other suffixes: {_examples(suffixes)}" if files else "no files"
                faults.append(
                    f"{entry.path}: no images in this class folder ({found}); put images into it "
                    f"({', '.join(IMAGE_SUFFIXES)}) or take it away"
                )
            for file in images:
                path = file.removeprefix(root).lstrip(os.sep).replace(os.sep, "/")
                samples.append(Sample(path, file, entry.name, split, None))
    faults += [f"{root}: {fault}" for fault in _class_faults(classes)]

    # Neither Parquet nor a hash takes a name that is not Unicode.
    odd = [sample for sample in samples if sample.file.encode("utf-8", "ignore") != os.fsencode(sample.file)]
    if odd:
        faults.append(
            f"{root}: {len(odd)} file names are not UTF-8 ({_examples(repr(row.path) for row in odd)}); rename them"
        )
    return samples


def _entries(folder: str, faults: list[str]) -> list[os.DirEntry[str]]:
    """What lies in a folder, hidden names left out, by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        faults.append(f"{folder}: can't be listed ({error.strerror}); make the folder readable")
        return []


def _list_files(folder: str, entries_of: Lister, faults: list[str], seen: set[str]) -> list[str]:
    """All files below a folder; `seen` holds the real folders already listed, for links may run in a circle."""
    real = os.path.realpath(folder)
    if real in seen:
        return []
    seen.add(real)
    files: list[str] = []
    for entry in entries_of(folder, faults):
        files += _list_files(entry.path, entries_of, faults, seen) if entry.is_dir() else [entry.path]
    return files


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


# --- Manifests -------------------------------------------------------------------------------------------------------


def _read_manifest(file: str, columns: tuple[str, str, str, str], faults: list[str]) -> list[Sample]:
    """Samples of a manifest whose columns of path, label, split and group are given; faults are appended."""
    suffix = os.path.splitext(file)[1].lower()
    if suffix not in (".csv", ".parquet"):
        faults.append(f"{file}: a manifest ends in .csv or .parquet, this one in {suffix or 'nothing'}; convert it")
        return []
    try:
        there, table = _read_csv(file) if suffix == ".csv" else _read_parquet(file, columns)
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        faults.append(f"{file}: can't be read as {suffix[1:].upper()} ({error}); write it again, CSV in UTF-8")
        return []
    except InputError as error:
        faults += error.faults
        return []

    settings = ("path_column", "label_column", "split_column", "group_column")
    cells: list[list[str | None]] = []
    for setting, column in zip(settings, columns, strict=True):
        # Split and group may be missing, unless the user named a column for them.
        optional = setting in ("split_column", "group_column") and column == setting.removesuffix("_column")
        if column not in there and not optional:
            faults.append(
                f"{file}: has no column {column!r}, its columns are {', '.join(map(repr, there)) or 'none'}; name one "
                f"with `--set {setting}=...`"
            )
        if there.count(column) > 1:
            faults.append(f"{file}: has {there.count(column)} columns named {column!r}; rename the others")
        values = [_cell_text(value) for value in table.get(column, [])]
        empty = [row for row, value in enumerate(values, start=1) if value is None]
        if empty:
            cure = "" if setting in ("path_column", "label_column") else ", or take the column out of the manifest"
            if setting == "group_column":
                cure = ", with an id of its own for each image whose group is not known" + cure
            faults.append(
                f"{file}: column {column!r} has {len(empty)} empty cells, in the rows {_examples(empty)} counted below "
                f"the header; fill them{cure}"
            )
        cells.append(values)
    if table and not any(table.values()):
        faults.append(f"{file}: has no rows; give it a row for each image")

    n_rows = max(map(len, cells))
    paths, labels, splits, groups = (values or [None] * n_rows for values in cells)
    unknown = sorted({split for split in splits if split is not None and split.lower() not in SPLIT_WORDS})
    if unknown:
        faults.append(
            f"{file}: column {columns[2]!r} holds {_examples(map(repr, unknown))}; a split is one of train, val, test"
        )
    root = os.path.dirname(file)
    samples = [
        _manifest_sample(root, path, label, SPLIT_WORDS.get((split or "").lower()), group)
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
        table: dict[str, list[Any]] = {name: [] for name in there}
        for row in reader:
            if any(row.pop(None, [])):  # None holds the cells beyond the header
                raise InputError(
                    f"{file}: line {reader.line_num} has more cells than the header; put a text with commas in quotes"
                )
            for name, value in row.items():
                table[name].append(value)
    return there, table


def _read_parquet(file: str, columns: Sequence[str]) -> tuple[list[str], dict[str, list[Any]]]:
    """All column names, and the wanted columns as Python values."""
    with _open(file) as stream:
        content = pq.ParquetFile(stream)
        return _parquet_columns(file, content, columns)


def _parquet_columns(
    file: str, content: pq.ParquetFile, columns: Sequence[str]
) -> tuple[list[str], dict[str, list[Any]]]:
    schema = content.schema_arrow
    wanted = [name for name in dict.fromkeys(columns) if schema.names.count(name) == 1]
    nested = [name for name in wanted if pa.types.is_nested(schema.field(name).type)]
    if nested:
        raise InputError(
            [f"{file}: column {name!r} holds {schema.field(name).type}; give one value per image" for name in nested]
        )
    return schema.names, {name: content.read(columns=[name])[name].to_pylist() for name in wanted}


def _open(file: str) -> BinaryIO:
    return storage.readable(file) if storage.is_uri(file) else open(file, "rb")


def _cell_text(value: Any) -> str | None:
    if value is None or value != value:
        return None
    # pandas makes a column of whole numbers with a gap one of floats: patient 123 must not become 123.0.
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip() or None


def _manifest_sample(root: str, path: str, label: str | None, split: str | None, group: str | None) -> Sample:
    if storage.is_uri(path) or (storage.is_uri(root) and not os.path.isabs(path)):
        file = path if storage.is_uri(path) else storage.joined(root, posixpath.normpath(path.replace("\\", "/")))
        return Sample(file.removeprefix(f"{root}/"), file, label, split, group)
    file = os.path.abspath(os.path.join(root, path.replace("\\", "/")))
    below = file.startswith(os.path.join(root, ""))
    shown = os.path.relpath(file, root) if below or not os.path.isabs(path) else file
    return Sample(shown.replace(os.sep, "/"), file, label, split, group)


# --- Faults ----------------------------------------------------------------------------------------------------------


def _manifest_faults(samples: list[Sample]) -> list[str]:
    """What is wrong between rows: paths twice, classes that differ between splits."""
    faults: list[str] = []
    twice = [path for path, count in Counter(sample.path for sample in samples).items() if count > 1]
    if twice:
        faults.append(f"{len(twice)} paths occur more than once ({_examples(twice)}); keep one row of each")
    classes: dict[str | None, set[str]] = defaultdict(set)
    for sample in samples:
        if sample.label is not None:
            classes[sample.split].add(sample.label)
    given = {sample.split for sample in samples} - {None}
    if given and "train" not in given:
        faults.append(f"no image is in the split train, only in {', '.join(sorted(map(str, given)))}; give it some")
    if given and None in classes:
        del classes[None]  # rows whose split is empty or unknown, a fault already told
    return faults + _class_faults(classes)


def _class_faults(classes: Mapping[str | None, set[str]]) -> list[str]:
    """Faults of the classes of each split (all under None where no split is given)."""
    names = sorted(set().union(*classes.values()))
    if len(names) == 1:
        return [f"there is only one class, {names[0]!r}; a classifier needs two or more"]
    missing = [f"{name!r} not in {split}" for split in classes for name in names if name not in classes[split]]
    if missing:
        return [f"classes differ between splits ({_examples(missing)}); give every split images of every class"]
    return []


# --- Splits ----------------------------------------------------------------------------------------------------------


def _with_splits(
    samples: pd.DataFrame,
    pool: pd.Series,
    units: Sequence[str],
    fractions: Mapping[str, float],
    faults: list[str],
    salt: str = "",
) -> pd.DataFrame:
    """The same samples with splits drawn for those of the pool."""
    known = samples.assign(group=list(units))
    rows = [Sample(*row) for row in known.loc[pool, list(Sample._fields)].itertuples(index=False)]
    splits = samples["split"].copy()
    splits[pool] = [row.split for row in _draw_splits(rows, fractions, faults, salt)]
    return samples.assign(split=splits)


def _draw_splits(
    samples: list[Sample], fractions: Mapping[str, float], faults: list[str], salt: str = ""
) -> list[Sample]:
    """Put each group, or each image where there are no groups, into the split that most needs its classes.

    They are taken in the order of the sha256 of `salt` and the group's id (or the path), so that neither the order of
    the rows nor the machine matters. For images without groups this is largest-remainder apportionment: each split's
    count of a class is within one image of its share.

    `fractions` holds each split's share and sums to 1; classes without an image in train or val are appended to
    `faults`.
    """
    units: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        units[sample.group or sample.path][str(sample.label)] += 1
    totals = Counter(str(sample.label) for sample in samples)
    need = {(split, label): share * totals[label] for split, share in fractions.items() for label in totals}
    for split, label in need:
        if split != "test":  # a class of two images can still be trained and judged
            need[split, label] = max(need[split, label], 1.0)

    split_of: dict[str, str] = {}
    images: Counter[tuple[str, str]] = Counter()
    for unit in sorted(units, key=lambda name: hashlib.sha256((salt + name).encode()).digest()):
        counts = sorted(units[unit].items())
        split = max(fractions, key=lambda name: sum(need[name, label] / totals[label] for label, _ in counts))
        split_of[unit] = split
        for label, count in counts:
            need[split, label] -= count
            images[split, label] += count

    short = [
        f"{label!r} ({totals[label]} images in {sum(label in counts for counts in units.values())} groups) has "
        f"none for {split}"
        for label in sorted(totals)
        for split in ("train", "val")
        if images[split, label] == 0
    ]
    if short:
        faults.append(
            f"too few images to draw splits: {_examples(short)}; add images or groups of the class, leave it out, "
            "change val_fraction, or give the splits yourself"
        )
    return [sample._replace(split=split_of[sample.group or sample.path]) for sample in samples]
