"""Subgroups that a model serves worse are flagged, and seldom others; figures per patient."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared import SOAK

from tuning.insight.intervals import measure
from tuning.insight.per_group import grouped, measured
from tuning.insight.subgroups import LEVEL, compared, in_words
from tuning.record.subgroups import PARTS, subgroups_of

SETS = 400 if SOAK else 12


def hospital(rng, *, gap=0.0, images=2000):
    """Predictions of two classes, right in 85% of images, and fewer of the old; columns of who and where."""
    columns = {
        "sex": rng.choice(["f", "m"], images).tolist(),
        "age": rng.choice(["0 to 40", "40 to 60", "60 to 80", "over 80"], images, p=[0.3, 0.3, 0.2, 0.2]).tolist(),
        "site": rng.choice(list("abcde"), images).tolist(),
    }
    old = np.array([value == "over 80" for value in columns["age"]])
    targets = rng.integers(0, 2, images)
    right = rng.random(images) < 0.85 - gap * old
    sure = rng.uniform(0.5, 1, images)
    positive = np.where(right == (targets == 1), sure, 1 - sure)
    return np.stack([1 - positive, positive], axis=1), targets, columns


def flagged(rows):
    return {
        (row["column"], row["value"])
        for row in rows
        for change in row["differences"].values()
        if change is not None and change["flagged"]
    }


@pytest.mark.slow
def test_gaps_of_ten_points_are_flagged_and_few_others():
    rng = np.random.default_rng(0)
    found, false = 0, 0
    for _ in range(SETS):
        probabilities, targets, columns = hospital(rng, gap=0.1)
        rows, _ = compared(probabilities, targets, np.arange(2000), columns)
        found += ("age", "over 80") in flagged(rows)
        probabilities, targets, columns = hospital(rng)
        rows, _ = compared(probabilities, targets, np.arange(2000), columns)
        false += bool(flagged(rows))
    assert found >= 0.8 * SETS
    assert false <= LEVEL * SETS + 2 * np.sqrt(LEVEL * SETS)


def test_the_worst_subgroup_is_said_first_and_two_values_are_one_comparison():
    rng = np.random.default_rng(1)
    probabilities, targets, columns = hospital(rng, gap=0.2)
    rows, comparisons = compared(probabilities, targets, np.arange(2000), columns)
    assert comparisons == 2 * (1 + 4 + 5) and len(rows) == 11
    [first, *_] = in_words(rows, comparisons)
    assert first.startswith("age over 80 (") and "20 comparisons" in first
    of_sex = {row["value"]: row for row in rows if row["column"] == "sex"}
    for name in ("balanced_accuracy", "auroc"):
        one, two = (of_sex[value]["differences"][name] for value in "fm")
        assert one["difference"] == -two["difference"] and one["p_value"] == two["p_value"]
    inside = np.array([value == "over 80" for value in columns["age"]])
    old = next(row for row in rows if row["value"] == "over 80")
    whole = measure(probabilities[inside], targets[inside], np.arange(inside.sum()), ("a", "b"))
    assert old["accuracy"] == whole["accuracy"] and old["auroc_95"] == whole["auroc_95"]
    sex_only = {"sex": columns["sex"]}
    assert in_words(*compared(*hospital(rng)[:2], np.arange(2000), sex_only))[0].startswith("no subgroup is")


def test_small_subgroups_and_those_of_all_images_are_shown_but_not_compared():
    rng = np.random.default_rng(2)
    probabilities, targets, _ = hospital(rng, images=60)
    columns = {"site": ["a"] * 55 + ["b"] * 5, "view": ["PA"] * 60}
    rows, comparisons = compared(probabilities, targets, np.arange(60), columns)
    assert [row["images"] for row in rows] == [55, 5, 60] and comparisons == 0
    assert all(change is None for row in rows for change in row["differences"].values())
    (line,) = in_words(rows, comparisons)
    assert line.startswith("not compared: ") and "fewer than 10 patients or images" in line


def test_ages_are_divided_into_whole_years_that_do_not_overlap():
    ages = pd.Series(np.arange(400) % 80)
    names = sorted(set(subgroups_of(pd.DataFrame({"subgroup_age": ages.astype(str)}))[0]["age"]))
    assert names == ["0 to 19", "20 to 39", "40 to 59", "60 to 79"]


def test_columns_of_many_values():
    samples = pd.DataFrame(
        {
            "path": [f"{n}.png" for n in range(400)],
            "subgroup_age": [None if n == 7 else str(n % 80) for n in range(400)],
            "subgroup_id": [f"id{n}" for n in range(400)],
            "subgroup_view": ["PA", "AP"] * 200,
            "subgroup_count": [str(n % 3) for n in range(400)],
        }
    )
    columns, lines = subgroups_of(samples)
    assert columns.keys() == {"age", "view", "count"} and lines == [
        "subgroups: 'id' is left out: it has 400 different values; give at most 20 words, or numbers"
    ]
    ages = pd.Series(columns["age"]).value_counts()
    assert columns["age"][7] is None and len(ages) == 4 and ages.between(95, 105).all()
    assert set(columns["count"]) == {"0", "1", "2"}


@given(st.lists(st.floats(-1e3, 1e3), min_size=7, max_size=60))
def test_every_number_is_within_the_ends_of_its_part(numbers):
    columns, _ = subgroups_of(pd.DataFrame({"subgroup_x": [f"{number:.3f}" for number in numbers]}))
    if len({f"{number:.3f}" for number in numbers}) <= 6:
        assert columns["x"] == [f"{number:.3f}" for number in numbers]
        return
    assert len(set(columns["x"])) <= PARTS
    for number, part in zip(numbers, columns["x"], strict=True):
        low, high = map(float, part.split(" to "))
        margin = 1e-4 * max(abs(low), abs(high), 1)  # the ends are written with six digits
        assert low - margin <= round(number, 3) <= high + margin


# ---- per group -------------------------------------------------------------------------------------------------------


def test_a_patient_has_the_mean_or_the_maximum_of_its_images():
    probabilities = np.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8], [0.4, 0.6], [0.3, 0.7]])
    targets, groups = np.array([0, 0, 1, 1, 0]), np.array([0, 0, 1, 2, 2])
    found, of_groups, left_out = grouped(probabilities, targets, groups, "mean")
    assert found.tolist() == pytest.approx(np.array([[0.7, 0.3], [0.2, 0.8]])) and of_groups.tolist() == [0, 1]
    assert left_out == 1
    found, _, _ = grouped(probabilities, targets, groups, "max")
    assert found[0].tolist() == pytest.approx([0.9 / 1.4, 0.5 / 1.4])
    whole = measured(probabilities, targets, groups, ("a", "b"), "mean")["per_group"]
    assert whole["accuracy"] == 1.0 and whole["images"] == 2 and "left out: 1 group" in whole["in_words"]
    assert measured(probabilities, targets, groups, ("a", "b"), None) == {}


def test_a_patient_has_the_labels_of_any_of_its_images():
    probabilities = np.array([[0.9, 0.1], [0.5, 0.6], [0.2, 0.8]])
    targets, groups = np.array([[1, 0], [0, -1], [-1, 0]]), np.array([0, 0, 1])
    found, of_groups, left_out = grouped(probabilities, targets, groups, "max")
    assert found.tolist() == [[0.9, 0.6], [0.2, 0.8]] and left_out == 0
    assert of_groups.tolist() == [[1, -1], [-1, 0]]
