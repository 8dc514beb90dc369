import numpy as np
import pytest
from scipy import stats
from scipy.special import softmax
from sklearn import metrics

from tuning.insight.intervals import mean_interval, measure


def test_measures_by_hand():
    targets = np.array([0, 0, 0, 1, 1])
    probabilities = softmax([[2, 0], [2, 0], [0, 2], [0, 2], [0, 1]], axis=1)
    found = measure(probabilities, targets, np.arange(5), ("a", "b"))
    assert found["accuracy"] == 0.8 and found["images"] == found["groups"] == 5
    assert found["classes"]["a"]["sensitivity"] == pytest.approx(2 / 3)
    assert found["classes"]["a"]["specificity"] == 1.0
    assert found["balanced_accuracy"] == pytest.approx(5 / 6)
    assert found["confusion"]["counts"] == [[2, 1], [0, 2]]
    assert found["loss"] == pytest.approx(-np.log(probabilities[np.arange(5), targets]).mean())


def drawn(count=200, seed=0, groups=None):
    rng = np.random.default_rng(seed)
    targets = rng.choice(3, count, p=[0.2, 0.4, 0.4])
    probabilities = softmax(np.round(np.eye(3)[targets] + rng.normal(size=(count, 3)), 1), axis=1)
    return probabilities, targets


def test_figures_are_those_of_scikit_learn():
    probabilities, targets = drawn()
    found = measure(probabilities, targets, np.arange(200), ("a", "b", "c"))
    predicted = probabilities.argmax(axis=1)
    assert found["auroc"] == pytest.approx(metrics.roc_auc_score(targets, probabilities, multi_class="ovr"))
    assert found["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(targets, predicted))
    for index, name in enumerate("abc"):
        auroc = metrics.roc_auc_score(targets == index, probabilities[:, index])
        assert found["classes"][name]["auroc"] == pytest.approx(auroc)
        recall = metrics.recall_score(targets, predicted, average=None)[index]
        assert found["classes"][name]["sensitivity"] == pytest.approx(recall)
    assert found["confusion"]["counts"] == metrics.confusion_matrix(targets, predicted).tolist()


def test_bootstrap_intervals_are_those_of_scipy():
    probabilities, targets = drawn()
    found = measure(probabilities, targets, np.arange(200), ("a", "b", "c"))
    right = (probabilities.argmax(axis=1) == targets).astype(float)
    accuracy = stats.bootstrap((right,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1))
    assert found["accuracy_95"] == pytest.approx(list(accuracy.confidence_interval), abs=0.012)

    def auroc(positive, values):
        return metrics.roc_auc_score(positive, values)

    how = {"n_resamples": 200, "rng": np.random.default_rng(1), "paired": True, "vectorized": False}
    drawn_too = stats.bootstrap((targets == 0, probabilities[:, 0]), auroc, method="percentile", **how)
    whole = drawn_too.confidence_interval
    assert found["classes"]["a"]["auroc_95"] == pytest.approx(list(whole), abs=0.04)
    assert found == measure(probabilities, targets, np.arange(200), ("a", "b", "c"))


def test_images_of_the_same_patient_do_not_narrow_an_interval():
    probabilities, targets = drawn(60)
    one = measure(probabilities, targets, np.arange(60), ("a", "b", "c"))
    four = measure(
        np.repeat(probabilities, 4, axis=0), np.repeat(targets, 4), np.repeat(np.arange(60), 4), tuple("abc")
    )
    assert four["images"] == 240 and four["groups"] == 60
    for name in ("accuracy_95", "balanced_accuracy_95", "auroc_95"):
        assert four[name] == pytest.approx(one[name])


def test_what_was_always_right_is_not_taken_for_certain():
    targets = np.arange(20) % 2
    found = measure(np.eye(2)[targets] * 0.8 + 0.1, targets, np.arange(20), ("a", "b"))
    exact = stats.binomtest(20, 20).proportion_ci(method="exact").low
    assert found["accuracy_95"] == [pytest.approx(exact), 1.0]
    exact = stats.binomtest(10, 10).proportion_ci(method="exact").low
    assert found["classes"]["a"]["sensitivity_95"] == found["auroc_95"] == [pytest.approx(exact), 1.0]
    wrong = measure(np.eye(2)[1 - targets] * 0.8 + 0.1, targets, np.arange(20), ("a", "b"))
    assert wrong["classes"]["b"]["specificity_95"] == [0.0, pytest.approx(1 - exact)]


def test_a_class_that_the_test_set_lacks_has_no_figures():
    probabilities, targets = drawn()
    targets = np.where(targets == 0, 1, targets)
    found = measure(probabilities, targets, np.arange(200), ("a", "b", "c"))
    assert found["auroc"] is found["auroc_95"] is found["classes"]["a"]["sensitivity"] is None
    assert found["classes"]["a"]["images"] == 0 and found["classes"]["a"]["specificity"] is not None
    assert found["balanced_accuracy"] is not None and found["balanced_accuracy_95"] is not None


@pytest.mark.parametrize(("classes", "each"), [(60, 2), (120, 3), (8, 1), (3, 20)])
def test_an_interval_holds_its_figure_and_has_a_width_or_is_none(classes, each):
    """Few of the samples have all of many small classes, and their macro AUROC is that of other classes."""
    rng = np.random.default_rng(1)
    targets = np.repeat(np.arange(classes), each)
    logits = rng.normal(size=(len(targets), classes))
    logits[np.arange(len(targets)), targets] += 1.5
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found = measure(probabilities, targets, np.arange(len(targets)), tuple(map(str, range(classes))))
    for name in ("accuracy", "balanced_accuracy", "auroc"):
        interval = found[f"{name}_95"]
        assert interval is None or (interval[0] <= found[name] <= interval[1] and interval[1] - interval[0] > 1e-6)
    assert (found["auroc_95"] is None) == (classes > 3)


def test_intervals_of_a_mean():
    rng = np.random.default_rng(0)
    values = rng.normal(size=30)
    plain = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean_interval(values, np.arange(30)) == pytest.approx((values.mean(), plain.low, plain.high))
    grouped = mean_interval(np.repeat(values, 3), np.repeat(np.arange(30), 3))
    assert grouped == pytest.approx((values.mean(), plain.low, plain.high))
    assert mean_interval(values, np.zeros(30, np.int64))[1:] == (-np.inf, np.inf)
    assert mean_interval(np.ones(5), np.arange(5)) == (1.0, 1.0, 1.0)


def test_strata_are_not_left_to_chance():
    rng = np.random.default_rng(0)
    strata = np.arange(40) % 2
    values = 10.0 * strata + rng.normal(size=40)
    _, low, high = mean_interval(values, np.arange(40), strata=strata)
    welch = stats.ttest_ind(values[strata == 1], -values[strata == 0], equal_var=False).confidence_interval(0.95)
    assert (low, high) == pytest.approx((welch.low / 2, welch.high / 2))
    assert mean_interval(values, np.arange(40))[1] < low


def test_intervals_hold_what_they_promise():
    """Of 400 sets of patients with one to five images, the 95% intervals of the mean miss the truth in about 5%."""
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(400):
        groups = np.repeat(np.arange(25), rng.integers(1, 6, 25))
        values = rng.normal(size=25)[groups] + 0.3 * rng.normal(size=len(groups))
        _, low, high = mean_interval(values, groups)
        missed += not low < 0 < high
    assert 0.02 < missed / 400 < 0.09
