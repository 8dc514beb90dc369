"""Remarks on validation probabilities are the same on the screen and in the report."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from runs import few_trials, make_run
from scipy.special import expit
from shared import SOAK

from tuning.insight.analysis import searched, top
from tuning.insight.remarks import _on_baseline, _on_ensemble, _on_subgroups, remarks, with_baseline
from tuning.record.predictions import Predictions, predictions_file, write_predictions
from tuning.record.tables import AUDIT, write_tables
from tuning.settings.config import SearchPlan
from tuning.show import report
from tuning.show.sections import read


def make_judged(folder, sure):
    """A run whose trials give each image's own class, but for noise, a probability of `sure`."""
    run = read(make_run(folder, finalists=False, images=60))
    validation = run.samples[run.samples["split"] == "val"]
    classes = sorted(validation["label"].unique())
    own = validation["label"].to_numpy()[:, None] == np.array(classes)
    rng = np.random.default_rng(0)
    for row in searched(run.trials)[run.trials["val_loss"].notna()].itertuples():
        each = np.where(own, sure, 1 - sure) * np.exp(rng.normal(0, 0.1, own.shape))
        probabilities = each / each.sum(axis=1, keepdims=True)
        named = {"epoch": int(row.best_epoch), "val_loss": row.val_loss}
        write_predictions(predictions_file(folder, row.trial_id), validation, classes, probabilities, **named)
    chosen = top(run.trials, "val_loss")["trial_id"]
    return chosen, remarks(folder, searched(run.trials), run.samples, run.plan, chosen)


def test_a_shortcut_is_told_beside_the_verdict(tmp_path):
    folder = tmp_path / "run"
    make_judged(folder, 0.9)

    def write(rows):
        found = [dict(zip(AUDIT.names, row, strict=True)) for row in rows]
        write_tables({"audit": pa.Table.from_pylist(found, schema=AUDIT)}, folder)

    rows = [
        ["shortcut_shape", "info", None, None, 0.99, 0.005, "hidden by fit=crop"],
        ["shortcut_metadata", "warn", None, None, 0.99, 0.005, "file format PNG predicts covid"],
        ["shortcut_metadata", "warn", None, None, 0.9, 0.005, "file size predicts covid"],
        ["shortcut_colour", "warn", None, None, 0.9, 0.005, "brightness over 120 predicts covid"],
        ["imbalance", "warn", None, None, 20.0, None, "20 to 1"],
    ]
    write(rows)
    page = report.report(read(folder))
    words = (
        "A class can be predicted from brightness or contrast, metadata alone: the trials may have learnt this shortcut"
    )
    assert f'<p class="warning">{words} (' in page
    write(rows[:1] + rows[4:])
    assert "this shortcut" not in report.report(read(folder)).partition("<section")[2].partition("</section>")[0]


@pytest.mark.slow
@pytest.mark.parametrize(("sure", "better"), [(0.5, False), (0.97, True)])
def test_a_trial_that_only_guesses_is_reported_on_the_page_too(tmp_path, sure, better):
    chosen, (baseline, calibration) = make_judged(tmp_path / "run", sure)
    assert baseline.alarming is not better
    verb = "tells the classes apart" if better else "does not tell the classes apart significantly"
    assert baseline.words.startswith(f"{chosen}, the best trial of the search, {verb} better than guessing: AUROC ")
    assert calibration.words.startswith(f"Calibration of {chosen} on the validation set: mean confidence ")
    assert f"confidence {'9' if better else '5'}" in calibration.words and "calibration error" in calibration.words
    page = report.report(read(tmp_path / "run"))
    verdict = page.partition('<section id="verdict">')[2].partition("</section>")[0]
    assert f'<p class="{"note" if better else "warning"}">{baseline.words}</p>' in verdict
    assert f'<p class="note">{calibration.words}</p>' in verdict


@pytest.mark.parametrize("gap", [False, True])
def test_a_subgroup_that_is_worse_is_said_and_a_column_of_too_many_values_is_left_out(tmp_path, gap):
    samples = pd.DataFrame({"path": [f"{n}.png" for n in range(400)], "label": ["a", "b"] * 200, "split": "val"})
    samples = samples.assign(
        group=None, subgroup_sex=["F", "F", "M", "M"] * 100, subgroup_id=[f"i{n}" for n in range(400)]
    )
    targets, rng = np.arange(400) % 2, np.random.default_rng(0)
    sure = np.where((samples["subgroup_sex"] == "F") & gap, 0.2, 1.5)
    logits = sure * (2 * targets - 1) + rng.normal(size=400)
    probabilities = np.stack([expit(-logits), expit(logits)], axis=1)
    predictions = Predictions(("t00000",), probabilities[None], targets, np.arange(400), ("a", "b"))
    *found, left_out = _on_subgroups(predictions, "t00000", samples)
    assert left_out.words.startswith("subgroups: 'id' is left out") and not left_out.alarming
    assert {remark.alarming for remark in found} == {gap}
    start = "sex F (200 images): " if gap else "no subgroup is significantly worse than the rest (2 comparisons)"
    assert all(remark.words.startswith(f"Subgroups of the validation set, t00000: {start}") for remark in found)


def test_a_run_without_predictions_has_no_remarks(tmp_path):
    run = read(make_run(tmp_path / "run", trials=3))
    assert remarks(run.folder, searched(run.trials), run.samples, run.plan, "t00000") == []


SEARCHES = 300 if SOAK else 20


def picked(rng, *, shares, images, noise, patients=None, one_class=False, trials=60, epochs=8):
    """The luckiest epoch of trials that know the class frequencies, and nothing about the images.

    Images of a patient have the same scores, and with `one_class` half of the score in common and the same class.
    """
    targets = rng.permutation(np.repeat(np.arange(len(shares)), np.round(np.array(shares) * images).astype(int)))
    groups = np.arange(images) if patients is None else rng.integers(patients, size=images) + one_class * 999 * targets
    _, groups = np.unique(groups, return_inverse=True)
    scores = rng.normal(size=(trials, epochs, groups.max() + 1, len(shares)))[:, :, groups]
    if one_class:
        scores = (scores + rng.normal(size=scores.shape)) / np.sqrt(2)
    logits = np.log(shares) + noise * scores
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    losses = -logs[:, :, np.arange(images), targets].mean(axis=-1)
    best = np.exp(logs[np.unravel_index(losses.argmin(), losses.shape)])
    return Predictions(("t",), best[None], targets, groups, tuple("abc"[: len(shares)]))


@pytest.mark.soak
@pytest.mark.parametrize("noise", [0.02, 0.3, 2.0])
@pytest.mark.parametrize(
    ("shares", "images", "patients", "one_class"),
    [
        ((0.5, 0.5), 40, None, False),
        ((0.5, 0.5), 100, 50, False),
        ((0.5, 0.5), 100, 20, True),
        ((0.1, 0.9), 60, None, False),
        ((0.1, 0.45, 0.45), 100, None, False),
    ],
)
def test_luck_is_not_called_better_than_guessing(shares, images, patients, one_class, noise):
    rng = np.random.default_rng(0)
    trials = pd.DataFrame({"epochs": [8] * 60})
    found = []
    for _ in range(SEARCHES):
        chosen = picked(rng, shares=shares, images=images, noise=noise, patients=patients, one_class=one_class)
        found.append(with_baseline(trials, chosen))
    assert sum(comparison.better for comparison in found) <= (0.08 if SOAK else 0.1) * SEARCHES
    if noise < 1:  # it seems to be better in most searches
        assert sum(comparison.val_loss < comparison.baseline for comparison in found) > SEARCHES / 2
        assert np.mean([comparison.auroc for comparison in found]) > 0.55
    assert {comparison.epochs for comparison in found} == {480}


@pytest.mark.parametrize("counts", [(20, 20), (6, 94), (50, 50, 1)])
def test_a_trial_that_knows_the_images_is_better_than_the_baseline(counts):
    rng = np.random.default_rng(0)
    targets = np.repeat(np.arange(len(counts)), counts)
    probabilities = np.full((len(targets), len(counts)), 0.05) + rng.uniform(0, 0.05, (len(targets), len(counts)))
    probabilities[np.arange(len(targets)), targets] = 0.9
    known = Predictions(("t",), probabilities[None], targets, np.arange(len(targets)), tuple("abc"[: len(counts)]))
    found = with_baseline(pd.DataFrame({"epochs": [8] * 60}), known)
    assert found.better and 0.5 < found.least_auroc < found.auroc == 1.0
    shares = np.array(counts) / sum(counts)
    assert found.baseline == pytest.approx(-(shares * np.log(shares)).sum())


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_a_trial_that_is_overconfident_still_tells_the_classes_apart(scale):
    rng = np.random.default_rng(0)
    targets = np.arange(120) % 2
    logit = scale * (1.5 * (targets - 0.5) + rng.normal(size=120))
    probabilities = np.stack([1 / (1 + np.exp(logit)), 1 / (1 + np.exp(-logit))], axis=1)
    found = with_baseline(
        pd.DataFrame({"epochs": [8] * 60}),
        Predictions(("t7",), probabilities[None], targets, np.arange(120), ("a", "b")),
    )
    assert found.better and (found.val_loss > found.baseline) == (scale > 1)
    first, *others = _on_baseline(found)
    assert "t7, the best trial of the search, tells the classes apart better than guessing" in first.words
    assert not first.alarming and len(others) == (scale > 1)
    if others:
        assert found.tempered_loss < found.baseline and found.temperature > 2
        assert others[0].alarming and others[0].words.startswith("The probabilities of t7 are overconfident")


def test_a_validation_set_that_is_too_small_for_the_baseline():
    nobody = Predictions((), np.empty((0, 2, 2)), np.array([0, 1]), np.arange(2), ("a", "b"))
    assert with_baseline(few_trials(), nobody) is None
    two_images = Predictions(("t0",), np.full((1, 2, 2), 0.5), np.array([0, 1]), np.arange(2), ("a", "b"))
    assert with_baseline(few_trials(), two_images) is None


def test_an_ensemble_of_one_trial_is_no_ensemble():
    targets = np.arange(40) % 2
    right = np.eye(2)[targets]
    probabilities = np.stack([right * 0.98 + 0.01, right * 0.2 + 0.4])
    predictions = Predictions(("t00000", "t00001"), probabilities, targets, np.arange(40), ("a", "b"))
    (remark,) = _on_ensemble(predictions, "t00000", SearchPlan(name="x"))
    assert "gains nothing: its selection keeps the best single trial alone" in remark.words


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "train_final.py builds it, unless --set ensemble=false."),
        ({"ensemble": True, "metric": "val_auroc"}, "train_final.py builds it, unless --set ensemble=false."),
        ({"ensemble": False}, "train_final.py does not build it: ensemble=false."),
        ({"final_data": "train+val"}, "train_final.py does not build it: final_data=train+val trains one network."),
        ({"metric": "val_auroc"}, "and metric=val_auroc; --set ensemble=true builds it."),
    ],
)
def test_an_ensemble_is_promised_only_where_it_is_built(settings, said):
    rng = np.random.default_rng(0)
    targets = np.arange(300) % 2
    logits = 2.5 * (targets - 0.5) + 2 * rng.normal(size=(5, 300))
    right = 1 / (1 + np.exp(-logits))
    trials = tuple(f"t{number:05d}" for number in range(5))
    predictions = Predictions(trials, np.stack([1 - right, right], axis=2), targets, np.arange(300), ("a", "b"))
    (remark,) = _on_ensemble(predictions, trials[0], SearchPlan(name="x", **settings))
    assert remark.words.endswith(said)


@pytest.mark.parametrize("rare", [1, 2])
def test_a_class_of_a_single_group_is_named_where_the_auroc_is_without_it(rare):
    """Such a class can't be judged, however many images it has, and the trial may not find it at all."""
    targets = np.repeat(np.arange(2 + rare), 20)
    groups = np.where(targets < 2, np.arange(len(targets)), 1000 + targets)
    probabilities = np.full((len(targets), 2 + rare), 0.05) + np.random.default_rng(0).uniform(
        0, 0.01, (len(targets), 1)
    )
    probabilities[np.arange(len(targets)), np.where(targets < 2, targets, 0)] = 0.9
    classes = tuple("abcd"[: 2 + rare])
    known = Predictions(("t7",), probabilities[None], targets, groups, classes)
    found = with_baseline(pd.DataFrame({"epochs": [8]}), known)
    assert found.auroc == 1.0 and found.unjudged == classes[2:]
    without = "class c" if rare == 1 else "classes c, d"
    assert (
        f"AUROC 1.0000 without {without}, whose validation images are of a single group, at"
        in _on_baseline(found)[0].words
    )
