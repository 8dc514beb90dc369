"""Thresholds keep their specificity on validation; PPV and NPV follow from sensitivity, specificity and prevalence."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared import examples

from tuning.insight.operating import at, median_thresholds, prevalences, thresholds
from tuning.settings.config import InputError

CLASSES = ("ill", "well")


def drawn(seed, images=200, share=0.4):
    """Probabilities [images, 2] that tell the classes apart in part, and the classes."""
    rng = np.random.default_rng(seed)
    targets = (rng.random(images) > share).astype(np.int64)
    ill = 1 / (1 + np.exp(-rng.normal(1.2 - 2.4 * targets, 1.0)))
    return np.stack([ill, 1 - ill], axis=1), targets


@examples(60)
@given(seed=st.integers(0, 10**6), images=st.integers(4, 60), ties=st.booleans())
def test_thresholds_are_the_lowest_with_their_specificity(seed, images, ties):
    probabilities, targets = drawn(seed, images)
    if ties:
        probabilities = probabilities.round(1)
    for index, name in enumerate(CLASSES):
        negatives = probabilities[targets != index, index]
        found = thresholds(probabilities, targets, CLASSES)
        if len(negatives) in (0, images):
            assert name not in found
            continue
        for wanted, threshold in found[name].items():
            assert (negatives <= threshold).mean() >= float(wanted)
            lower = negatives[negatives < threshold]
            assert not len(lower) or (negatives <= lower.max()).mean() < float(wanted)


def test_points_are_shares_and_follow_bayes():
    probabilities, targets = drawn(0, 400)
    chosen = thresholds(probabilities, targets, CLASSES)
    rows = at(chosen, probabilities, targets, np.arange(400), CLASSES, {"ill": 0.02})
    assert [(row["class"], row["validation_specificity"]) for row in rows] == [
        (name, share) for name in CLASSES for share in (0.9, 0.95)
    ]
    for row in rows[:2]:
        called = probabilities[:, 0] > row["threshold"]
        sensitivity, specificity = called[targets == 0].mean(), (~called[targets == 1]).mean()
        assert row["sensitivity"] == pytest.approx(sensitivity) and row["specificity"] == pytest.approx(specificity)
        ill, well = sensitivity * 0.02, (1 - specificity) * 0.98
        assert row["ppv"] == pytest.approx(ill / (ill + well))
        assert row["npv"] == pytest.approx(specificity * 0.98 / (specificity * 0.98 + (1 - sensitivity) * 0.02))
        for name in ("sensitivity", "specificity", "ppv", "npv"):
            assert row[f"{name}_95"][0] <= row[name] <= row[f"{name}_95"][1]
    assert "ppv" not in rows[2]


def test_intervals_of_ppv_hold_it_as_often_as_promised():
    """400 test sets of one model, at a prevalence other than theirs."""
    val, of_val = drawn(1, 4000)
    chosen = thresholds(val, of_val, CLASSES)
    everyone, of_everyone = drawn(2, 200_000)
    (truth, *_) = at(chosen, everyone, of_everyone, np.arange(200_000), CLASSES, {"ill": 0.1})
    held = 0
    for seed in range(400):
        probabilities, targets = drawn(10 + seed, 200)
        (row, *_) = at(chosen, probabilities, targets, np.arange(200), CLASSES, {"ill": 0.1})
        held += row["ppv_95"][0] <= truth["ppv"] <= row["ppv_95"][1]
    assert 0.92 <= held / 400 <= 0.985


def test_nothing_called_and_a_class_without_images():
    probabilities, targets = drawn(0)
    never = {"ill": {"0.9": 1.0}}
    (row,) = at(never, probabilities, targets, np.arange(200), CLASSES, {"ill": 0.1})
    assert row["sensitivity"] == 0 and row["specificity"] == 1 and row["ppv"] is row["ppv_95"] is None
    well = targets == 1
    (row,) = at(never, probabilities[well], targets[well], np.arange(well.sum()), CLASSES, {"ill": 0.1})
    assert row["sensitivity"] is None and row["npv"] is None


def test_medians_over_models():
    probabilities, targets = drawn(0)
    shifted = probabilities.copy()
    shifted[:, 0] /= 2
    each = [thresholds(one, targets, CLASSES)["ill"]["0.9"] for one in (probabilities, shifted)]
    assert median_thresholds([probabilities, shifted], targets, CLASSES)["ill"]["0.9"] == pytest.approx(np.mean(each))
    assert median_thresholds([], targets, CLASSES) == {}


@pytest.mark.parametrize(
    ("pair", "said"),
    [("ill=2", "between 0 and 1"), ("ill", "give CLASS=SHARE"), ("sick=0.1", "are ill, well"), ("ill=x", "0 and 1")],
)
def test_wrong_prevalences(pair, said):
    assert prevalences(["ill=0.02"], CLASSES) == {"ill": 0.02}
    with pytest.raises(InputError, match=said):
        prevalences([pair], CLASSES)
