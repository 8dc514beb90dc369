"""Guesses are seldom called better than guessing, and predictions that tell the classes apart are."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats
from scipy.special import expit, ndtri, softmax
from searches import make_run, run_here
from shared import SOAK

from tuning.insight.guessing import guess_error, separation
from tuning.insight.verdict import judged
from tuning.record.tables import read_table

SEARCHES = 4000 if SOAK else 400
TAIL = 0.05


def error(found, tail=TAIL):
    return (found.auroc - found.least) / -ndtri(tail)


def of_two(values):
    return np.stack([1 - values, values], axis=1)


def test_two_classes_of_single_images_give_the_test_of_mann_and_whitney():
    rng = np.random.default_rng(0)
    targets = (np.arange(70) < 25).astype(int)
    values = np.round(rng.uniform(size=70) + 0.1 * targets, 1)  # with ties
    found = separation(of_two(values), targets, np.arange(70), TAIL)
    one, two = values[targets == 1], values[targets == 0]
    tested = stats.mannwhitneyu(one, two, alternative="greater", use_continuity=False, method="asymptotic")
    assert found.auroc == pytest.approx(tested.statistic / len(one) / len(two))
    z = (found.auroc - 0.5) / error(found)
    assert stats.norm.sf(z) == pytest.approx(tested.pvalue)


def test_predictions_that_are_all_the_same_tell_nothing():
    targets = np.arange(20) % 2
    assert separation(np.full((20, 2), 0.5), targets, np.arange(20), TAIL) == (0.5, 0.5)


def test_copies_of_images_count_once():
    rng = np.random.default_rng(0)
    targets, values = np.arange(60) % 2, rng.uniform(size=60)
    one = separation(of_two(values), targets, np.arange(60), TAIL)
    three = separation(np.repeat(of_two(values), 3, axis=0), np.repeat(targets, 3), np.repeat(np.arange(60), 3), TAIL)
    assert three.auroc == pytest.approx(one.auroc) and three.least == pytest.approx(one.least, abs=0.01)
    alone = separation(np.repeat(of_two(values), 3, axis=0), np.repeat(targets, 3), np.arange(180), TAIL)
    assert alone.least > three.least + 0.03


def patients(rng, shares, count):
    """Classes and groups of patients of one to four images, and probabilities of a guess that knows the patient."""
    classes = len(shares)
    each = np.concatenate([np.arange(classes), np.arange(classes), rng.choice(classes, count, p=shares)])
    groups = np.repeat(np.arange(len(each)), rng.integers(1, 5, len(each)))
    scores = rng.normal(size=(len(each), classes))[groups] + rng.normal(size=(len(groups), classes))
    return each[groups], groups, softmax(scores, axis=1)


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.1, 0.9), (0.2, 0.4, 0.4)])
@pytest.mark.parametrize("count", [20, 80])
def test_guesses_by_patient_are_seldom_called_better(shares, count):
    rng = np.random.default_rng(0)
    called = 0
    for _ in range(SEARCHES):
        targets, groups, probabilities = patients(rng, shares, count)
        called += separation(probabilities, targets, groups, TAIL).least > 0.5
    assert 0.02 < called / SEARCHES < (0.065 if SOAK else 0.085)


def test_the_error_that_needs_no_predictions_is_never_smaller():
    rng = np.random.default_rng(0)
    for shares in ((0.5, 0.5), (0.2, 0.4, 0.4)):
        targets, groups, probabilities = patients(rng, shares, 60)
        for grouped in (True, False):
            names = [f"p{group}" if grouped else None for group in groups]
            samples = pd.DataFrame({"label": targets.astype(str), "group": names, "split": "val"})
            samples["path"] = [f"{row}.png" for row in range(len(samples))]
            found = separation(probabilities, targets, np.arange(len(targets)), TAIL)
            assert guess_error(samples) > 0.999 * error(found)
            if len(shares) == 2 and not grouped:
                assert guess_error(samples) == pytest.approx(error(found))
    assert guess_error(samples[samples["label"] == "0"]) == np.inf


@pytest.mark.slow
@pytest.mark.soak
def test_on_random_labels_nothing_beats_guessing(tmp_path):
    """Whole searches on noise, six trials each: of 100 at most 5 may claim more, however lucky their best trial was."""
    claimed = []
    for seed in range(100 if SOAK else 3):
        rng = np.random.default_rng(seed)
        data = tmp_path / f"data{seed}"
        for name in ("a", "b"):
            (data / name).mkdir(parents=True)
            for number in range(60):
                pixels = rng.integers(0, 256, (32, 32), dtype=np.uint8)
                Image.fromarray(pixels).save(data / name / f"{number:02d}.png")
        run = tmp_path / f"run{seed}"
        run_here(make_run(run, data, trials=6, epochs=3, seed=seed, finalists=0)())
        trials, samples = (read_table(run / f"{name}.parquet") for name in ("trials", "samples"))
        _, verdict = judged(run, trials, samples, "val_tempered_loss", val_drawn=True)
        claimed += [verdict.verdict] if verdict.verdict != "nothing beats guessing" else []
    assert len(claimed) <= (5 if SOAK else 1), claimed


def guessed_labels(rng, patients, unknown=0.1):
    """Labels that go together within patients, some unknown, and a guess that knows the patient but no label."""
    groups = np.repeat(np.arange(patients), rng.integers(1, 4, patients))
    sick = rng.random((patients, 3)) < [0.4, 0.3, 0.2]
    sick[:, 1] |= sick[:, 0] & (rng.random(patients) < 0.5)
    targets = np.where(rng.random((len(groups), 3)) < unknown, -1, sick[groups].astype(np.int64))
    seen = rng.normal(size=(patients, 3)) + rng.normal(size=(patients, 1))
    return expit(seen[groups] + 0.5 * rng.normal(size=targets.shape)), targets, groups


@pytest.mark.parametrize("unknown", [0.0, 0.1, 0.7])
def test_guesses_of_labels_are_seldom_called_better(unknown):
    rng = np.random.default_rng(0)
    given = [guessed_labels(rng, 90, unknown) for _ in range(SEARCHES)]
    called = np.mean([(found := separation(*each, TAIL)).least > 0.5 for each in given])
    assert found.auroc == pytest.approx(0.5, abs=0.25)
    assert called <= TAIL + 3 * np.sqrt(TAIL * (1 - TAIL) / SEARCHES)


def test_predictions_of_labels_that_tell_something_are_called_better():
    rng = np.random.default_rng(0)
    probabilities, targets, groups = guessed_labels(rng, 80)
    found = separation(0.5 * probabilities + 0.5 * (targets == 1), targets, groups, TAIL)
    assert found.least > 0.5
    one = separation(of_two(probabilities[:, 0]), (targets[:, 0] == 1).astype(int), np.arange(len(targets)), TAIL)
    known = np.where(targets[:, [0]] == 1, 1, 0)
    same = separation(probabilities[:, [0]], known, np.arange(len(targets)), TAIL)
    assert same.auroc == pytest.approx(one.auroc) and same.least == pytest.approx(one.least, abs=1e-3)
