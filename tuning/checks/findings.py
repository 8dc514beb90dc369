"""What an audit finds, in rows and in words."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd
import pyarrow as pa

from tuning.checks.alignment import Ints
from tuning.checks.duplicates import Pairs
from tuning.data.splits import SPLITS, number_units
from tuning.record import tables
from tuning.record.targets import most_frequent, shown
from tuning.settings.words import count

if TYPE_CHECKING:
    from tuning.checks.shortcuts import Shortcut

SEVERITIES = ("stop", "warn", "info")  # worst first
OF_NAMES = ("missing_class", "similar_classes", "placeholder_class", "similar_groups", "rounded_groups", "large_group")
KINDS = (  # also worst first
    *("unreadable", "group_across_splits", "exact_duplicate", "label_conflict", "near_duplicate", "sequence"),
    *("shortcut_shape", "shortcut_colour", "shortcut_metadata", "shortcut_border", "shortcut_thumbnail"),
    *OF_NAMES,
    *("imbalance", "look_alike", "decoding"),
)
LEAKS = {"stop": "stop", "warn": "warn", "move": "warn"}  # severity of a leak, by `on_leak`
UNBALANCED, VERY_UNBALANCED = 3, 10  # images of the largest class for each of the smallest: info, warn
MOST_LINES = 12  # on the screen
GROUPED = "give the scan or the patient with --set group_column=..."
CURE = "--set on_leak=move moves each group and all copies into one split, on_leak=warn only warns"


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
    """Return the findings with the schema of `audit.parquet`, the worst first."""
    rows = [row._asdict() for row in sorted(found, key=_rank)]
    return pa.Table.from_pylist(rows, schema=tables.AUDIT)


def _rank(row: Finding) -> tuple[int, int, str, str, str]:
    return (SEVERITIES.index(row.severity), KINDS.index(row.finding), row.path_a or "", row.path_b or "", row.detail)


def identical_images(pixels: Sequence[str]) -> list[tuple[int, int]]:
    """Return each image that is identical to an earlier one, after the first of these.

    Args:
        pixels: hash of each image's decoded pixels; files of the same bytes have the same.
    """
    first: dict[str, int] = {}
    of = [first.setdefault(digest, index) for index, digest in enumerate(pixels)]
    return [(earlier, index) for index, earlier in enumerate(of) if earlier < index]


def of_unreadable(lost: Iterable[tuple[str, str]], skip: bool) -> list[Finding]:
    """Images, by path, with the reason why they can't be read."""
    severity = "warn" if skip else "stop"
    return [Finding("unreadable", severity, path, None, None, None, reason) for path, reason in lost]


def of_copies(
    samples: pd.DataFrame, identical: Sequence[tuple[int, int]], hashes: Sequence[str], near: Pairs, on_leak: str
) -> list[Finding]:
    """Identical images, copies and look-alikes, and copies with different labels."""
    paths, labels, splits = (samples[name].tolist() for name in ("path", "label", "split"))
    pairs: list[tuple[int, int, str, float, str]] = []
    for a, b in identical:
        same = "the same bytes" if hashes[a] == hashes[b] else "the same pixels in other bytes"
        pairs.append((a, b, "exact_duplicate", 1.0, same))
    for a, b, agreement, copy, step in zip(*near, strict=True):
        kind = "near_duplicate" if copy else "look_alike"
        if not step:
            pairs.append((int(a), int(b), kind, float(agreement), f"agreement of details {agreement:.3f}"))
    found = []
    for a, b, kind, value, words in pairs:
        across, conflict = splits[a] != splits[b], labels[a] != labels[b]
        where = f"in {splits[a]} and {splits[b]}" if across else f"both in {splits[a]}"
        classes = f"{shown(labels[a])} and {shown(labels[b])}" if conflict else f"both {shown(labels[a])}"
        severity = LEAKS[on_leak] if kind == "exact_duplicate" and across else "warn"
        severity = "info" if kind == "look_alike" else severity
        found.append(Finding(kind, severity, paths[a], paths[b], value, None, f"{words}; {where}; {classes}"))
        if conflict and kind != "look_alike":
            detail = f"copies of one image ({kind}) with the labels {classes}; {where}"
            found.append(Finding("label_conflict", "warn", paths[a], paths[b], value, None, detail))
    return found


def of_sequences(samples: pd.DataFrame, near: Pairs) -> list[Finding]:
    """Sequences, such as the slices of one scan, each once: a split through one puts nearly the same into both sets."""
    steps = sorted(zip(near.a[near.steps].tolist(), near.b[near.steps].tolist(), strict=True))
    unit = number_units([None] * len(samples), steps)
    links: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for a, b in steps:
        links[unit[a]].append((a, b))
    paths, splits = samples["path"].tolist(), samples["split"].tolist()
    found = []
    for pairs in links.values():
        images = {image for pair in pairs for image in pair}
        counts = Counter(splits[image] for image in images)
        a, b = next((pair for pair in pairs if splits[pair[0]] != splits[pair[1]]), pairs[0])
        where = ", ".join(f"{counts[split]} in {split}" for split in reversed(SPLITS) if counts[split])
        severity = "warn" if len(counts) > 1 else "info"
        detail = f"{count(len(images), 'image')}, each much like the next: {where}"
        found.append(Finding("sequence", severity, paths[a], paths[b], float(len(images)), None, detail))
    return found


def of_groups(samples: pd.DataFrame, on_leak: str) -> list[Finding]:
    """Groups in more than one split."""
    members: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for path, split, group in samples[["path", "split", "group"]].itertuples(index=False):
        if not pd.isna(group):
            members[group].append((path, split))
    found = []
    for group, images in members.items():
        (first, its_split), counts = images[0], Counter(split for _, split in images)
        if len(counts) > 1:
            other = next(path for path, split in images if split != its_split)
            where = ", ".join(f"{counts[split]} in {split}" for split in reversed(SPLITS) if counts[split])
            detail, n_images = f"group {group}: {where}", float(len(images))
            found.append(Finding("group_across_splits", LEAKS[on_leak], first, other, n_images, None, detail))
    return found


def of_decoding(paths: Iterable[str], notes: Iterable[str | None]) -> list[Finding]:
    """What was noted of images as they were decoded."""
    pairs = zip(paths, notes, strict=True)
    return [Finding("decoding", "info", path, None, None, None, note) for path, note in pairs if isinstance(note, str)]


def notes_in_words(paths: Iterable[str], notes: Iterable[str | None]) -> list[str]:
    """Return what was noted of images as they were decoded, one line for each kind of note, with an example."""
    of_note: dict[str, list[str]] = defaultdict(list)
    for path, noted in zip(paths, notes, strict=True):
        for note in noted.split("; ") if isinstance(noted, str) else []:  # not NaN, as pandas has no value
            of_note[note].append(path)
    return [
        f"{count(len(noted), 'image')} ({noted[0]}{', ...' * (len(noted) > 1)}): {note}"
        for note, noted in sorted(of_note.items())
    ]


def of_imbalance(labels: Iterable[str]) -> list[Finding]:
    """Classes, or labels, of very different size."""
    counts = most_frequent(labels)
    (largest, most), (smallest, least) = counts[0], counts[-1]
    ratio = most / least
    if ratio < UNBALANCED:
        return []
    detail = f"{smallest} has {count(least, 'image')}, {largest} {most:,}"
    return [Finding("imbalance", "warn" if ratio >= VERY_UNBALANCED else "info", None, None, ratio, None, detail)]


def of_shortcuts(rules: Iterable["Shortcut"], fit: str, drop_colour: bool) -> list[Finding]:
    """Rules that predict a class too well; those that the search's own settings hide are notes."""
    settings = {"fit=crop": fit == "crop", "drop_colour=true": drop_colour}
    found = []
    for rule in rules:
        setting = _hiding(rule.finding, rule.rule)
        hidden = settings.get(setting, False)
        severity = "info" if hidden or rule.honest else "warn"
        detail = f"{rule.rule} with {rule.accuracy:.1%} accuracy (majority-class baseline: {rule.baseline:.1%})"
        detail += f"; hidden by {setting}" if hidden else ""
        found.append(Finding(rule.finding, severity, None, None, rule.accuracy, rule.p_value, detail))
    return found


def _hiding(finding: str, rule: str) -> str:
    """The setting that hides a shortcut from the network."""
    if finding == "shortcut_colour":
        return "" if rule.startswith(tables.LIGHT) else "drop_colour=true"
    return "fit=crop" if finding == "shortcut_shape" else ""


def with_moves(found: Iterable[Finding], samples: pd.DataFrame, splits: Sequence[str], unit: Ints) -> list[Finding]:
    """Return the findings with the images that were moved because of them.

    Args:
        samples: with the splits before.
        splits: of the same rows, after.
        unit: of each row, numbered; see `splits.number_units`.
    """
    unit_of = dict(zip(samples["path"], unit.tolist(), strict=True))
    moved: dict[int, list[str]] = defaultdict(list)
    for path, before, after in zip(samples["path"], samples["split"], splits, strict=True):
        if before != after:
            moved[unit_of[path]].append(f"{path} from {before} to {after}")
    changed = []
    for row in found:
        leak = row.finding in ("exact_duplicate", "near_duplicate", "sequence", "group_across_splits")
        moves = moved.get(unit_of[str(row.path_a)], []) if leak else []
        changed.append(row._replace(detail=f"{row.detail}; moved: {', '.join(moves)}") if moves else row)
    return changed


def summary(rows: Sequence[Finding], n_moved: int) -> list[str]:
    """Return what the screen shows: a line per kind of finding, the worst first, with an example and what can be done.

    Args:
        rows: all findings.
        n_moved: number of images that were moved into another split.
    """
    lines = _lines(rows)
    if n_moved:
        lines["warn"].append(
            f"{count(n_moved, 'image')} moved, so that each group, sequence and all copies are in one split"
        )
    counts = [(len(lines["stop"]), "reason to stop", "reasons to stop"), (len(lines["warn"]), "warning", None)]
    head = ", ".join(count(n, one, many) for n, one, many in counts if n)
    if not head:
        return ["audit: no warnings" + (f", {count(len(rows), 'note')} in audit.parquet" if rows else "")]
    shown = [f"  {severity}  {line}" for severity, found in lines.items() for line in found]
    more = [f"  and {len(shown) - MOST_LINES} more"] if len(shown) > MOST_LINES else []
    leaks = any(row.severity == "stop" and row.finding != "unreadable" for row in rows)
    head = f"audit: {head} ({count(len(rows), 'finding')} in audit.parquet)"
    return [head, *shown[:MOST_LINES], *more, *[f"  cure: {CURE}"] * leaks]


def stops(rows: Sequence[Finding]) -> list[str]:
    """Return why a search does not begin, with the cure; nothing if it may."""
    return [f"{line}; {CURE}; tuning/audit.py lists all findings" for line in _lines(rows)["stop"]]


def _lines(rows: Sequence[Finding]) -> dict[str, list[str]]:
    """A line for each kind of finding, by severity, the worst first; notes have none."""
    kinds: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for row in sorted(rows, key=_rank):
        kinds[row.severity, row.finding].append(row)
    lines: dict[str, list[str]] = {"stop": [], "warn": []}
    for (severity, finding), found in kinds.items():
        if severity != "info":
            lines[severity] += _in_words(finding, found)
    return lines


def _in_words(finding: str, found: Sequence[Finding]) -> list[str]:
    first, n = found[0], len(found)
    if finding in OF_NAMES:
        return [f"{finding.replace('_', ' ')}: {row.detail}" for row in found]
    if finding == "imbalance":
        return [f"imbalance: {first.detail}; consider --set class_weighting=balanced metric=val_balanced_accuracy"]
    if finding.startswith("shortcut_"):
        cures = [(row, _hiding(finding, row.detail)) for row in found]
        kind = finding.removeprefix("shortcut_")
        return [f"{kind}: {row.detail}" + (f"; --set {cure} hides it" if cure else "") for row, cure in cures]
    if finding == "unreadable":
        return [f"{count(n, 'image')} can't be read, such as {first.path_a}: {first.detail}"]
    if finding == "group_across_splits":
        images = count(sum(int(row.value or 0) for row in found), "image")
        return [f"{count(n, 'group')} ({images}) in more than one split, such as {first.detail.split('; moved')[0]}"]
    if finding == "sequence":
        images = count(sum(int(row.value or 0) for row in found), "image")
        example = f"such as that of {first.path_a} and {first.path_b}"
        return [f"{count(n, 'sequence')} ({images}) in more than one split, {example}: this leaks; {GROUPED}"]
    kind = {
        "exact_duplicate": "of identical images",
        "near_duplicate": "of near duplicates",
        "label_conflict": "of copies with different labels",
    }[finding]
    across = sum("; in " in row.detail for row in found)
    where = f", {across} of them in different splits" if across else ""
    return [f"{count(n, 'pair')} {kind}{where}, such as {first.path_a} and {first.path_b}"]
