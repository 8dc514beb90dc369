"""Evaluations on the test set are counted by its images, and scored by the samples' own labels."""

import hashlib

import numpy as np
import pandas as pd
import pytest

from tuning.insight.calibration import calibration_error
from tuning.model.held_out import READINGS, few_images, record_evaluation, score_test_set
from tuning.record.journal import Journal, read_journal
from tuning.record.temperature import tempered


def digests(images):
    return [hashlib.sha256(image.encode()).hexdigest() for image in images]


def test_evaluations_are_counted_that_share_test_images_whatever_else_the_data_has(tmp_path):
    found = [
        record_evaluation(tmp_path, data, "train", False, digests(images))
        for data, images in (("a", "AB"), ("b", "CD"), ("c", "BE"))
    ]
    assert [(each["number"], each["known_images"]) for each in found] == [(1, 0), (1, 0), (2, 1)]
    again = record_evaluation(tmp_path, "a", "train+val", True, digests("ABB"))
    assert (again["number"], again["known_images"]) == (3, 3) and again["first_at"] <= again["at"]
    assert [event["fingerprint"] for event in read_journal(tmp_path / READINGS)] == ["a", "b", "c", "a"]


def test_evaluations_of_an_older_version_are_counted_by_data(tmp_path):
    journal = Journal(tmp_path / READINGS)
    for data in ("a", "b", "a"):
        journal.append("test_read", fingerprint=data, trained_on="train", ensemble=False)
    journal.close()
    found = record_evaluation(tmp_path, "a", "train", False, digests("AB"))
    assert (found["number"], found["known_images"]) == (3, 2)


def test_a_temperature_of_few_images_is_called_that():
    assert few_images({"value": 1.2, "fitted_on": "validation", "images": 4}) == (
        " (4 images: too few for a reliable temperature)"
    )
    assert few_images({"value": 1.2, "fitted_on": "validation", "images": 225}) == ""
    assert few_images({"value": 1.2, "fitted_on": "validation"}) == ""  # by an older version


def test_scores_of_the_test_set():
    samples = pd.DataFrame({"path": list("abcd"), "label": ["y", "x", "y", "x"], "group": ["1", "1", None, None]})
    logits = np.array([[0.0, 2.0], [3.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    found = score_test_set(logits, 2.0, samples, ("x", "y"), {}, {})
    assert found["accuracy"] == 0.75 and found["images"] == 4 and found["groups"] == 3
    assert found["confusion"]["counts"] == [[2, 0], [1, 1]]
    targets = np.array([1, 0, 1, 0])
    assert found["calibration_error"] == pytest.approx(calibration_error(tempered(logits, 2.0), targets))
    assert found["calibration_error_untempered"] == pytest.approx(calibration_error(tempered(logits, 1.0), targets))
