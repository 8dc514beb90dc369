"""Planted wrong labels are ranked first."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, softmax

from tuning.insight.confident import COLUMNS, ranked


def planted(rng, images=500, share=0.04):
    truth = rng.integers(0, 3, images)
    probabilities = softmax(2.0 * np.eye(3)[truth] + 0.7 * rng.normal(size=(images, 3)), axis=1)
    wrong = rng.random(images) < share
    return probabilities, np.where(wrong, (truth + 1) % 3, truth), truth, wrong


def test_wrong_labels_come_first_with_the_right_one_suggested():
    probabilities, labels, truth, wrong = planted(np.random.default_rng(0))
    found = ranked(probabilities, labels, ("a", "b", "c"))
    assert list(found) == list(COLUMNS) and found["own"].is_monotonic_increasing and len(found) == 500
    first = found["row"][: 2 * wrong.sum()]
    assert wrong[first].sum() >= 0.9 * wrong.sum()
    issues = found[found["issue"]]
    assert wrong[issues["row"]].mean() > 0.7 and (issues["label"] != issues["suggested"]).all()
    right = np.array(["a", "b", "c"])[truth[issues["row"]]] == issues["suggested"]
    assert right[wrong[issues["row"]]].mean() > 0.9


@given(st.integers(0, 1000))
def test_without_wrong_labels_sure_models_find_none(seed):
    rng = np.random.default_rng(seed)
    targets = np.concatenate([np.arange(3), rng.integers(0, 3, 60)])
    probabilities = softmax(8.0 * np.eye(3)[targets] + rng.normal(size=(63, 3)) * 0.3, axis=1)
    assert not ranked(probabilities, targets, ("a", "b", "c"))["issue"].any()


def test_each_label_of_several_is_judged_by_itself():
    rng = np.random.default_rng(1)
    truth = (rng.random((400, 2)) < 0.3).astype(int)
    probabilities = expit(4.0 * truth - 2 + 0.5 * rng.normal(size=truth.shape))
    targets = truth.copy()
    targets[7, 1], targets[8, 0], targets[9] = 1 - targets[7, 1], 1 - targets[8, 0], -1
    found = ranked(probabilities, targets, ("mass", "edema"))
    assert len(found) == 2 * 400 - 2 and set(found["row"][:2]) == {7, 8}
    assert 9 not in set(found["row"])
    seven = found[(found["row"] == 7) & found["issue"]]
    assert seven["suggested"].tolist() == [("no edema", "edema")[truth[7, 1]]]


@pytest.mark.parametrize("targets", [np.zeros(5, dtype=int), np.array([0, 0, 0, 0, 1])])
def test_a_class_of_few_images_is_no_fault(targets):
    assert len(ranked(np.full((5, 2), 0.5), targets, ("a", "b"))) == 5
