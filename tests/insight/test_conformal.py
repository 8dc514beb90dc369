"""Sets of classes that can't be ruled out hold the true class as often as they say, for each class, by patient."""

import numpy as np
import pytest
from scipy.special import expit, softmax
from shared import SOAK

from tuning.insight.conformal import scores, thresholds

CLASSES = ("a", "b", "c")
SETS = 400 if SOAK else 40


def drawn(rng, patients, alike=1.0):
    """Probabilities of classes of patients' images, which are alike; the third class is rare and hard."""
    of_patient = rng.choice(3, patients, p=[0.5, 0.35, 0.15])
    groups = np.repeat(np.arange(patients), rng.integers(1, 6, patients))
    targets = of_patient[groups]
    logits = 1.5 * np.eye(3)[targets] * np.array([1, 1, 0.5]) + rng.normal(size=(len(groups), 3))
    logits += alike * rng.normal(size=(patients, 3))[groups]
    return softmax(logits, axis=1), targets, groups


@pytest.mark.slow
@pytest.mark.parametrize("coverage", [0.8, 0.9])
def test_sets_hold_the_true_class_as_often_as_they_say(coverage):
    rng = np.random.default_rng(0)
    held = {place: [] for place in range(3)}
    for _ in range(SETS):
        probabilities, targets, groups = drawn(rng, 150)
        least = thresholds(scores([probabilities], targets, groups, CLASSES), CLASSES, coverage)
        new, truth, of = drawn(rng, 2000)
        first = np.unique(of, return_index=True)[1]  # an image of each new patient
        inside = new[first] >= least
        for place in range(3):
            held[place].append(inside[truth[first] == place, place].mean())
    for place, shares in held.items():
        assert coverage - 0.02 <= np.mean(shares) <= coverage + (0.09 if place == 2 else 0.05), place


def test_a_class_of_few_patients_is_never_ruled_out():
    probabilities, targets, groups = np.full((30, 3), 0.3), np.array([0] * 20 + [1] * 10), np.arange(30)
    groups[20:] = 20
    found = scores([probabilities], targets, groups, CLASSES)
    assert found.groupby("class")["weight"].sum().to_dict() == {"a": 20.0, "b": 1.0}
    assert thresholds(found, CLASSES, 0.9).tolist() == [0.3, 0.0, 0.0]
    assert thresholds(found, CLASSES, 0.99).tolist() == [0.0, 0.0, 0.0]


def test_labels_that_can_not_be_ruled_out():
    rng = np.random.default_rng(1)
    targets = (rng.random((800, 3)) < 0.3).astype(int)
    targets[::9, 1] = -1
    probabilities = expit(2.0 * targets - 1 + rng.normal(size=targets.shape))
    least = thresholds(scores([probabilities], targets, np.arange(800), CLASSES), CLASSES, 0.9)
    for place in range(3):
        there = targets[:, place] == 1
        assert 0.9 <= (probabilities[there, place] >= least[place]).mean() <= 0.93


def test_several_models_share_the_weights():
    probabilities, targets, groups = drawn(np.random.default_rng(2), 40)
    one = scores([probabilities], targets, groups, CLASSES)
    two = scores([probabilities, probabilities], targets, groups, CLASSES)
    assert len(two) == 2 * len(one)
    assert thresholds(one, CLASSES, 0.8) == pytest.approx(thresholds(two, CLASSES, 0.8))
