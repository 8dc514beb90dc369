"""Rows of one image: repeated ones, those of several readers or labels, and those that contradict each other."""

from collections import Counter, defaultdict

from tuning.data.folders import Sample, class_faults
from tuning.data.labels import UNCERTAIN
from tuning.data.reading import Reading
from tuning.record import targets
from tuning.settings.words import are, count, examples


def once(samples: list[Sample], how: Reading, remarks: list[str]) -> list[Sample]:
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
    """Return samples with the labels of all rows of an image in one: as `once`, label by label."""
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


def between_rows(samples: list[Sample], how: Reading) -> list[str]:
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
