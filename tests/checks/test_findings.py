"""Findings become rows with a severity, and a few lines on the screen."""

import numpy as np
import pandas as pd
import pytest

from tuning.checks.duplicates import Pairs
from tuning.checks.findings import (
    KINDS,
    Finding,
    identical_images,
    of_copies,
    of_groups,
    of_imbalance,
    of_sequences,
    of_shortcuts,
    of_unreadable,
    stops,
    summary,
    table,
    with_moves,
)
from tuning.checks.shortcuts import Shortcut
from tuning.record.tables import AUDIT

SAMPLES = pd.DataFrame(
    {
        "path": ["a", "b", "c", "d"],
        "label": ["ill", "ill", "well", "well"],
        "split": ["train", "test", "train", "train"],
        "group": ["p1", "p1", "p1", None],
    }
)
NOTHING = Pairs(*(np.empty(0, dtype) for dtype in (np.int64, np.int64, np.float32, bool, bool)))


def pairs(*rows):
    a, b, agreement, copies = zip(*rows, strict=True)
    return Pairs(*(np.array(column) for column in (a, b, agreement, copies)), np.zeros(len(a), dtype=bool))


def steps(*rows):
    a, b = (np.array(column) for column in zip(*rows, strict=True))
    return Pairs(a, b, np.full(len(a), 0.98), np.zeros(len(a), dtype=bool), np.ones(len(a), dtype=bool))


def kinds(found):
    return [(row.finding, row.severity) for row in found]


def test_identical_images_are_listed_after_the_first():
    assert identical_images(["x", "y", "x", "z", "x", "y"]) == [(0, 2), (0, 4), (1, 5)]


@pytest.mark.parametrize(("on_leak", "severity"), [("stop", "stop"), ("warn", "warn"), ("move", "warn")])
def test_identical_images_in_different_splits_are_leaks(on_leak, severity):
    found = of_copies(SAMPLES, [(0, 1), (2, 3)], ["1", "2", "3", "3"], NOTHING, on_leak)
    assert kinds(found) == [("exact_duplicate", severity), ("exact_duplicate", "warn")]
    assert found[0].detail == "the same pixels in other bytes; in train and test; both ill"
    assert found[1].detail == "the same bytes; both in train; both well"


def test_copies_with_different_labels_are_label_conflicts():
    found = of_copies(SAMPLES, [(0, 2)], ["1"] * 4, pairs((0, 3, 0.98, True), (1, 3, 0.91, False)), "stop")
    assert kinds(found) == [
        ("exact_duplicate", "warn"),
        ("label_conflict", "warn"),
        ("near_duplicate", "warn"),
        ("label_conflict", "warn"),
        ("look_alike", "info"),
    ]
    assert found[3].detail == "copies of one image (near_duplicate) with the labels ill and well; both in train"
    assert (found[3].path_a, found[3].path_b, found[3].value) == ("a", "d", pytest.approx(0.98))


def test_a_sequence_is_one_finding_and_a_warning_if_it_is_split():
    near = steps((0, 1), (1, 2), (2, 3))
    assert of_copies(SAMPLES, [], ["1"] * 4, near, "stop") == []
    [row] = of_sequences(SAMPLES, near)
    detail = "4 images, each much like the next: 3 in train, 1 in test"
    assert row == Finding("sequence", "warn", "a", "b", 4.0, None, detail)
    [line] = [line for line in summary([row], 0) if "sequence" in line]
    assert "1 sequence (4 images) in more than one split, such as that of a and b: this leaks" in line
    assert "--set group_column=" in line
    [row] = of_sequences(SAMPLES.assign(split="val"), near)
    assert (row.severity, row.detail) == ("info", "4 images, each much like the next: 4 in val")
    assert summary([row], 0) == ["audit: no warnings, 1 note in audit.parquet"]


def test_copies_that_are_split_are_not_hidden_by_a_sequence():
    found = of_copies(SAMPLES, [(0, 1)], ["1"] * 4, steps((0, 2), (1, 2), (2, 3)), "stop")
    assert kinds(found) == [("exact_duplicate", "stop")]


def test_groups_in_different_splits_are_leaks():
    [row] = of_groups(SAMPLES, "stop")
    assert row == Finding("group_across_splits", "stop", "a", "b", 3.0, None, "group p1: 2 in train, 1 in test")
    assert of_groups(SAMPLES[SAMPLES["split"] == "train"].reset_index(drop=True), "stop") == []


@pytest.mark.parametrize(("small", "severity"), [(40, None), (30, "info"), (10, "warn")])
def test_imbalance(small, severity):
    found = of_imbalance(["big"] * 100 + ["small"] * small + ["middle"] * 60)
    assert kinds(found) == ([("imbalance", severity)] if severity else [])
    if found:
        assert found[0].value == 100 / small and found[0].detail == f"small has {small} images, big 100"


def test_what_settings_hide_is_a_note():
    rules = [
        Shortcut("shortcut_shape", 0.99, 0.5, 0.005, "a non-square shape predicts ill"),
        Shortcut("shortcut_colour", 0.99, 0.5, 0.005, "colour mode RGB predicts ill"),
        Shortcut("shortcut_colour", 0.99, 0.5, 0.005, "brightness over 90 predicts ill"),
        Shortcut("shortcut_thumbnail", 0.75, 0.5, 0.005, "a thumbnail predicts the class"),
    ]
    severities = [row.severity for row in of_shortcuts(rules, "squash", False)]
    assert severities == ["warn", "warn", "warn", "info"]
    hidden = of_shortcuts(rules, "crop", True)
    assert [row.severity for row in hidden] == ["info", "info", "warn", "info"]
    assert (
        hidden[0].detail
        == "a non-square shape predicts ill with 99.0% accuracy (majority-class baseline: 50.0%); hidden by fit=crop"
    )
    assert of_shortcuts(rules[:1], "letterbox", True)[0].severity == "warn"


def test_moves_are_in_the_detail():
    found = of_groups(SAMPLES, "move") + of_imbalance(["big"] * 9 + ["small"])
    moved = with_moves(found, SAMPLES, ["train"] * 4, np.array([0, 0, 0, 1]))
    assert [row.detail for row in moved] == [
        "group p1: 2 in train, 1 in test; moved: b from test to train",
        "small has 1 image, big 9",
    ]


def test_the_table_is_ordered_and_typed():
    found = of_groups(SAMPLES, "stop") + of_unreadable([("x", "is empty")], True)
    rows = table(of_imbalance(["big"] * 9 + ["small"]) + found)
    assert rows.schema.equals(AUDIT, check_metadata=True)
    assert rows["finding"].to_pylist() == ["group_across_splits", "unreadable", "imbalance"]
    assert rows["p_value"].null_count == 3
    assert table([]).schema.equals(AUDIT, check_metadata=True)


NOTES = ("look_alike", "decoding")  # never on the screen


def test_the_screen_is_calm():
    every = [
        Finding(kind, "warn", "a", "b", 1.0, None, f"{kind}; in train and test") for kind in KINDS if kind not in NOTES
    ]
    many = [row._replace(severity="stop") for row in every[:3] for _ in range(100)] + every * 50
    lines = summary(many, 7)
    assert len(lines) <= 15 and lines[0].startswith("audit: 3 reasons to stop, ")
    assert lines[1].startswith("  stop  100 images can't be read, such as a: ")
    assert lines[3] == "  stop  100 pairs of identical images, 100 of them in different splits, such as a and b"
    assert lines[-1].startswith("  cure: --set on_leak=move")
    assert summary([], 0) == ["audit: no warnings"]
    assert summary([every[0]._replace(severity="info")], 0) == ["audit: no warnings, 1 note in audit.parquet"]
    assert len(stops(many)) == 3 and stops(every) == []
    assert all("on_leak=move" in line for line in stops(many)[1:])
