"""From the columns of manifests to samples: their splits, classes and groups, and where the images are."""

import os
import re
from dataclasses import dataclass
from typing import NamedTuple

from tuning.data.folders import SPLIT_WORDS, Sample
from tuning.data.labels import (
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
from tuning.data.lists import has_labels, images_listed, split_by_lists, with_joined
from tuning.data.located import any_exists, located, placed
from tuning.data.manifests import Manifest, names_image, read_manifest
from tuning.data.places import Ends
from tuning.data.reading import NO_VALUE, USUAL, Reading
from tuning.data.repeated import between_rows, once
from tuning.settings.config import InputError
from tuning.settings.words import count, examples, nearest

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


def read_rows(file: str, how: Reading, faults: list[str], remarks: list[str]) -> list[Sample]:
    """Return the samples of a manifest and of the files of its splits; all faults are given to `faults`."""
    try:
        found = _rows_of(
            file, with_joined(file, read_manifest(file, how.wanted, how.columns, remarks), how, remarks), how
        )
        lists: dict[str, list[str]] = {}
        for split, listed in how.split_files.items():
            manifest, names = images_listed(listed, how, remarks)
            ends = Ends(sample.path for sample in found.samples)
            own = os.path.dirname(listed)  # names of images beside the list are of these
            beside = own != os.path.dirname(file) and any_exists(located(own, name)[1] for name in names)
            named = all(map(ends.find, names)) and not beside
            rows = None if named else with_joined(listed, manifest, how, remarks)
            if rows is None or not has_labels(rows, how):
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
        samples = split_by_lists(file, samples, lists, how, faults, remarks)
    samples = once(samples, how, remarks)
    faults += [f"{file}: {fault}" for fault in between_rows(samples, how)]
    return placed(file, samples, how, faults, remarks)


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
        begin = own if own != root and any_exists(located(own, path)[1] for path in paths if path is not None) else root
        return [
            Sample(*located(root, path, begin), label, SPLIT_WORDS.get((split or "").lower()), group, other)
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
