import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from shared import SOAK

from tuning.insight.verdict import Runs, holm, judge
from tuning.record.predictions import Predictions
from tuning.record.tables import FINALISTS, TRIALS
from tuning.search.finalists import candidates, most_epochs, runs_left, runs_to_make, saved_epochs
from tuning.settings.config import PARAMETERS, SearchPlan, TrialConfig

RATIO = 0.25  # validation over training images


def trial(
    trial_id, number, value, *, rate, origin="suggested", finalist_of=None, seed=0, seconds=10.0, metric="val_loss"
):
    config = TrialConfig(backbone="a", learning_rate=rate).model_dump()
    row = dict.fromkeys(TRIALS.names) | {f"config_{name}": config[name] for name in PARAMETERS}
    row |= {"trial_id": trial_id, "number": number, "origin": origin, "status": "completed", "seed": seed}
    return row | {"finalist_of": finalist_of, "seconds": seconds, "val_loss": value, metric: value}


def table(searched, runs, *, seconds=None, metric="val_loss"):
    """Trials with these values, the first being the default, and runs: id -> values by seed."""
    rows = [
        trial(f"t{number:05d}", number, value, rate=0.1 / (number + 1), metric=metric)
        for number, value in enumerate(searched)
    ]
    for trial_id, values in runs.items():
        for seed, value in enumerate(values):
            named = {"origin": "finalist", "finalist_of": trial_id, "seed": 1 + seed, "metric": metric}
            cost = (seconds or {}).get(trial_id, 10.0)
            rows.append(trial(f"f{len(rows):05d}", None, value, rate=0.1, seconds=cost, **named))
    return pd.DataFrame(rows, columns=TRIALS.names)


@pytest.mark.parametrize(
    ("cap", "expected"),
    [(120, (2, 5)), (119, (1, 5)), (80, (1, 5)), (79, (1, 4)), (63, (1, 3)), (48, (1, 3)), (47, (0, 0)), (0, (0, 0))],
)
def test_first_the_finalists_shrink_and_then_the_seeds(cap, expected):
    count, runs = expected
    found = runs_to_make(list("dabc"), 2, [1, 2, 3, 4, 5], asked=set(), epochs=8, cap=cap)
    assert found == [(name, seed) for seed in range(1, runs + 1) for name in "dab"[: count + 1]]


def test_earlier_runs_count_in_the_cap_of_a_search_that_goes_on():
    made = {(name, seed) for name in "dab" for seed in (1, 2, 3, 4, 5)}
    of = {"finalists": 2, "seeds": [1, 2, 3, 4, 5], "asked": made, "epochs": 8}
    assert runs_to_make(list("dab"), **of, cap=120) == []  # the same are the best
    assert runs_to_make(list("dcab"), **of, cap=120) == []  # another is, but all 120 epochs are spent
    assert runs_to_make(list("dcab"), **of, cap=143) == []
    assert runs_to_make(list("dcab"), **of, cap=144) == [("c", 1), ("c", 2), ("c", 3)]
    assert runs_to_make(list("dcab"), **of, cap=160) == [("c", seed) for seed in (1, 2, 3, 4, 5)]
    assert runs_to_make(list("dceab"), **of, cap=200)[:4] == [("c", 1), ("e", 1), ("c", 2), ("e", 2)]


def test_what_a_verdict_still_needs():
    plan = SearchPlan(name="x", epochs=8, finalist_seeds=3, metric="val_loss")
    trials = table([0.9, 0.5, 0.4, 0.6], {})
    asked = {("t00000", 1), ("t00000", 2), ("t00001", 1)}
    left = [("t00002", 1), ("t00002", 2), ("t00001", 2), ("t00000", 3), ("t00002", 3), ("t00001", 3)]
    assert runs_left(trials, plan, asked) == left == runs_left(trials, plan, asked, cap=9 * 8)
    paid = [run for run in left if run[0] != "t00001"]  # the run that it had stays paid
    assert runs_left(trials, plan, asked, cap=8 * 8) == paid
    for without in ({"finalists": 0}, {"early_stopping": False}):
        assert runs_left(trials, plan.model_copy(update=without), asked) == []


def test_the_runs_may_take_a_fifth_of_what_early_stopping_saved():
    trials = table([0.9, 0.5, 0.4, 0.6], {"t00000": [0.8]}).assign(epochs=[8, 3, 2, 1, 8])
    trials["status"] = ["completed", "stopped", "converged", "failed", "stopped"]  # the last is no searched trial
    assert saved_epochs(trials, 8) == 5 + 6
    plan = SearchPlan(name="x", epochs=8, metric="val_loss")
    assert most_epochs(plan, 104) == 20 and most_epochs(plan.model_copy(update={"finalist_epochs": 9}), 104) == 9


def test_runs_of_the_classifier_alone_cost_an_epoch_unless_the_user_counts_epochs():
    plan = SearchPlan(name="x", epochs=8, finalist_seeds=3, metric="val_loss")
    trials = table([0.9, 0.5], {}).assign(config_unfreeze_depth=[0, 5], config_augmentation="none")
    assert len(runs_left(trials, plan, set(), cap=3 * (8 + 1))) == 6
    assert runs_left(trials, plan, set(), cap=3 * (8 + 1) - 1) == []
    by_user = plan.model_copy(update={"finalist_epochs": 47})
    assert runs_left(trials, by_user, set(), cap=47) == [] and len(runs_left(trials, by_user, set(), cap=48)) == 6
    moved = trials.assign(config_augmentation="light")  # new outputs in each epoch
    assert runs_left(moved, plan, set(), cap=47) == []


def test_a_best_that_was_not_compared_is_named():
    runs = {"t00000": [0.9, 0.91, 0.92], "t00001": [0.5, 0.52, 0.51]}
    _, verdict = judge(table([0.9, 0.5, 0.6], runs), "val_loss", val_over_train=RATIO)
    assert verdict.verdict == "winner" and "not compared" not in verdict.sentence
    _, verdict = judge(table([0.9, 0.5, 0.4], runs), "val_loss", val_over_train=RATIO)
    assert verdict.sentence.endswith("; t00002, the best other trial of the search, was not compared")


NAMES = st.permutations("abcde").map(lambda names: ["d0", *names])
CHEAP = st.sets(st.sampled_from(["d0", *"abcde"]))
EARLIER = st.sets(st.tuples(st.sampled_from(["d0", *"abcde"]), st.integers(1, 9)), max_size=20)


@given(
    NAMES,
    st.integers(0, 6),
    st.integers(3, 9),
    EARLIER,
    st.integers(1, 50),
    st.integers(0, 2000),
    CHEAP,
)
def test_what_is_to_be_run_fits_and_stays_the_same_while_it_is_run(names, finalists, runs, earlier, epochs, cap, cheap):
    of = {"finalists": finalists, "seeds": list(range(1, runs + 1)), "epochs": epochs, "cap": cap, "cheap": cheap}
    found = runs_to_make(names, **of, asked=earlier)
    assert not found or sum(1 if name in cheap else epochs for name, _ in earlier | set(found)) <= cap
    assert not earlier & set(found) and len({name for name, _ in found} - {"d0"}) <= finalists
    for place in range(len(found)):
        assert runs_to_make(names, **of, asked=earlier | set(found[:place])) == found[place:]


def test_candidates_are_the_default_and_then_the_best_each_once():
    trials = table([0.5, 0.9, None, 0.3, 0.4], {})
    assert candidates(trials, "val_loss") == ["t00000", "t00003", "t00004", "t00001"]
    again = trials[trials["trial_id"] == "t00003"].assign(trial_id="t00005", number=5, val_loss=0.35)
    assert candidates(pd.concat([trials, again]), "val_loss") == ["t00000", "t00003", "t00004", "t00001"]
    assert candidates(trials[trials["number"] > 0], "val_loss") == []


def test_candidates_of_a_metric_that_grows():
    assert candidates(table([0.5, 0.9, 0.7], {}, metric="val_auroc"), "val_auroc") == ["t00000", "t00001", "t00002"]


def test_the_standard_error_is_corrected_for_shared_images():
    ids = pd.Series(["f1", "f2", "f3"])
    runs = Runs({}, {"a": ids, "b": ids}, "val_loss", RATIO)
    error, freedom = runs.error(pd.Series([1.0, 2.0, 3.0]), "a", "b")
    assert error == pytest.approx(math.sqrt(1.0 * (1 / 3 + RATIO))) and freedom == 2


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_never_lowers_nor_changes_the_order(p_values):
    adjusted = holm(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, adjusted, strict=True))
    assert [q for _, q in sorted(zip(p_values, adjusted, strict=True))] == sorted(adjusted)


def test_a_winner_has_its_interval_and_its_luck():
    runs = {"t00000": [0.50, 0.51, 0.52, 0.50, 0.53], "t00001": [0.40, 0.42, 0.41, 0.41, 0.42]}
    judged, verdict = judge(table([0.5, 0.3], runs), "val_loss", val_over_train=RATIO)
    assert (verdict.verdict, verdict.trial_id) == ("winner", "t00001")
    default, winner = judged.to_dict("records")
    assert default["role"] == "default" and not default["chosen"] and pd.isna(default["difference"])
    assert winner["difference"] == pytest.approx(0.1) and 0 < winner["low"] < 0.1 < winner["high"]
    assert winner["mean"] == pytest.approx(0.412) and winner["luck"] == pytest.approx(0.112)
    assert list(judged.columns) == FINALISTS.names
    assert "0.1000 better in val_loss (90% confidence" in verdict.sentence and "5 paired runs" in verdict.sentence


def test_of_tied_finalists_the_cheapest_is_chosen():
    runs = {
        "t00000": [0.50, 0.51, 0.52, 0.50, 0.53],
        "t00001": [0.40, 0.42, 0.41, 0.41, 0.42],
        "t00002": [0.41, 0.41, 0.42, 0.40, 0.42],
    }
    for cheap in ("t00001", "t00002"):
        trials = table([0.5, 0.3, 0.3], runs, seconds={cheap: 2.0})
        _, verdict = judge(trials, "val_loss", val_over_train=RATIO)
        assert (verdict.verdict, verdict.trial_id) == ("tie", cheap)


def test_a_metric_that_grows():
    runs = {"t00000": [0.80, 0.81, 0.82], "t00001": [0.90, 0.912, 0.92]}
    judged, verdict = judge(table([0.8, 0.95], runs, metric="val_auroc"), "val_auroc", val_over_train=0.0)
    assert (verdict.verdict, verdict.trial_id) == ("winner", "t00001")
    assert judged["difference"].iloc[1] == pytest.approx(0.1007, abs=1e-4)
    assert judged["luck"].iloc[1] == pytest.approx(0.95 - judged["mean"].iloc[1])


def test_noise_beats_nothing():
    runs = {"t00000": [0.50, 0.40, 0.55, 0.45, 0.5], "t00001": [0.40, 0.50, 0.45, 0.50, 0.45]}
    judged, verdict = judge(table([0.5, 0.3], runs), "val_loss", val_over_train=RATIO)
    assert (verdict.verdict, verdict.trial_id) == ("nothing beats the default", "t00000")
    assert list(judged["chosen"]) == [True, False]


def test_a_finalist_that_once_had_no_finite_loss_cannot_win():
    runs = {"t00000": [0.50, 0.51, 0.52, 0.5], "t00001": [0.1, 0.1, None, 0.12]}
    judged, verdict = judge(table([0.5, 0.3], runs), "val_loss", val_over_train=RATIO)
    assert verdict.verdict == "nothing beats the default" and "without a finite loss" in verdict.sentence
    assert judged["difference"].isna().all() and judged["p_value"].iloc[1] == 1.0


def test_the_same_difference_each_time_is_judged_by_the_sign_test():
    runs = {"t00000": [0.5, 0.5, 0.5], "t00001": [0.4, 0.4, 0.4]}
    judged, verdict = judge(table([0.5, 0.3], runs), "val_loss", val_over_train=RATIO)
    assert verdict.verdict == "nothing beats the default" and judged["p_value"].iloc[1] == 0.125


def test_runs_cut_short_do_not_count():
    runs = {"t00000": [0.50, 0.51, 0.52, 0.5], "t00001": [0.41, 0.40, 0.42, 0.9]}
    trials = table([0.5, 0.3], runs)
    trials.loc[(trials["finalist_of"] == "t00001") & (trials["seed"] == 4), "status"] = "failed"
    judged, verdict = judge(trials, "val_loss", val_over_train=RATIO)
    assert verdict.verdict == "winner"
    assert list(judged["runs"]) == [4, 3] and judged["mean"].iloc[1] == pytest.approx(0.41)


def test_an_interval_after_the_first_that_is_not_better_holds_0_too():
    shifts = {"t00000": [0.0] * 5, "t00001": [-1.0, -0.1, -0.9, -0.2, -0.6], "t00002": [-1.1, 0.0, -0.9, -0.2, -0.6]}
    judged, verdict = judge(table([0.5, 0.3, 0.4], shifts), "val_loss", val_over_train=0.1)
    assert verdict.verdict == "nothing beats the default"
    assert (judged["low"].iloc[1:] < 0).all() and (judged["p_value"].iloc[1:] > 0.05).all()


@pytest.mark.parametrize("runs", [{}, {"t00000": [0.5, 0.5], "t00001": [0.3, 0.3]}, {"t00001": [0.3, 0.3, 0.3]}])
def test_too_few_runs_leave_the_searchs_best(runs):
    judged, verdict = judge(table([0.5, 0.3], runs), "val_loss", val_over_train=RATIO)
    assert judged.empty and (verdict.verdict, verdict.trial_id) == ("not enough runs", "t00001")
    assert verdict.sentence.startswith("t00001 is the best trial of the search; it was not compared with the default")


def test_a_default_that_is_the_best_is_beaten_by_nothing():
    _, verdict = judge(table([0.3, 0.5], {}), "val_loss", val_over_train=RATIO)
    assert (verdict.verdict, verdict.trial_id) == ("nothing beats the default", "t00000")
    _, verdict = judge(table([0.3], {}), "val_loss", val_over_train=RATIO)
    assert verdict.verdict == "not enough runs"


def test_no_finite_loss_leaves_nothing():
    _, verdict = judge(table([None, None], {}), "val_loss", val_over_train=RATIO)
    assert (verdict.verdict, verdict.trial_id) == ("not enough runs", None)


def searched(shifts, *, images=100, seed=0):
    """A search of the default and others whose logits are shifted towards the truth, and its predictions."""
    rng = np.random.default_rng(seed)
    targets = np.arange(images) % 2
    sides = 2 * targets - 1
    evidence = rng.normal(size=images) + 0.5 * rng.normal(size=(len(shifts), images)) + np.outer(shifts, sides)
    names = tuple(f"t{number:05d}" for number in range(len(shifts)))
    probabilities = softmax(np.stack([np.zeros_like(evidence), evidence], axis=2), axis=2)
    predictions = Predictions(names, probabilities, targets, np.arange(images), ("a", "b"))
    losses = predictions.losses.mean(axis=1)
    order = np.argsort(losses)  # as they are read: the lowest loss first
    trials = table(list(losses), {}).assign(epochs=3)
    return trials, replace(predictions, trial_ids=tuple(names[i] for i in order), probabilities=probabilities[order])


@pytest.mark.parametrize(
    ("shifts", "verdict", "chosen", "said"),
    [
        ([0.5, 2.0, 1.0], "winner", "t00001", "beats the default t00000 on the same 100 validation images: it is 0."),
        ([1.0, 1.0, 0.0], "no significant difference", "t00001", "but not significantly better than the default t0000"),
        ([1.5, 0.5, 0.5], "nothing beats the default", "t00000", "the default t00000 is the best trial of the search"),
        ([0.0, 0.0, 0.0], "nothing beats guessing", "t00000", "tell the classes apart significantly better than guess"),
    ],
)
def test_without_runs_the_validation_images_decide(shifts, verdict, chosen, said):
    trials, predictions = searched(shifts)
    judged, found = judge(trials, "val_loss", val_over_train=RATIO, predictions=predictions)
    assert found.verdict == verdict and said in found.sentence
    if verdict != "nothing beats guessing":
        assert found.trial_id == chosen
    if found.verdict in ("winner", "no significant difference"):
        default, best = judged.to_dict("records")
        assert default["role"] == "default" and (best["trial_id"], best["chosen"]) == (chosen, True)
        assert best["runs"] == 0 and pd.isna(best["mean"]) and best["low"] < best["difference"] < best["high"]
        assert "corrected for the choice among 3 trials" in found.sentence
        pa.Table.from_pandas(judged, schema=FINALISTS)
    else:
        assert judged.empty


def test_a_best_trial_without_predictions_is_not_compared():
    trials, predictions = searched([0.5, 2.0, 1.0])
    without = predictions.of({"t00000", "t00002"})
    judged, found = judge(trials, "val_loss", val_over_train=RATIO, predictions=without)
    assert judged.empty and found.verdict == "not enough runs" and "predictions are missing" in found.sentence


def test_runs_have_the_last_word():
    trials, predictions = searched([0.5, 2.0, 1.0])
    runs = table([0.5, 0.3], {"t00000": [0.5, 0.4, 0.5], "t00001": [0.4, 0.5, 0.4]})
    trials = pd.concat([trials, runs[runs["origin"] == "finalist"]])
    _, found = judge(trials, "val_loss", val_over_train=RATIO, predictions=predictions)
    assert found.verdict == "nothing beats the default" and "paired runs" in found.sentence


def seeds_alone(shift, rng, *, images=60, runs=5):
    """Runs on the same validation images that hardly differ by seed, of the default and a finalist."""
    targets = np.arange(images) % 2
    sides = 2 * targets - 1
    evidence = 0.8 * sides + rng.normal(size=images) + 0.7 * rng.normal(size=(2, images))
    evidence[1] += shift * sides
    each = evidence[:, None] + 0.01 * rng.normal(size=(2, runs, images))
    flat = each.reshape(-1, images)
    names = tuple(f"f{2 + place:05d}" for place in range(2 * runs))
    probabilities = softmax(np.stack([np.zeros_like(flat), flat], axis=2), axis=2)
    predictions = Predictions(names, probabilities, targets, np.arange(images), ("a", "b"))
    losses = predictions.losses.mean(axis=1).reshape(2, runs)
    return table([0.5, 0.3], {"t00000": list(losses[0]), "t00001": list(losses[1])}), predictions


@pytest.mark.slow
def test_on_a_given_split_the_validation_images_vary_too():
    """Seeds agree that the finalist is better, by images that happen to be there; other images wouldn't."""
    rng, by_seed, by_image, large = np.random.default_rng(0), 0, 0, 0
    for _ in range(50):
        trials, predictions = seeds_alone(0.0, rng)
        by_seed += judge(trials, "val_loss", val_over_train=RATIO)[1].verdict == "winner"
        by_image += judge(trials, "val_loss", val_over_train=RATIO, of_runs=predictions)[1].verdict == "winner"
        trials, predictions = seeds_alone(1.5, rng)
        large += judge(trials, "val_loss", val_over_train=RATIO, of_runs=predictions)[1].verdict == "winner"
    assert by_seed > 10 and by_image <= 5 and large >= 45


COMPARISONS = 1000 if SOAK else 100


def verdicts(shifts, *, count=COMPARISONS, runs=5):
    """Verdicts where finalists differ from the default by `shifts` standard errors of the mean difference.

    Every run draws its training and validation images from the same pool, so differences are correlated between runs
    by validation's share of it (Nadeau & Bengio 2003).
    """
    rng = np.random.default_rng(0)
    correlation = RATIO / (1 + RATIO)
    error = math.sqrt(correlation + (1 - correlation) / runs)
    found = []
    for _ in range(count):
        drawn = {"t00000": [1.0] * runs}
        for place, shift in enumerate(shifts, 1):
            noise = math.sqrt(correlation) * rng.normal() + math.sqrt(1 - correlation) * rng.normal(size=runs)
            drawn[f"t{place:05d}"] = list(1.0 - 0.01 * (shift * error + noise))
        trials = table([1.0] * (len(shifts) + 1), drawn)
        found.append(judge(trials, "val_loss", val_over_train=RATIO)[1].verdict)
    return {name: found.count(name) / count for name in sorted(set(found))}


@pytest.mark.slow
@pytest.mark.soak
def test_error_and_power_of_the_verdict_in_simulated_comparisons(capsys):
    nothing, two, four = (verdicts([shift]) for shift in (0, 2, 4))
    both, one = (verdicts(shifts, count=COMPARISONS // 2) for shifts in ([0, 0], [4, 0]))
    with capsys.disabled():
        print(f"\none finalist, a difference of 0, 2, 4 standard errors: {nothing} {two} {four}")
        print(f"two finalists, of 0 and 0, of 4 and 0: {both} {one}")
    assert nothing["winner"] <= 0.05 and both["winner"] <= 0.05
    assert four["winner"] >= 0.85
