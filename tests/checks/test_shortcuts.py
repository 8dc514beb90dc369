"""Rules that predict a class without the picture are found, and none where there is none."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from shared import examples

from tuning.checks.shortcuts import (
    EASY,
    MOST_IMAGES,
    P_VALUE,
    SIDE,
    STRANGE,
    best_table,
    folds,
    linear_probe,
    sampled,
    shortcuts,
)

CLASSES = ("covid", "normal", "pneumonia")


def labels_of(n, classes=CLASSES):
    return [classes[number % len(classes)] for number in range(n)]


def pictures(n, channels=1, seed=0):
    """Cloudy pictures that know nothing of a class."""
    rng = np.random.default_rng(seed)
    clouds = ndimage.gaussian_filter(rng.normal(size=(n, SIDE, SIDE, channels)), (0, 2, 2, 0))
    return (128 + 250 * clouds + rng.normal(0, 8, clouds.shape)).clip(0, 255).astype(np.float32)


def facts(n, **columns):
    rng = np.random.default_rng(1)
    known = {
        "width": rng.integers(300, 400, n),
        "height": rng.integers(300, 400, n),
        "bytes": rng.integers(9000, 9999, n),
    }
    return pd.DataFrame(
        known | {"mode": rng.choice(["L", "RGB"], n), "format": rng.choice(["PNG", "JPEG"], n)} | columns
    )


def found(labels, shown=None, known=None, units=None):
    n = len(labels)
    shown, known = pictures(n) if shown is None else shown, facts(n) if known is None else known
    units = np.arange(n) if units is None else units
    return {rule.finding: rule for rule in shortcuts(shown, known, labels, units) or []}


@pytest.mark.parametrize(("n", "seed"), [(60, 0), (60, 1), (200, 2)])
def test_nothing_is_found_where_nothing_is(n, seed):
    assert found(labels_of(n), pictures(n, seed=seed)) == {}
    assert found(labels_of(n, ("ill", "well")), pictures(n, 3, seed=seed)) == {}


def test_a_shape_is_put_in_words():
    labels = labels_of(240)
    wide = np.array([label == "covid" for label in labels])
    wide[:3] = False
    rule = found(labels, known=facts(240, width=np.where(wide, 330, 320), height=np.full(240, 320)))["shortcut_shape"]
    assert rule.rule == "a non-square shape predicts covid"
    assert rule.accuracy == pytest.approx(239 / 240) and rule.baseline == pytest.approx(2 / 3)
    assert rule.p_value == 0.005 and rule.skill > 0.9 and not rule.honest


@pytest.mark.parametrize(
    ("finding", "column", "values", "rule"),
    [
        ("shortcut_shape", "width", (500, 250, 250), "width over 250 predicts covid"),
        ("shortcut_colour", "mode", ("RGBA", "L", "L"), "colour mode RGBA predicts covid"),
        ("shortcut_metadata", "format", ("PNG", "JPEG", "JPEG"), "file format PNG predicts covid"),
        ("shortcut_metadata", "mode", ("I;16", "L", "L"), "bits per value 16 predicts covid"),  # no colour to drop
        ("shortcut_metadata", "bytes", (4000, 3000, 2000), "file size in bytes over 3,000 predicts covid"),
    ],
)
def test_each_fact_is_tried(finding, column, values, rule):
    labels = labels_of(150)
    column_values = [values[CLASSES.index(label)] for label in labels]
    square = {"width": np.full(150, 300), "height": np.full(150, 300)} if column != "width" else {}
    rules = found(labels, known=facts(150, **square | {column: column_values}))
    assert rules[finding].accuracy == 1 and rules[finding].rule == rule
    assert set(rules) == {finding} or column == "width"  # which changes the bytes per pixel too


def test_brightness_is_tried():
    labels = labels_of(150)
    shown = pictures(150) + np.array([60 * (label == "covid") for label in labels])[:, None, None, None]
    rules = found(labels, shown)
    assert rules["shortcut_colour"].rule.startswith("brightness over") and rules["shortcut_colour"].rule.endswith(
        "covid"
    )
    assert rules["shortcut_thumbnail"].accuracy > 0.95


@pytest.mark.parametrize("classes", [("ill", "well"), CLASSES])
@pytest.mark.parametrize("jitter", [0, 2])
def test_a_mark_in_the_corner_is_found(classes, jitter):
    labels, shown = labels_of(240, classes), pictures(240)
    rng = np.random.default_rng(0)
    for picture, label in zip(shown, labels, strict=True):
        if label == classes[-1]:
            y, x = 1 + rng.integers(0, jitter + 1, 2)
            picture[y : y + 2, x : x + 2] = 255
    rules = found(labels, shown)
    assert "shortcut_border" in rules and rules["shortcut_border"].p_value <= P_VALUE
    assert rules["shortcut_border"].accuracy > 0.85
    assert "shortcut_border" not in found(labels, pictures(240))


def test_what_only_knows_the_patient_is_no_shortcut():
    patients = np.repeat(np.arange(40), 6)
    labels = [("ill", "well")[patient % 2] for patient in patients]
    sizes = np.random.default_rng(0).permutation(40)[patients] + 300  # every patient's own
    known = facts(240, width=sizes, height=sizes)
    assert "shortcut_shape" in found(labels, known=known)
    assert found(labels, known=known, units=patients) == {}


def test_a_thumbnail_is_honest_up_to_a_point():
    labels = labels_of(240, ("ill", "well"))
    shown = pictures(240)
    shown[1::2, 12:20, 12:20] += 15
    rule = found(labels, shown)["shortcut_thumbnail"]
    assert STRANGE < rule.skill < EASY and rule.honest
    shown[1::2, 12:20, 12:20] += 60
    assert not found(labels, shown)["shortcut_thumbnail"].honest


def test_a_class_of_one_patient_is_left_out():
    assert folds(["a", "a", "b", "b"], np.array([0, 1, 2, 2])) is None
    assert shortcuts(pictures(4), facts(4), ["a", "a", "b", "b"], np.array([0, 1, 2, 2])) is None
    assert sampled(["rare", "a", "b", "a", "b", "rare"], np.array([0, 1, 2, 3, 4, 0])).tolist() == [1, 2, 3, 4]


def test_of_many_images_some_are_tried():
    chosen = sampled(labels_of(MOST_IMAGES + 500), np.arange(MOST_IMAGES + 500))
    assert len(set(chosen.tolist())) == MOST_IMAGES and (np.diff(chosen) > 0).all()


@pytest.mark.slow
@examples(30)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 9)), min_size=12, max_size=40))
def test_folds_keep_units_whole_and_shuffling_keeps_blocks(rows):
    labels, units = [label for label, _ in rows], np.array([unit for _, unit in rows])
    tried = folds(labels, units) if len(set(labels)) == 2 else None
    if tried is None:
        return
    assert all(len(set(tried.fold[units == unit])) == 1 for unit in set(units.tolist()))
    assert (np.sort(tried.labels, axis=1) == np.sort(tried.labels[0])).all()
    assert [tried.classes[label] for label in tried.labels[0]] == labels


def test_a_p_value_is_that_of_the_best_of_all_tried():
    tried = folds(labels_of(60), np.arange(60))
    rng = np.random.default_rng(0)
    values = [best_table("x", {str(k): rng.random(60) for k in range(20)}, tried).p_value for _ in range(10)]
    assert np.mean(np.array(values) <= 0.1) <= 0.3
    assert linear_probe("x", "noise", rng.random((60, 5), dtype=np.float32), tried).p_value > P_VALUE
