import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from tuning.insight.ensemble import MOST_MEMBERS, halves, members, offer, selected
from tuning.record.predictions import Predictions
from tuning.record.temperature import logarithms, tempered_loss


def simulated(noises, images=300, groups=None, seed=0):
    """Trials that see the same truth through noise of their own."""
    rng = np.random.default_rng(seed)
    targets = np.arange(images) % 3
    logits = 2.0 * np.eye(3)[targets] + np.array(noises)[:, None, None] * rng.normal(size=(len(noises), images, 3))
    names = tuple(f"t{number}" for number in range(len(noises)))
    groups = np.arange(images) if groups is None else groups
    return Predictions(names, softmax(logits, axis=2), targets, groups, ("a", "b", "c"))


def test_trials_that_err_apart_are_better_together():
    found = offer(simulated([2.5] * 7), "t0")
    assert found.better and found.val_tempered_loss < found.alone - 0.02
    assert found.gain == pytest.approx(found.alone - found.val_tempered_loss)
    assert len(found.members) == MOST_MEMBERS == len(set(found.members))


def test_trials_that_are_alike_offer_nothing():
    one = simulated([1.0])
    alike = Predictions(("x", "y"), np.repeat(one.probabilities, 2, axis=0), one.targets, one.groups, one.classes)
    found = offer(alike, "x")
    assert found.gain == 0 and not found.better and found.members == ("x",)
    assert members(alike, least=2) == ("x", "y") and members(one, least=2) == one.trial_ids


def test_an_ensemble_of_at_least_two_is_judged_as_one():
    """Also where the best trial alone is better, and a half that selects freely would take it alone."""
    predictions = simulated([0.2, 6.0])
    assert offer(predictions, "t0").members == ("t0",) and offer(predictions, "t0").gain == 0
    found = offer(predictions, "t0", least=2)
    mean = logarithms(predictions.probabilities.mean(axis=0))
    assert found.members == ("t0", "t1") and found.gain < 0 and not found.better
    assert found.val_tempered_loss == pytest.approx(tempered_loss(mean, predictions.targets), abs=0.02)


@pytest.mark.slow
def test_what_was_luck_on_one_half_is_not_offered():
    """Fifty trials that only guess: the best of them on one half of validation are as bad as any on the other."""
    gains = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        logits = rng.normal(0, 1.0, (50, 60, 3))
        targets = np.arange(60) % 3
        guesses = Predictions(tuple(map(str, range(50))), softmax(logits, axis=2), targets, np.arange(60), tuple("abc"))
        chosen = guesses.of(members(guesses)).probabilities.mean(axis=0)
        on_all = tempered_loss(logarithms(chosen), targets)
        gains.append((offer(guesses, "0").val_tempered_loss - np.log(3), on_all - np.log(3)))
    honest, fooled = np.mean(gains, axis=0)
    assert honest > 0.02 and fooled < -0.02  # judged on what it was chosen on, guessing seems to be better than it is


@pytest.mark.slow
@given(st.integers(1, 7), st.integers(0, 2**31 - 1))
def test_on_what_it_is_chosen_on_an_ensemble_is_never_worse_than_its_best_trial(count, seed):
    rng = np.random.default_rng(seed)
    probabilities, targets = rng.dirichlet(np.ones(3), (count, 20)), np.arange(20) % 3
    ranked, size = selected(probabilities, targets)
    losses = [tempered_loss(logarithms(each), targets) for each in probabilities]
    assert 1 <= size <= min(count, MOST_MEMBERS) and sorted(ranked) == list(range(count))
    assert [losses[index] for index in ranked] == sorted(losses)
    assert tempered_loss(logarithms(probabilities[ranked[:size]].mean(axis=0)), targets) <= min(losses) + 1e-8


def test_a_trial_that_knows_nothing_is_left_out():
    # Two trials that each know one half of the images; a third that knows nothing.
    right = np.array([[0.9] * 10 + [0.4] * 10, [0.4] * 10 + [0.9] * 10, [0.5] * 20])
    targets = np.arange(20) % 2
    probabilities = np.where(np.eye(2)[targets] > 0, right[..., None], 1 - right[..., None])
    ranked, size = selected(probabilities, targets)
    assert size == 2 and set(ranked[:2]) == {0, 1}


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2)), min_size=1, max_size=60))
def test_halves_keep_groups_together_and_classes_even(rows):
    groups, targets = np.array(rows).T
    first = halves(targets, groups)
    assert all(len(set(first[groups == group])) == 1 for group in set(groups))
    assert np.array_equal(first, halves(targets, groups))
    alone = halves(targets, np.arange(len(targets)))
    for label in set(targets):
        assert abs(alone[targets == label].sum() - (~alone)[targets == label].sum()) <= 1


def test_too_little_to_choose_from_or_to_judge_on():
    assert offer(simulated([1.0]), "t0") is None
    assert offer(simulated([1.0, 1.0]), "t2") is None  # its weights were not kept: another trial would stand for it
    assert offer(simulated([1.0, 1.0], groups=np.zeros(300, np.int64)), "t0") is None


@pytest.mark.parametrize("unknown", [0.0, 0.15, 0.5])
def test_halves_of_many_labels_are_halves_with_each_label_in_both(unknown):
    rng = np.random.default_rng(0)
    targets = (rng.random((300, 14)) < rng.uniform(0.05, 0.4, 14)).astype(np.int64)
    targets[rng.random(targets.shape) < unknown] = -1
    groups = np.sort(rng.integers(0, 150, 300))
    first = halves(targets, groups)
    assert 0.42 < first.mean() < 0.58
    assert not set(groups[first]) & set(groups[~first])
    for column in targets.T:
        there = column == 1
        assert 0.3 < first[there].mean() < 0.7
