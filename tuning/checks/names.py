"""What the names of classes and groups let suspect: two spellings of one, or a placeholder for many."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

import pandas as pd

from tuning.checks.findings import Finding
from tuning.data.reading import NO_VALUE
from tuning.record.targets import class_names, one_row_per_label
from tuning.settings.words import count, examples

LARGE_GROUP = 0.2  # share of all images from which a group may be a placeholder for unknown ones
MANY_GROUPS = 10  # from which such a share is strange
ROUNDED = re.compile(r"\d(\.\d+)?e\+\d+", re.IGNORECASE)  # 1.23457E+11, as spreadsheets write long ids


def of_names(samples: pd.DataFrame) -> list[Finding]:
    """Return the findings on the names of a table's classes and groups."""
    groups, classes, labelled = samples["group"].dropna(), class_names(samples["label"]), one_row_per_label(samples)
    found = [
        _finding("similar_classes", f"{' and '.join(map(repr, names))} are two classes; are they one?")
        for names in _alike(classes, _plain)
    ]
    if missing := sorted({label for label in classes if label in NO_VALUE}):
        words = f"{examples(map(repr, missing))} is a class; is it a missing label?"
        found.append(_finding("placeholder_class", words))
    if similar := [" and ".join(map(repr, names)) for names in _alike(groups, _bare)]:
        found.append(
            _finding("similar_groups", f"{examples(similar)} are two groups each; are they one?", len(similar))
        )
    if rounded := sorted({group for group in groups if ROUNDED.fullmatch(group)}):
        found.append(
            _finding("rounded_groups", f"{examples(rounded)}: a spreadsheet has rounded these ids", len(rounded))
        )
    sizes = Counter(groups)
    if len(sizes) >= MANY_GROUPS:
        (largest, images), *_ = sizes.most_common(1)
        if images >= LARGE_GROUP * len(samples):
            what = f"{largest!r} has {count(images, 'image')} of {len(samples):,}; is it a word for an unknown group?"
            found.append(_finding("large_group", what, images))
    absent = [
        f"{label} in {split}"
        for split in sorted(set(samples["split"]))
        for label in sorted(set(classes) - set(labelled.loc[labelled["split"] == split, "label"]))
    ]
    if absent:
        found.append(_finding("missing_class", f"no image of {examples(absent)}"))
    return found


def _finding(kind: str, detail: str, value: float | None = None) -> Finding:
    return Finding(kind, "warn", None, None, value, None, detail)


def _alike(names: Iterable[str], key: Callable[[str], str]) -> list[list[str]]:
    """Return names with the same key, those of a key together."""
    by_key: dict[str, set[str]] = defaultdict(set)
    for name in names:
        by_key[key(name)].add(name)
    return [sorted(same) for same in by_key.values() if len(same) > 1]


def _plain(name: str) -> str:
    """A class without case, spaces, hyphens, underscores and ways to write a letter."""
    return re.sub(r"[-_]+", "", _folded(name)) or name


def _folded(name: str) -> str:
    """A name without case, spaces and ways to write a letter."""
    visible = "".join(letter for letter in unicodedata.normalize("NFKC", name) if unicodedata.category(letter) != "Cf")
    return "".join(visible.casefold().split())


def _bare(name: str) -> str:
    """An id without case, spaces, punctuation, leading zeros and the .0 of a whole number; 1-11 and 11-1 are two."""
    folded = re.sub(r"^(\d+)\.0+$", r"\1", _folded(name))
    folded = re.sub(r"(?<=\d),(?=\d{3}(\D|$))", "", folded)  # thousands
    if re.fullmatch(r"-\d+", folded):
        return folded
    parts = [re.sub(r"[\W_]+", "", part) for part in re.split(r"(?<=\d)[\W_]+(?=\d)", folded)]
    return "-".join(re.sub(r"\d+", lambda digits: digits[0].lstrip("0") or "0", part) for part in parts)
