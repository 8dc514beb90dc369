"""What names let suspect: spellings of one class or patient, placeholders, rounded ids; and what they don't."""

import pandas as pd
import pytest

from tuning.checks.names import of_names


def found(labels=None, groups=None, splits=None, count=40):
    labels = labels or ["ill", "well"] * (count // 2)
    splits = splits or (["train"] * 2 + ["val"] * 2) * (len(labels) // 4)
    table = pd.DataFrame({"label": labels, "split": splits, "group": groups or [None] * len(labels)}, dtype=object)
    return {row.finding: row.detail for row in of_names(table)}


@pytest.mark.parametrize(
    "spellings",
    [
        ("normal", "NORMAL"),
        ("COVID 19", "COVID  19"),
        ("caf\u00e9", "cafe\u0301"),
        ("a\u200bb", "ab"),
        ("COVID-19", "COVID 19"),
    ],
)
def test_two_spellings_of_a_class(spellings):
    details = found(labels=[spellings[0], spellings[1], "other", "other"] * 10, splits=["train"] * 40)
    assert all(repr(name) in details["similar_classes"] for name in spellings)
    assert found() == {} and found(labels=["1", "10", "01a", "1b"] * 10, splits=["train"] * 40) == {}


@pytest.mark.parametrize(
    "spellings", [("0007", "7"), ("p-12", "P12"), ("12 34", "1234"), ("1,234", "1234"), ("A_1", "a1"), ("00001", "1.0")]
)
def test_two_spellings_of_a_patient(spellings):
    groups = [*spellings, *(f"x{number}" for number in range(38))]
    assert found(groups=groups)["similar_groups"].startswith(" and ".join(map(repr, sorted(spellings))))


def test_patients_whose_ids_only_resemble_each_other_are_nothing():
    assert found(groups=[str(1000 + number) for number in range(40)]) == {}
    assert found(groups=[f"1.{number}" for number in range(10, 50)]) == {}
    apart = ["1-11", "11-1", "site1_12", "site11_2", "2-3", "23", "1.2.840.1.11", "1.2.840.11.1", "-1", "00001", "1.10"]
    assert found(groups=[*apart, *(f"x{number}" for number in range(29))]) == {}


def test_placeholders_and_rounded_ids():
    assert "'unknown' has 20 images of 40" in found(groups=["unknown"] * 20 + list(map(str, range(20))))["large_group"]
    assert found(groups=["a"] * 20 + ["b"] * 20) == {}  # two large groups, such as hospitals
    rounded = found(groups=["1.23457E+11"] * 2 + list(map(str, range(38))))
    assert rounded["rounded_groups"] == "1.23457E+11: a spreadsheet has rounded these ids"


def test_a_class_that_a_split_lacks():
    splits = ["train"] * 30 + ["test"] * 10
    assert found(labels=["ill"] * 20 + ["well"] * 20, splits=splits)["missing_class"] == "no image of ill in test"


def test_a_class_that_stands_for_no_label():
    details = found(labels=["ill", "well", "NA", "ill"] * 10, splits=["train"] * 40)
    assert details == {"placeholder_class": "'NA' is a class; is it a missing label?"}
