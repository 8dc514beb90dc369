"""From the columns of manifests to samples: their splits, classes and groups, and where the images are."""

import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tuning.data.folders import SPLIT_WORDS, Sample, class_faults
from tuning.data.labels import against_others, by_pattern, classes, findings, one_hot_columns, parted, separator
from tuning.data.manifests import Manifest, names_image, read_manifest
from tuning.data.places import Places
from tuning.record import storage
from tuning.settings.config import InputError
from tuning.settings.words import are, count, examples, nearest

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
USUAL = {"path_column": "path", "label_column": "label", "split_column": "split", "group_column": "group"}


@dataclass(frozen=True)
class Reading:
    """How a manifest is read; the settings of a search by the same names describe each."""

    path_column: str = "path"
    label_column: str = "label"
    split_column: str = "split"
    group_column: str = "group"
    columns: Sequence[str] | None = None
    label_columns: Sequence[str] | None = None
    finding: str | None = None
    uncertain: str = "ignore"
    label_pattern: str | None = None
    group_pattern: str | None = None
    images: str | None = None
    join: str | None = None
    split_files: Mapping[str, str] = field(default_factory=dict)

    @property
    def wanted(self) -> tuple[str, str, str, str]:
        """Names of the columns of path, label, split and group."""
        return self.path_column, self.label_column, self.split_column, self.group_column


def read_rows(file: str, how: Reading, faults: list[str], remarks: list[str]) -> list[Sample]:
    """Return the samples of a manifest and of the files of its splits; all faults are given to `faults`."""
    lists: dict[str, list[str]] = {}
    try:
        found = _Rows(file, _read(file, how, remarks), how, faults, remarks).samples()
        for split, listed in how.split_files.items():
            of_split = read_manifest(listed, how.wanted, how.columns, remarks)
            if not _has_labels(of_split, how):
                lists[split] = _listed(of_split, how)
                continue
            if how.join is not None:
                of_split = _joined(listed, of_split, how.join, remarks)
            rows = _Rows(listed, of_split, how, faults, remarks).samples(root=os.path.dirname(file))
            found += [sample._replace(split=split) for sample in rows]
    except InputError as error:
        faults += error.faults
        return []
    if how.split_files:
        found = _split_by_lists(file, found, lists, how.split_files, faults, remarks)
    found = _once(found, how, remarks)
    faults += [f"{file}: {fault}" for fault in _between_rows(found)]
    return _placed(file, found, how, faults, remarks)


def _read(file: str, how: Reading, remarks: list[str]) -> Manifest:
    manifest = read_manifest(file, how.wanted, how.columns, remarks)
    return manifest if how.join is None else _joined(file, manifest, how.join, remarks)


# ---- columns ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """The rows of one manifest, which become samples."""

    file: str
    manifest: Manifest
    how: Reading
    faults: list[str]
    remarks: list[str]

    def samples(self, root: str | None = None) -> list[Sample]:
        """Return a sample for each row that has a path; `root` is the folder that relative paths begin in."""
        how, file = self.how, self.file
        if self.manifest.columns and not any(self.manifest.columns.values()):
            self.faults.append(f"{file}: has no rows; add one for each image")
        paths = self._cells("path_column")
        splits = self._cells("split_column")
        unknown = sorted({split for split in splits if split is not None and split.lower() not in SPLIT_WORDS})
        if unknown:
            self.faults.append(
                f"{file}: column {how.split_column!r} contains {examples(map(repr, unknown))}; a split is train, "
                "val or test"
            )
        try:
            kept, labels = self._labels(paths)
        except InputError as error:
            self.faults.extend(error.faults)
            kept, labels = [True] * len(paths), []
        groups = self._groups(paths)
        rows = max(map(len, (paths, splits, labels, groups)))
        columns = [values or [None] * rows for values in (paths, labels, splits, groups)]
        place = os.path.dirname(file) if root is None else root
        return [
            Sample(*_located(place, path), label, SPLIT_WORDS.get((split or "").lower()), group)
            for keep, path, label, split, group in zip(kept or [True] * rows, *columns, strict=True)
            if path is not None and keep
        ]

    def _cells(self, setting: str) -> list[str | None]:
        """Return the cells of a column that is named by a setting, as text; what is wrong with them is a fault."""
        column, there, file = getattr(self.how, setting), self.manifest.names, self.file
        # Split and group may be missing, unless the user named a column for them.
        optional = setting in ("split_column", "group_column") and column == USUAL[setting]
        if column not in there and optional:
            self.remarks.extend(
                f"column {name!r} isn't used; if it is meant, --set {setting}={name!r}"
                for name in there
                if re.sub(r"[\W_]+", "", name.lower()) in LIKELY[setting]
            )
        if column not in there and not optional:
            self.faults.append(
                f"{file}: has no column {column!r} (its columns: {', '.join(map(repr, there)) or 'none'}); "
                f"{self._cure(setting)}"
            )
        if there.count(column) > 1:
            self.faults.append(f"{file}: has {there.count(column)} columns named {column!r}; rename the others")
        values = [_cell_text(value) for value in self.manifest.columns.get(column, [])]
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
            self.faults.append(f"{file}: column {column!r} has {what} ({rows}); fill them{cure}")
        return values

    def _cure(self, setting: str) -> str:
        """Say how a column is named, by example if it is seen which one holds the images."""
        if setting == "path_column":
            for name, cells in self.manifest.columns.items():
                if cells and all(map(names_image, cells)):
                    return f"name the images' by `--set {setting}={name!r}`"
        if setting == "label_column":
            return (
                "name one with `--set label_column=...`, or several of zeros and ones with `--set label_columns=[...]`"
            )
        return f"name one with `--set {setting}=...`"

    def _labels(self, paths: list[str | None]) -> tuple[list[bool], list[str | None]]:
        """Return which rows are kept, and each row's class.

        Raises:
            InputError: rows have no class, or several.
        """
        how, columns, file = self.how, self.manifest.columns, self.file
        if how.label_pattern is not None:
            labels = by_pattern(how.label_pattern, paths, "label_pattern")
            if how.finding is None:
                return [], labels
            rows, where = parted(labels, "\n"), "label_pattern"
        elif how.label_columns or (how.label_column == "label" and "label" not in columns):
            others = (how.path_column, how.split_column, how.group_column)
            names = list(how.label_columns or one_hot_columns(columns, others))
            if lacking := [name for name in names if name not in columns]:
                raise InputError(f"{file}: label_columns: has no column {lacking[0]!r}{nearest(lacking[0], columns)}")
            if not names:
                return [], self._cells("label_column")  # which says that it is missing
            if not how.label_columns:
                self.remarks.append(
                    f"the columns {examples(map(repr, names))} of zeros and ones are taken for the classes"
                )
            rows, where = findings(columns, names), "label_columns"
        else:
            labels = self._cells("label_column")
            sign, where = separator(labels), f"column {how.label_column!r}"
            if sign is None and how.finding is None:
                return [], labels
            rows = parted(labels, sign or "\n")
        if how.finding is None:
            return [], classes(rows, f"{file}: {where}")
        labels, left_out = against_others(rows, how.finding, how.uncertain, where)
        if left_out:
            cure = "`--set uncertain=positive` or `negative` keeps them"
            self.remarks.append(f"left out: {count(left_out, 'row')} in which {how.finding!r} is uncertain; {cure}")
        return [label is not None for label in labels], labels

    def _groups(self, paths: list[str | None]) -> list[str | None]:
        if self.how.group_pattern is None:
            return self._cells("group_column")
        try:
            return by_pattern(self.how.group_pattern, paths, "group_pattern")
        except InputError as error:
            self.faults.extend(error.faults)
            return []


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


# ---- several files ----------------------------------------------------------------------------------------------


def _joined(file: str, manifest: Manifest, other: str, remarks: list[str]) -> Manifest:
    """Add the columns of another manifest to the rows that agree in the columns that both have.

    Raises:
        InputError: no column is common, no row agrees, or rows of the other say different things of one.
    """
    added = read_manifest(other, manifest.names, None, remarks)
    keys = [name for name in manifest.names if name in manifest.columns and name in added.columns]
    if not keys:
        raise InputError(f"join: {other} has no column of {file} (its columns: {', '.join(map(repr, added.names))})")
    news = [name for name in added.names if name not in manifest.names and name in added.columns]

    def rows(table: Manifest, names: Sequence[str]) -> list[tuple[Any, ...]]:
        return list(zip(*(map(_cell_text, table.columns[name]) for name in names), strict=True))

    known: dict[tuple[Any, ...], int] = {}
    for row, key in enumerate(rows(added, keys)):
        if any(added.columns[name][known.setdefault(key, row)] != added.columns[name][row] for name in news):
            raise InputError(f"join: {other} has several rows of {', '.join(map(str, key))} that differ; keep one")
    places = [known.get(key) for key in rows(manifest, keys)]
    kept = [row for row, place in enumerate(places) if place is not None]
    if not kept:
        raise InputError(f"join: no row of {other} agrees with one of {file} in {examples(map(repr, keys))}")
    if lacking := len(places) - len(kept):
        what = f"{count(lacking, 'row')} of {os.path.basename(file)} that {os.path.basename(other)} says nothing of"
        remarks.append(f"left out: {what}")
    cells = {name: [manifest.columns[name][row] for row in kept] for name in manifest.columns}
    cells |= {name: [added.columns[name][place] for place in places if place is not None] for name in news}
    return Manifest([*manifest.names, *news], cells)


def _has_labels(manifest: Manifest, how: Reading) -> bool:
    """Return whether a split's file is a manifest of its own, not a list of the other's images."""
    labels = how.label_columns or [how.label_column]
    there = how.label_pattern is not None or all(name in manifest.columns for name in labels)
    return there and how.path_column in manifest.columns


def _listed(manifest: Manifest, how: Reading) -> list[str]:
    """Return the names in a list of images, with or without a header."""
    first = how.path_column if how.path_column in manifest.columns else manifest.names[0]
    cells = [*([] if first == how.path_column else [first]), *manifest.columns[first]]
    return [text for cell in cells if (text := _cell_text(cell)) is not None]


def _split_by_lists(
    file: str,
    samples: list[Sample],
    lists: Mapping[str, list[str]],
    files: Mapping[str, str],
    faults: list[str],
    remarks: list[str],
) -> list[Sample]:
    """Give samples the splits of the files that list them, by path or name; the others are for training.

    Args:
        lists: names of the images of splits.
        files: of the splits.
    """
    by_name: dict[str, list[int]] = defaultdict(list)
    for row, sample in enumerate(samples):
        for name in {sample.path, *_names(sample.path)}:
            by_name[name].append(row)
    of_row: dict[int, str] = {}
    for split, names in lists.items():
        rows = {
            name: by_name.get(name) or by_name.get(name.replace("\\", "/").rpartition("/")[2], []) for name in names
        }
        if unknown := [name for name, found in rows.items() if not found]:
            listed = os.path.basename(files[split])
            what = f"{listed} names {count(len(unknown), 'image')} that {os.path.basename(file)} lacks"
            (faults if len(unknown) == len(rows) else remarks).append(f"{what}: {examples(unknown)}")
        for row in (row for found in rows.values() for row in found):
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


def _names(path: str) -> tuple[str, str]:
    """Return the name of a path's file, with and without its suffix."""
    name = path.rpartition("/")[2]
    return name, os.path.splitext(name)[0]


def _once(samples: list[Sample], how: Reading, remarks: list[str]) -> list[Sample]:
    """Return the samples without repeated rows, as lists of boxes have them, and with one opinion of several readers.

    Where rows of one image disagree on the finding, the majority decides, and a draw counts as `uncertain` does.
    """
    kept = list(dict.fromkeys(samples))
    opinions: dict[str, Counter[str | None]] = defaultdict(Counter)
    for sample in samples:
        opinions[sample.path][sample.label] += 1
    divided = {path for path, labels in opinions.items() if len(labels) > 1}
    if how.finding is None or not divided:
        if len(kept) < len(samples):
            remarks.append(f"left out: {count(len(samples) - len(kept), 'row')} that only repeat another")
        return kept
    other = next(label for label in opinions[min(divided)] if label != how.finding)
    draw = {"ignore": None, "positive": how.finding, "negative": other}[how.uncertain]
    decided = {}
    for path in divided:
        (first, most), (_, least) = opinions[path].most_common()
        decided[path] = first if most > least else draw
    agreed = [sample._replace(label=decided.get(sample.path, sample.label)) for sample in kept]
    found = [sample for sample in dict.fromkeys(agreed) if sample.label is not None]
    undecided = sum(label is None for label in decided.values())
    remarks.append(
        f"{count(len(divided), 'image')} whose rows disagree on {how.finding!r}: the majority decides"
        + (f"; left out: {undecided:,} with a draw" if undecided else "")
    )
    return found


def _between_rows(samples: list[Sample]) -> list[str]:
    """Faults between rows: duplicate paths, classes that differ between splits."""
    faults: list[str] = []
    twice = [path for path, rows in Counter(sample.path for sample in samples).items() if rows > 1]
    if twice:
        faults.append(f"{are(len(twice), 'path')} listed more than once ({examples(twice)}); keep one row of each")
    of_split: dict[str | None, set[str]] = defaultdict(set)
    for sample in samples:
        if sample.label is not None:
            of_split[sample.split].add(sample.label)
    given = {sample.split for sample in samples} - {None}
    if given and "train" not in given:
        faults.append(f"no image is in the split train, only in {', '.join(sorted(map(str, given)))}; assign some")
    if given and None in of_split:
        del of_split[None]  # rows whose split is empty or unknown, which is already a fault
    return faults + class_faults(of_split)


# ---- places -----------------------------------------------------------------------------------------------------


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


def _placed(file: str, samples: list[Sample], how: Reading, faults: list[str], remarks: list[str]) -> list[Sample]:
    """Return the samples with the files below a folder whose paths end as theirs do, if no image is at its path."""
    folder = os.path.dirname(file) if how.images is None else how.images
    if how.images is None and any(_exist([sample.file for sample in samples])):
        return samples
    places = Places(folder)
    files = [places.find(sample.path) for sample in samples]
    times = Counter(each[0] for each in files if len(each) == 1)
    several = [
        f"{sample.path}: {each[0]} and {each[1]}" for sample, each in zip(samples, files, strict=True) if len(each) > 1
    ]
    if several:
        cure = "name the folder by `--set images=...`, or write the paths from there"
        faults.append(f"{file}: {are(len(several), 'image name')} in two places ({examples(several)}); {cure}")
    moved = [len(each) == 1 and times[each[0]] == 1 for each in files]
    if any(moved):
        remarks.append(f"{count(sum(moved), 'image')} found by name below {folder}")
    return [
        sample._replace(file=each[0]) if found else sample
        for sample, each, found in zip(samples, files, moved, strict=True)
    ]


def _exist(files: Sequence[str]) -> list[bool]:
    uris = [file for file in files if storage.is_uri(file)]
    known = dict(zip(uris, storage.stored(uris), strict=True))
    return [known[file] is not None if file in known else os.path.isfile(file) for file in files]
