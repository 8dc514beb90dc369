from typing import get_args

import numpy as np
import pytest
from scipy.special import expit, softmax
from shared import SOAK
from sklearn import metrics

from tuning.insight.intervals import measure
from tuning.insight.paired import compare, shares
from tuning.record.predictions import Predictions
from tuning.record.temperature import tempered_loss
from tuning.settings.config import SearchPlan

CLASSES = ("a", "b", "c")
SEARCHES = 1000 if SOAK else 24


def predicted(logits, targets, groups=None):
    """Predictions of trials t0, t1, ..., from logits [trials, images, classes]."""
    names = tuple(f"t{number}" for number in range(len(logits)))
    groups = np.arange(len(targets)) if groups is None else groups
    return Predictions(names, softmax(logits, axis=2), targets, groups, CLASSES[: logits.shape[2]])


def search(rng, *, trials, images, better=0.0, own=0.7, scale=1.2):
    """A search of two classes, whose trials see what all see through noise of their own; the first is the default."""
    targets = rng.integers(0, 2, images)
    sides = 2 * targets - 1
    seen = 0.8 * sides + rng.normal(size=images)
    evidence = scale * (seen + own * rng.normal(size=(trials, images)))
    evidence[1:] += better * sides
    return np.stack([np.zeros_like(evidence), evidence], axis=2), targets


def best_of(predictions):
    """The trial of the lowest loss, and the loss of the default less its own."""
    losses = predictions.losses.mean(axis=1)
    return predictions.trial_ids[losses.argmin()], losses[0] - losses.min()


METRICS = get_args(SearchPlan.model_fields["metric"].annotation)


@pytest.mark.parametrize("metric", METRICS)
def test_the_difference_is_that_of_scikit_learn(metric):
    rng = np.random.default_rng(0)
    targets = rng.choice(3, 120, p=[0.2, 0.3, 0.5])
    logits = 1.5 * np.eye(3)[targets] + rng.normal(size=(4, 120, 3))
    predictions = predicted(logits, targets)

    def figure(probabilities):
        if metric == "val_tempered_loss":
            return -tempered_loss(np.log(probabilities), targets)
        if metric == "val_loss":
            return -metrics.log_loss(targets, probabilities)
        called = probabilities.argmax(axis=1)
        if metric == "val_auroc":
            return metrics.roc_auc_score(targets, probabilities, multi_class="ovr")
        if metric == "val_auprc":
            return metrics.average_precision_score(np.eye(3)[targets], probabilities)
        if metric == "val_f1":
            return metrics.f1_score(targets, called, average="macro")
        if metric.startswith("val_sensitivity_at_"):
            curves = [metrics.roc_curve(targets == place, probabilities[:, place]) for place in range(3)]
            least = 1 - float(metric[-2:]) / 100 + 1e-9
            return np.mean([rates[falls <= least].max() for falls, rates, _ in curves])
        return metrics.balanced_accuracy_score(targets, probabilities.argmax(axis=1))

    found = compare(predictions, "t2", "t0", metric, tried=4)
    wanted = figure(predictions.probabilities[2]) - figure(predictions.probabilities[0])
    assert figure(predictions.probabilities[2]) != figure(predictions.probabilities[0])
    assert found.difference == pytest.approx(wanted) and (found.images, found.groups) == (120, 120)
    assert found.low < wanted < found.high and 0 < found.p_value <= 1


def test_a_group_counts_once():
    logits, targets = search(np.random.default_rng(1), trials=5, images=80, better=0.4)
    once = compare(predicted(logits, targets), "t1", "t0", "val_loss", tried=5)
    twice = predicted(np.repeat(logits, 2, axis=1), np.repeat(targets, 2), np.repeat(np.arange(80), 2))
    again = compare(twice, "t1", "t0", "val_loss", tried=5)
    assert again == pytest.approx(once._replace(images=160))


def test_the_more_were_tried_the_surer_it_must_be():
    logits, targets = search(np.random.default_rng(2), trials=10, images=100, better=0.3)
    few = compare(predicted(logits[:2], targets), "t1", "t0", "val_loss", tried=2)
    many = compare(predicted(logits, targets), "t1", "t0", "val_loss", tried=10)
    most = compare(predicted(logits, targets), "t1", "t0", "val_loss", tried=1000)
    assert few.low > many.low > most.low and few.p_value < many.p_value < most.p_value


def test_a_trial_that_hardly_differs_from_the_default_does_not_widen_the_interval():
    targets = np.arange(60) % 2
    right = np.ones((3, 60))
    right[0, 40:] = 0  # the default
    right[2, 39:] = 0  # wrong on one more image
    logits = 4 * right[..., None] * np.eye(2)[targets] + 4 * (1 - right[..., None]) * np.eye(2)[1 - targets]
    alone = compare(predicted(logits[:2], targets), "t1", "t0", "val_balanced_accuracy", tried=2)
    beside = compare(predicted(logits, targets), "t1", "t0", "val_balanced_accuracy", tried=3)
    assert alone.better and beside.better and beside.high - beside.low < 1.3 * (alone.high - alone.low)


def test_of_very_many_groups_the_interval_is_nearly_the_same(monkeypatch):
    logits, targets = search(np.random.default_rng(4), trials=8, images=1500, better=0.1)
    resampled = compare(predicted(logits, targets), "t1", "t0", "val_loss", tried=8)
    monkeypatch.setattr("tuning.insight.paired.MANY", 1000)
    normal = compare(predicted(logits, targets), "t1", "t0", "val_loss", tried=8)
    assert normal.difference == resampled.difference
    assert normal.high - normal.low == pytest.approx(resampled.high - resampled.low, rel=0.05)


def test_what_cannot_be_compared():
    logits, targets = search(np.random.default_rng(3), trials=3, images=40)
    assert compare(predicted(logits, targets), "t9", "t0", "val_loss", tried=3) is None
    assert (
        compare(predicted(logits[:, :4], targets[:4], np.array([0, 0, 1, 1])), "t1", "t0", "val_loss", tried=3) is None
    )
    same = compare(predicted(logits[[0, 0]], targets), "t1", "t0", "val_loss", tried=2)
    assert same.difference == same.low == same.high == 0 and not same.better
    found = compare(predicted(logits[[0, 0, 1]], targets), "t1", "t0", "val_loss", tried=3)
    assert not found.better and found.difference == 0


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.parametrize("images", [40, 100, 225])
def test_the_luckiest_of_fifty_trials_seldom_beats_a_default_that_is_as_good(images, capsys):
    rng = np.random.default_rng(images)
    wrong = found = 0
    for _ in range(SEARCHES):
        predictions = predicted(*search(rng, trials=51, images=images))
        best, lead = best_of(predictions)
        wrong += best != "t0" and compare(predictions, best, "t0", "val_loss", tried=51).better
        assert lead >= 0
    for _ in range(SEARCHES // 4):
        predictions = predicted(*search(rng, trials=51, images=images, better=0.7))
        best, _ = best_of(predictions)
        found += best != "t0" and compare(predictions, best, "t0", "val_loss", tried=51).better
    with capsys.disabled():
        print(
            f"\n{images} images: no difference: {wrong / SEARCHES:.3f} winners; a large one: {4 * found / SEARCHES:.2f}"
        )
    assert wrong <= 0.05 * SEARCHES + (0 if SOAK else 2)
    assert found >= (0.9 if images == 225 else 0.5 if images == 100 else 0.1) * (SEARCHES // 4)


@pytest.mark.parametrize("metric", METRICS)
def test_what_images_add_to_a_metric_of_labels_makes_it_up(metric):
    rng = np.random.default_rng(0)
    truth = (rng.random((150, 3)) < [0.5, 0.3, 0.2]).astype(np.int64)
    logits = 1.5 * truth - 1 + rng.normal(size=(4, 150, 3))
    targets = np.where(rng.random(truth.shape) < 0.1, -1, truth)
    predictions = Predictions(tuple("abcd"), expit(logits), targets, np.arange(150), CLASSES)
    values, parts = shares(predictions, metric)
    for index in range(4):
        figures = measure(expit(logits[index]), targets, np.arange(150), CLASSES)
        expected = {
            "val_loss": -figures["loss"],
            "val_tempered_loss": -tempered_loss(logits[index], targets),
            "val_balanced_accuracy": figures["balanced_accuracy"],
            "val_auroc": figures["auroc"],
            "val_auprc": figures["auprc"],
            "val_f1": np.mean([each["f1"] for each in figures["classes"].values()]),
        } | {f"val_sensitivity_at_{each}": sensitivity(logits[index], targets, each / 100) for each in (90, 95)}
        assert values[index] == pytest.approx(expected[metric], abs=1e-4)
        assert parts[index].sum() == pytest.approx(values[index] * (2 if metric == "val_auroc" else 1))
    better = compare(predictions, "b", "a", metric, tried=3)
    assert better.difference == pytest.approx(values[1] - values[0]) and better.low < better.difference < better.high


def sensitivity(logits, targets, specificity):
    """Mean over labels of the sensitivity at the lowest logit that calls so few of the absent ones."""
    found = []
    for values, truth in zip(logits.T, targets.T, strict=True):
        least = min(each for each in values if (values[truth == 0] <= each).mean() >= specificity)
        found.append((values[truth == 1] > least).mean())
    return np.mean(found)


@pytest.mark.parametrize("metric", ["val_f1", "val_auprc"])
def test_what_an_image_adds_is_what_is_lost_without_it(metric):
    rng = np.random.default_rng(1)
    targets = rng.choice(3, 300, p=[0.2, 0.3, 0.5])
    predictions = predicted(1.5 * np.eye(3)[targets] + rng.normal(size=(1, 300, 3)), targets)
    (value,), (parts,) = shares(predictions, metric)
    kept = [np.arange(300) != left_out for left_out in range(300)]
    without = [
        shares(predicted(np.log(predictions.probabilities[:, rows]), targets[rows]), metric)[0][0] for rows in kept
    ]
    np.testing.assert_allclose(parts - value / 300, value - np.array(without), rtol=0.05, atol=5e-5)


@pytest.mark.parametrize("metric", METRICS[3:])
def test_the_variance_of_a_difference_is_that_of_new_images(metric):
    rng, differences, variances = np.random.default_rng(2), [], []
    for _ in range(400 if SOAK else 200):
        logits, targets = search(rng, trials=2, images=400, better=0.3)
        values, parts = shares(predicted(logits, targets), metric)
        differences.append(values[1] - values[0])
        change = parts[1] - parts[0]
        variances.append(400 * (change - change.mean()).var())
    assert np.sqrt(np.mean(variances)) == pytest.approx(np.std(differences), rel=0.2)
