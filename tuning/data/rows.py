"""From the columns of manifests to samples: their splits, classes and groups, and where the images are."""

import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tuning.data.folders import SPLIT_WORDS, Sample, class_faults
from tuning.data.labels import (
    UNCERTAIN,
    Row,
    against_others,
    by_pattern,
    classes,
    findings,
    mark_columns,
    multi_labels,
    one_hot_columns,
    parted,
    separator,
    text,
)
from tuning.data.manifests import Manifest, names_image, read_manifest
from tuning.data.places import Ends, files_below, normalised
from tuning.record import storage, targets
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
AT_ONCE = 100  # files of a storage
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
    multi_label: bool = False
    uncertain: str = "ignore"
    blank: str = "negative"
    label_pattern: str | None = None
    group_pattern: str | None = None
    subgroups: Sequence[str] = ()
    images: str | None = None
    join: str | None = None
    split_files: Mapping[str, str] = field(default_factory=dict)
    evaluated: bool = False  # for a test alone
    labels: set[str] = field(default_factory=set)  # is given the names of labels that manifests have
    marked: set[str] = field(default_factory=set)  # is given the columns of ones and zeros that are labels

    @property
    def not_labels(self) -> tuple[str, ...]:
        """Names of the columns that are no labels, though they may hold ones and zeros."""
        return self.path_column, self.split_column, self.group_column, *self.subgroups

    @property
    def wanted(self) -> tuple[str, str, str, str]:
        """Names of the columns of path, label, split and group."""
        return self.path_column, self.label_column, self.split_column, self.group_column


def read_rows(file: str, how: Reading, faults: list[str], remarks: list[str]) -> list[Sample]:
    """Return the samples of a manifest and of the files of its splits; all faults are given to `faults`."""
    try:
        found = _rows_of(
            file, _with_joined(file, read_manifest(file, how.wanted, how.columns, remarks), how, remarks), how
        )
        lists: dict[str, list[str]] = {}
        for split, listed in how.split_files.items():
            manifest, names = _listed(listed, how, remarks)
            ends = Ends(sample.path for sample in found.samples)
            own = os.path.dirname(listed)  # names of images beside the list are of these
            beside = own != os.path.dirname(file) and any_exists(_located(own, name)[1] for name in names)
            named = all(map(ends.find, names)) and not beside
            rows = None if named else _with_joined(listed, manifest, how, remarks)
            if rows is None or not _has_labels(rows, how):
                lists[split] = names
                continue
            more = _rows_of(listed, rows, how, root=os.path.dirname(file))
            found.samples.extend(sample._replace(split=split) for sample in more.samples)
            found.faults.extend(more.faults)
            found.remarks.extend(more.remarks)
    except InputError as error:
        faults += error.faults
        return []
    faults += found.faults
    remarks += found.remarks
    samples = found.samples
    if how.split_files and not how.evaluated:
        samples = _split_by_lists(file, samples, lists, how, faults, remarks)
    samples = _once(samples, how, remarks)
    faults += [f"{file}: {fault}" for fault in _between_rows(samples, how)]
    return _placed(file, samples, how, faults, remarks)


# ---- columns ----------------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    """Samples, with faults and lines for the user."""

    samples: list[Sample]
    faults: list[str]
    remarks: list[str]


def _rows_of(file: str, manifest: Manifest, how: Reading, root: str | None = None) -> _Found:
    """Return a sample for each row of a manifest that has a path.

    Args:
        root: folder by which paths are shown, and in which they begin if there are no images in the manifest's own.
    """
    rows = _Rows(file, manifest, how, [], [])
    return _Found(rows.samples(os.path.dirname(file) if root is None else root), rows.faults, rows.remarks)


@dataclass(frozen=True)
class _Rows:
    """The rows of one manifest, which become samples."""

    file: str
    manifest: Manifest
    how: Reading
    faults: list[str]
    remarks: list[str]

    def samples(self, root: str) -> list[Sample]:
        how, file = self.how, self.file
        if self.manifest.columns and not any(self.manifest.columns.values()):
            self.faults.append(f"{file}: has no rows; add one for each image")
        paths = self._cells("path_column")
        splits = [] if how.evaluated else self._cells("split_column")
        unknown = sorted({split for split in splits if split is not None and split.lower() not in SPLIT_WORDS})
        if unknown:
            self.faults.append(
                f"{file}: column {how.split_column!r} contains {examples(map(repr, unknown))}; a split is train, "
                "val or test"
            )
        try:
            kept, labels = self._labels(paths)
        except InputError as error:
            self.faults.extend(f"{file}: {fault}" for fault in error.faults)
            kept, labels = [], []
        groups, subgroups = self._groups(paths), self._subgroups()
        number = max(map(len, (paths, splits, labels, groups, *subgroups)))
        columns = [values or [None] * number for values in (paths, labels, splits, groups)]
        others = list(zip(*subgroups, strict=True)) or [()] * number
        own = os.path.dirname(file)
        begin = (
            own if own != root and any_exists(_located(own, path)[1] for path in paths if path is not None) else root
        )
        return [
            Sample(*_located(root, path, begin), label, SPLIT_WORDS.get((split or "").lower()), group, other)
            for keep, path, label, split, group, other in zip(kept or [True] * number, *columns, others, strict=True)
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
        values = [text(value) for value in self.manifest.columns.get(column, [])]
        if setting in ("label_column", "group_column"):
            values = _one_spelling(values)
        if setting == "group_column":
            values = [None if value in NO_VALUE else value for value in values]
        empty = [row for row, value in enumerate(values, start=1) if value is None]
        if setting == "label_column" and self.how.multi_label:
            empty = []
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
            several = "`--set label_columns=[...]`; if an image may have several labels, add `multi_label=true`"
            return f"name one with `--set label_column=...`, or several of zeros and ones with {several}"
        return f"name one with `--set {setting}=...`"

    def _labels(self, paths: list[str | None]) -> tuple[list[bool], list[str | None]]:
        """Return which rows are kept (all, if it is empty), and each row's class.

        Raises:
            InputError: rows have no class, or several.
        """
        how, columns = self.how, self.manifest.columns
        rows: list[Row]
        listed = False
        if how.multi_label and how.finding is not None:
            raise InputError("finding: multi_label=true predicts each label by itself; give one of the two")
        if how.blank != Reading.blank and not how.multi_label:
            raise InputError("blank: has an effect only with multi_label=true; leave it out")
        if how.label_pattern is not None:
            labels = by_pattern(how.label_pattern, paths, "label_pattern")
            if how.finding is None and not how.multi_label:
                return [], labels
            rows = parted(labels, None)
        elif how.label_columns or (how.label_column == USUAL["label_column"] and how.label_column not in columns):
            by_themselves = mark_columns if how.multi_label else one_hot_columns
            found = by_themselves(columns, how.not_labels)
            names = list(how.label_columns or found)
            if lacking := [name for name in names if name not in columns]:
                raise InputError(f"label_columns: has no column {lacking[0]!r}{nearest(lacking[0], columns)}")
            if not names:
                return [], self._cells("label_column")  # which says that it is missing
            if not how.label_columns:
                what = "labels" if how.multi_label else "classes"
                self.remarks.append(f"the columns {examples(map(repr, names))} of ones and zeros are the {what}")
            rows = findings(columns, names)
            how.marked.update(names)
        else:
            labels = self._cells("label_column")
            if without := labels.count(None) if how.multi_label else 0:
                self.remarks.append(f"{count(without, 'row')} with an empty cell: no label applies")
            sign = separator(labels, how.finding, anywhere=how.multi_label)
            if sign is None and how.finding is None and not how.multi_label:
                return [], labels
            rows, listed = parted(labels, sign), True
        if how.multi_label:
            if listed and how.blank == "ignore":
                raise InputError("blank=ignore: needs label columns; a list of labels names all that an image has")
            texts, names, lines = multi_labels(rows, how.uncertain, how.blank)
            self.remarks.extend(lines)
            how.labels.update(names)
            return [], list(texts)
        if how.finding is None:
            return [], classes(rows)
        labels, left_out = against_others(rows, how.finding, how.uncertain)
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
            self.faults.extend(f"{self.file}: {fault}" for fault in error.faults)
            return []

    def _subgroups(self) -> list[list[str | None]]:
        """Return the cells of the columns by which figures are given."""
        there = self.manifest.columns
        lacking = [name for name in self.how.subgroups if name not in there]
        self.faults.extend(f"{self.file}: subgroups: has no column {name!r}{nearest(name, there)}" for name in lacking)
        cells = [[text(cell) for cell in there[name]] for name in self.how.subgroups if name in there]
        return [[None if cell in NO_VALUE else cell for cell in _one_spelling(column)] for column in cells]


def _one_spelling(values: list[str | None]) -> list[str | None]:
    """Write a number that is there as 3 and as 3.0 as 3: pandas adds the .0 to whole numbers of a part with a gap."""
    there = set(values)
    matches = [re.fullmatch(r"(-?\d+)\.0+", value or "") for value in values]
    return [
        found[1] if found is not None and found[1] in there else value
        for found, value in zip(matches, values, strict=True)
    ]


# ---- several files ----------------------------------------------------------------------------------------------


def _with_joined(file: str, manifest: Manifest, how: Reading, remarks: list[str]) -> Manifest:
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


def _listed(file: str, how: Reading, remarks: list[str]) -> tuple[Manifest, list[str]]:
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


def _has_labels(manifest: Manifest, how: Reading) -> bool:
    """Return whether a manifest has paths and labels of its own."""
    columns, labels = manifest.columns, how.label_columns or [how.label_column]
    there = how.label_pattern is not None or all(name in columns for name in labels)
    by_themselves = mark_columns if how.multi_label else one_hot_columns
    return how.path_column in columns and (there or bool(by_themselves(columns, how.not_labels)))


def _split_by_lists(
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


def _once(samples: list[Sample], how: Reading, remarks: list[str]) -> list[Sample]:
    """Return the samples without repeated rows, and with one label of rows of one image that disagree on the finding.

    Rows that each name a label say that the image has it. Rows of label columns, as of several readers, say yes or no:
    the majority decides, and a draw counts as `uncertain` does.
    """
    kept = list(dict.fromkeys(samples))
    if how.multi_label:
        return _merged(kept, samples, how, remarks)
    opinions: dict[str, Counter[str | None]] = defaultdict(Counter)
    for sample in samples:
        opinions[sample.path][sample.label] += 1
    divided = {path for path, labels in opinions.items() if len(labels) > 1}
    decided: dict[str, str | None] = {}
    if how.finding is not None and divided:
        other = f"no {how.finding}"
        draw = {True: how.finding, False: other, None: None}[UNCERTAIN[how.uncertain]]
        for path in divided:
            yes, no = opinions[path][how.finding], opinions[path][other]
            named = not how.label_columns
            decided[path] = how.finding if named or yes > no else draw if yes == no else other
        if how.label_columns:
            undecided = sum(label is None for label in decided.values())
            remarks.append(
                f"{count(len(divided), 'image')} whose rows disagree on {how.finding!r}: the majority decides"
                + (f"; left out: {undecided:,} with a draw" if undecided else "")
            )
        agreed = [sample._replace(label=decided.get(sample.path, sample.label)) for sample in kept]
        return [sample for sample in dict.fromkeys(agreed) if sample.label is not None]
    if len(kept) < len(samples):
        remarks.append(f"left out: {count(len(samples) - len(kept), 'row')} that only repeat another")
    return kept


def _merged(kept: list[Sample], samples: list[Sample], how: Reading, remarks: list[str]) -> list[Sample]:
    """Return samples with the labels of all rows of an image in one: as `_once`, label by label."""
    rows_of: dict[str, list[dict[str, bool | None]]] = defaultdict(list)
    for sample in samples:
        rows_of[sample.path].append(targets.named(sample.label or ""))
    draw = UNCERTAIN[how.uncertain]
    merged: dict[str, str] = {}
    for path, rows in rows_of.items():
        there: dict[str, bool | None] = {}
        for name in {name for row in rows for name in row}:
            said = [row.get(name, False) for row in rows]
            yes, no = said.count(True), said.count(False)
            if not how.marked:
                there[name] = True if yes else None
            else:
                there[name] = None if not yes + no else draw if yes == no else yes > no
        merged[path] = targets.written(there)
    found = list(dict.fromkeys(sample._replace(label=merged[sample.path]) for sample in kept))
    if len(found) < len(samples):
        remarks.append(
            f"{count(len(samples) - len(found), 'row')} of images with several: their labels are put together"
        )
    return found


def _between_rows(samples: list[Sample], how: Reading) -> list[str]:
    """Faults between rows: duplicate paths, classes that differ between splits."""
    faults: list[str] = []
    twice = [path for path, rows in Counter(sample.path for sample in samples).items() if rows > 1]
    if twice:
        faults.append(f"{are(len(twice), 'path')} listed more than once ({examples(twice)}); keep one row of each")
    if how.evaluated:
        return faults
    of_split: dict[str | None, set[str]] = defaultdict(set)
    for sample in samples:
        if sample.label is not None:
            of_split[sample.split].add(sample.label)
    given = {sample.split for sample in samples} - {None}
    if given and "train" not in given:
        faults.append(f"no image is in the split train, only in {', '.join(sorted(map(str, given)))}; assign some")
    if given and None in of_split:
        del of_split[None]  # rows whose split is empty or unknown, which is already a fault
    if how.multi_label:  # labels that can't be learnt are left out
        return faults
    return faults + class_faults(of_split)


# ---- places -----------------------------------------------------------------------------------------------------


def _located(root: str, path: str, begin: str | None = None) -> tuple[str, str]:
    """Path as shown and file of an image, from its path in a manifest.

    Args:
        root: folder by which it is shown.
        begin: folder in which relative paths begin, if it is another.
    """
    begin, slashed = root if begin is None else begin, path.replace("\\", "/")
    if storage.is_uri(path) or (storage.is_uri(begin) and not os.path.isabs(path)):
        file = path if storage.is_uri(path) else storage.joined(begin, posixpath.normpath(slashed))
        return file.removeprefix(f"{root}/"), file
    file = os.path.abspath(os.path.join(begin, slashed))
    below = file.startswith(os.path.join(root, ""))
    shown = os.path.relpath(file, root) if below or (begin == root and not os.path.isabs(path)) else file
    return shown.replace(os.sep, "/"), file


def _placed(file: str, samples: list[Sample], how: Reading, faults: list[str], remarks: list[str]) -> list[Sample]:
    """Return the samples with the files below a folder whose paths end as theirs do, if no image is at its path."""
    folder = os.path.dirname(file) if how.images is None else how.images
    if how.images is None and any_exists(sample.file for sample in samples):
        return samples
    if not storage.is_uri(folder) and not os.path.isdir(folder):
        faults.append(f"images: {folder}: no such folder")
        return samples
    ends = Ends(files_below(folder))
    files = [ends.find(sample.path) for sample in samples]
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
        sample._replace(file=storage.joined(folder, each[0])) if found else sample
        for sample, each, found in zip(samples, files, moved, strict=True)
    ]


def any_exists(files: Iterable[str]) -> bool:
    """Return whether one of some files exists; storages are asked for some at a time."""
    uris = []
    for file in files:
        if not storage.is_uri(file):
            if os.path.isfile(file):
                return True
            continue
        uris.append(file)
        if len(uris) == AT_ONCE:
            if storage.stored(uris) != [None] * AT_ONCE:
                return True
            uris = []
    return storage.stored(uris) != [None] * len(uris)
