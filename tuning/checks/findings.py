"""What an audit finds, in rows and in words."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from tuning.checks import leaks
from tuning.checks.duplicates import Pairs
from tuning.record import tables

if TYPE_CHECKING:
    from tuning.checks.shortcuts import Shortcut

SEVERITIES = ("stop", "warn", "info")  # worst first
KINDS = (  # and so are these
    *("unreadable", "group_across_splits", "exact_duplicate", "label_conflict", "near_duplicate"),
    *("shortcut_shape", "shortcut_colour", "shortcut_metadata", "shortcut_border", "shortcut_thumbnail"),
    *("imbalance", "look_alike"),
)
LEAKS = {"stop": "stop", "warn": "warn", "move": "warn"}  # severity of a leak, by `on_leak`
UNBALANCED, VERY_UNBALANCED = 3, 10  # images of the largest class for each of the smallest: info, warn
MOST_LINES = 12  # on the screen
LIGHT = ("brightness", "contrast")  # what a shortcut of colour may be without the colour


class Finding(NamedTuple):
    """One row of the table."""

    finding: str
    severity: str
    path_a: str | None
    path_b: str | None
    value: float | None
    p_value: float | None
    detail: str


def table(found: Iterable[Finding]) -> pa.Table:
    """Rows with the schema of `audit.parquet`, the worst first."""
    rows = [row._asdict() for row in sorted(found, key=_rank)]
    return pa.Table.from_pylist(rows, schema=tables.AUDIT)


def _rank(row: Finding) -> tuple[int, int, str, str, str]:
    return (SEVERITIES.index(row.severity), KINDS.index(row.finding), row.path_a or "", row.path_b or "", row.detail)


# --- What is found ---------------------------------------------------------------------------------------------------


def equal_images(pixels: Sequence[str]) -> list[tuple[int, int]]:
    """Each image that equals an earlier one, after the first that it equals.

    Args:
        pixels: hash of each image's decoded pixels; files of the same bytes have the same.
    """
    first: dict[str, int] = {}
    of = [first.setdefault(shown, index) for index, shown in enumerate(pixels)]
    return [(earlier, index) for index, earlier in enumerate(of) if earlier < index]


def of_unreadable(lost: Iterable[tuple[str, str]], skip: bool) -> list[Finding]:
    """Images, by path, with the reason why they can't be read."""
    severity = "warn" if skip else "stop"
    return [Finding("unreadable", severity, path, None, None, None, reason) for path, reason in lost]


def of_copies(
    samples: pd.DataFrame, equal: Sequence[tuple[int, int]], hashes: Sequence[str], near: Pairs, on_leak: str
) -> list[Finding]:
    """Equal images, copies and look-alikes, and copies with different labels."""
    paths, labels, splits = (samples[name].tolist() for name in ("path", "label", "split"))
    pairs: list[tuple[int, int, str, float, str]] = []
    for a, b in equal:
        same = "the same bytes" if hashes[a] == hashes[b] else "the same pixels in other bytes"
        pairs.append((a, b, "exact_duplicate", 1.0, same))
    for a, b, agreement, copy in zip(near.a, near.b, near.agreement, near.copies, strict=True):
        kind = "near_duplicate" if copy else "look_alike"
        pairs.append((int(a), int(b), kind, float(agreement), f"details agree to {agreement:.3f} of 1"))
    found = []
    for a, b, kind, value, what in pairs:
        across, conflict = splits[a] != splits[b], labels[a] != labels[b]
        where = f"in {splits[a]} and {splits[b]}" if across else f"both in {splits[a]}"
        classes = f"{labels[a]} and {labels[b]}" if conflict else f"both {labels[a]}"
        severity = LEAKS[on_leak] if kind == "exact_duplicate" and across else "warn"
        severity = "info" if kind == "look_alike" else severity
        found.append(Finding(kind, severity, paths[a], paths[b], value, None, f"{what}; {where}; {classes}"))
        if conflict and kind != "look_alike":
            told = f"{classes}, for copies of one image ({kind}); {where}"
            found.append(Finding("label_conflict", "warn", paths[a], paths[b], value, None, told))
    return found


def of_groups(samples: pd.DataFrame, on_leak: str) -> list[Finding]:
    """Groups in more than one split."""
    members: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(samples["group"]):
        if not pd.isna(group):
            members[group].append(index)
    paths, splits = samples["path"].tolist(), samples["split"].tolist()
    found = []
    for group, rows in members.items():
        counts = Counter(splits[row] for row in rows)
        if len(counts) > 1:
            a, b = rows[0], next(row for row in rows if splits[row] != splits[rows[0]])
            where = ", ".join(f"{counts[split]} in {split}" for split in reversed(leaks.SPLITS) if counts[split])
            told = f"group {group}: {where}"
            row = Finding("group_across_splits", LEAKS[on_leak], paths[a], paths[b], float(len(rows)), None, told)
            found.append(row)
    return found


def of_imbalance(labels: Iterable[str]) -> list[Finding]:
    """Classes of very different size."""
    (largest, most), *_, (smallest, least) = Counter(labels).most_common()
    ratio = most / least
    if ratio < UNBALANCED:
        return []
    told = f"{smallest} has {least:,} images, {largest} {most:,}"
    return [Finding("imbalance", "warn" if ratio >= VERY_UNBALANCED else "info", None, None, ratio, None, told)]


def of_shortcuts(rules: Iterable["Shortcut"], fit: str, drop_colour: bool) -> list[Finding]:
    """Rules that tell a class too well; what the search's own settings hide is a note."""
    found = []
    for rule in rules:
        severity, end = "warn", ""
        if rule.finding == "shortcut_shape" and fit == "crop":
            severity, end = "info", "; hidden by fit=crop"
        elif rule.finding == "shortcut_colour" and drop_colour and not rule.rule.startswith(LIGHT):
            severity, end = "info", "; hidden by drop_colour=true"
        elif rule.honest:
            severity = "info"
        told = f"{rule.rule}: right for {rule.accuracy:.1%}, guessing for {rule.baseline:.1%}{end}"
        found.append(Finding(rule.finding, severity, None, None, rule.accuracy, rule.p_value, told))
    return found


def with_moves(
    found: Iterable[Finding], samples: pd.DataFrame, splits: Sequence[str], unit: NDArray[np.int64]
) -> list[Finding]:
    """Findings that say which images have moved because of them.

    Args:
        samples: as they were.
        splits: of the same rows, now.
        unit: number of what each image belongs to; see `leaks.units`.
    """
    unit_of = dict(zip(samples["path"], unit.tolist(), strict=True))
    moved: dict[int, list[str]] = defaultdict(list)
    for path, before, after, number in zip(samples["path"], samples["split"], splits, unit.tolist(), strict=True):
        if before != after:
            moved[number].append(f"{path} from {before} to {after}")
    told = []
    for row in found:
        moves = moved.get(unit_of.get(row.path_a or "", -1), []) if row.path_b is not None else []
        across = row.finding in ("exact_duplicate", "near_duplicate", "group_across_splits")
        told.append(row._replace(detail=f"{row.detail}; moved: {', '.join(moves)}") if moves and across else row)
    return told


# --- In words --------------------------------------------------------------------------------------------------------


def summary(rows: Sequence[Finding], moved: int) -> list[str]:
    """What the screen shows: a line for each kind of finding, the worst first, with an example and what can be done.

    Args:
        rows: all findings.
        moved: images that were brought into another split.
    """
    kinds: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for row in sorted(rows, key=_rank):
        kinds[row.severity, row.finding].append(row)
    told: dict[str, list[str]] = {severity: [] for severity in SEVERITIES}
    for (severity, finding), found in kinds.items():
        told[severity] += _told(severity, finding, found)
    if moved:
        told["warn"].append(f"{_count(moved, 'image')} moved, so that each group and all copies are in one split")
    if not told["stop"] + told["warn"]:
        return ["audit: nothing to warn of" + (f", {_count(len(rows), 'note')} in audit.parquet" if rows else "")]
    lines = [f"  {severity}  {line}" for severity, of in told.items() for line in of]
    more = [f"  and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
    cure = []
    if any(row.severity == "stop" and row.finding != "unreadable" for row in rows):
        cure = ["  cure: --set on_leak=move brings each group and all copies into one split; on_leak=warn goes on"]
    counts = [(len(told["stop"]), "reason to stop", "reasons to stop"), (len(told["warn"]), "warning", "warnings")]
    head = ", ".join(_count(n, one, many) for n, one, many in counts if n)
    return [f"audit: {head} (all {len(rows)} findings are in audit.parquet)", *lines[:MOST_LINES], *more, *cure]


def stops(rows: Sequence[Finding]) -> list[str]:
    """Why a search does not begin, with the cure; empty where it may."""
    kinds: dict[str, list[Finding]] = defaultdict(list)
    for row in sorted(rows, key=_rank):
        if row.severity == "stop":
            kinds[row.finding].append(row)
    cure = "--set on_leak=move brings each into one split, on_leak=warn goes on; tuning/audit.py lists all findings"
    return [f"{line}; {cure}" for finding, found in kinds.items() for line in _told("stop", finding, found)]


def _told(severity: str, finding: str, found: Sequence[Finding]) -> list[str]:
    """Lines of one kind; notes have none."""
    if severity == "info":
        return []
    if finding.startswith("shortcut_") or finding == "imbalance":
        return [f"{finding.removeprefix('shortcut_')}: {row.detail}{_cure(row)}" for row in found]
    first, n = found[0], len(found)
    if finding == "unreadable":
        return [f"{_count(n, 'image')} can't be read, such as {first.path_a}: {first.detail}"]
    if finding == "group_across_splits":
        images = sum(int(row.value or 0) for row in found)
        example = first.detail.split("; moved")[0]
        return [f"{_count(n, 'group')} ({images} images) in more than one split, such as {example}"]
    what = {
        "exact_duplicate": "of equal images",
        "near_duplicate": "of near duplicates",
        "label_conflict": "of copies with different labels",
    }[finding]
    across = sum("; in " in row.detail for row in found)
    where = f", {across} of them in different splits" if across else ""
    return [f"{_count(n, 'pair')} {what}{where}, such as {first.path_a} and {first.path_b}"]


def _cure(row: Finding) -> str:
    if row.finding == "shortcut_shape":
        return "; --set fit=crop hides it"
    if row.finding == "shortcut_colour" and not row.detail.startswith(LIGHT):
        return "; --set drop_colour=true hides it"
    if row.finding == "imbalance":
        return "; --set class_weighting=balanced metric=val_balanced_accuracy"
    return ""


def _count(n: int, one: str, many: str | None = None) -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"
