import numpy as np
import pandas as pd
import pytest
from runs import make_run

from tuning import analysis
from tuning.predictions import Predictions
from tuning.sections import read


@pytest.fixture
def trials():
    return pd.DataFrame(
        [
            ("t0", "a", 0, 0.5, 0.4, "completed", 4, 8.0),
            ("t1", "a", 3, 0.3, 0.1, "stopped", 1, 2.0),
            ("t2", "b", 5, None, None, "diverged", 2, 6.0),
            ("t3", "b", 5, 0.9, 0.9, "failed", 1, 1.0),
            ("t4", "a", 1, 0.4, 0.4, "running", 0, 0.0),
        ],
        columns=[
            *("trial_id", "config_backbone", "config_unfreeze_depth", "val_loss", "train_eval_loss"),
            *("status", "epochs", "seconds"),
        ],
    ).assign(
        origin="suggested",
        gap=lambda frame: frame["val_loss"] - frame["train_eval_loss"],
        val_auroc=[0.9, 0.8, None, 0.5, 0.7],
    )


def test_best_by_either_direction(trials):
    assert analysis.best(trials, "val_loss")["trial_id"] == "t1"
    assert analysis.best(trials, "val_auroc")["trial_id"] == "t0"
    assert analysis.best(trials[trials["val_loss"].isna()], "val_loss") is None


def test_a_probe_is_not_the_best_but_costs(trials):
    trials.loc[1, "origin"] = "probe"
    assert analysis.best(trials, "val_loss")["trial_id"] == "t4"
    costs = analysis.cost(trials)
    assert costs.to_dict("list") == {
        "backbone": ["a", "b"],
        "trials": [3, 2],
        "epochs": [5, 3],
        "seconds": [10.0, 7.0],
    }


def test_a_finalist_is_not_searched(trials):
    trials.loc[1, "origin"] = "finalist"
    trials.loc[4, "origin"] = "start"
    assert list(analysis.searched(trials)["trial_id"]) == ["t0", "t2", "t3", "t4"]
    assert analysis.best(trials, "val_loss")["trial_id"] == "t4"


def test_gaps_by_part_and_augmentation(trials):
    table = analysis.gaps(trials.assign(config_augmentation=["none", "none", "light", "light", "light"], epochs=3))
    assert table.values.tolist() == [
        ["head", "none", 1, pytest.approx(0.1), 0.5],
        ["part", "none", 1, pytest.approx(0.2), 0.3],
        ["part", "light", 1, 0.0, 0.4],
        ["all", "light", 1, 0.0, 0.9],
    ]
    assert analysis.gaps(trials.assign(config_augmentation="none", epochs=1)).empty


def test_how_much_worse_the_last_epoch_is_than_the_best(trials):
    curves = {"t0": [0.6, 0.5, 0.7], "t1": [0.3], "t2": [None, None], "t3": [0.9, 0.95], "t4": [0.5, 0.4]}
    rows = [(name, epoch, loss) for name, curve in curves.items() for epoch, loss in enumerate(curve, 1)]
    curves = pd.DataFrame(rows, columns=["trial_id", "epoch", "val_loss"])
    trials = trials.assign(epochs=[3, 1, 2, 2, 2], best_epoch=[2, 1, None, 1, 2])
    table = analysis.best_and_last(trials, curves)
    assert list(table["unfrozen"]) == [
        "head",
        "part",
        "all",
    ]  # t1 ran one, t2 has no losses
    assert list(table["trials"]) == [1, 1, 1] and list(table["earlier"]) == [1, 0, 1]
    assert table["rise"].tolist() == pytest.approx([0.2, 0.0, 0.05])
    assert table["last"].tolist() == pytest.approx([0.7, 0.4, 0.95])


def picked(rng, *, shares, images, noise, patients=None, trials=60, epochs=8):
    """The luckiest of so many epochs of trials that know the classes' shares, and nothing of the images."""
    targets = rng.permutation(np.repeat(np.arange(len(shares)), np.round(np.array(shares) * images).astype(int)))
    groups = np.arange(images) if patients is None else pd.factorize(rng.integers(patients, size=images))[0]
    scores = rng.normal(size=(trials, epochs, groups.max() + 1, len(shares)))[:, :, groups]  # alike for a patient
    logits = np.log(shares) + noise * scores
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    losses = -logs[:, :, np.arange(images), targets].mean(axis=-1)
    best = np.exp(logs[np.unravel_index(losses.argmin(), losses.shape)])
    return Predictions(("t",), best[None], targets, groups, tuple("abc"[: len(shares)]))


@pytest.mark.parametrize("noise", [0.02, 0.3, 2.0])
@pytest.mark.parametrize(
    ("shares", "images", "patients"),
    [((0.5, 0.5), 40, None), ((0.5, 0.5), 100, 50), ((0.1, 0.9), 60, None), ((0.1, 0.45, 0.45), 100, None)],
)
def test_luck_is_not_called_better_than_the_class_frequencies(shares, images, patients, noise):
    rng = np.random.default_rng(0)
    trials = pd.DataFrame({"epochs": [8] * 60})
    found = []
    for _ in range(20):
        chosen = picked(rng, shares=shares, images=images, noise=noise, patients=patients)
        found.append(analysis.guessing(trials, chosen))
    assert sum(guessing.better for guessing in found) <= 2
    if noise < 1:  # it seems to be better, in most searches
        assert sum(guessing.val_loss < guessing.frequencies for guessing in found) > 10
    assert {guessing.looks for guessing in found} == {480}


@pytest.mark.parametrize("counts", [(20, 20), (6, 94), (50, 50, 1)])
def test_what_knows_the_images_is_better_than_the_class_frequencies(counts):
    rng = np.random.default_rng(0)
    targets = np.repeat(np.arange(len(counts)), counts)
    probabilities = np.full((len(targets), len(counts)), 0.05) + rng.uniform(0, 0.05, (len(targets), len(counts)))
    probabilities[np.arange(len(targets)), targets] = 0.9
    known = Predictions(("t",), probabilities[None], targets, np.arange(len(targets)), tuple("abc"[: len(counts)]))
    found = analysis.guessing(pd.DataFrame({"epochs": [8] * 60}), known)
    assert found.better and found.least_gain < found.frequencies
    shares = np.array(counts) / sum(counts)
    assert found.frequencies == pytest.approx(-(shares * np.log(shares)).sum())


def test_guessing_that_cannot_be_judged(trials):
    nobody = Predictions((), np.empty((0, 2, 2)), np.array([0, 1]), np.arange(2), ("a", "b"))
    assert analysis.guessing(trials, nobody) is None
    two_images = Predictions(("t0",), np.full((1, 2, 2), 0.5), np.array([0, 1]), np.arange(2), ("a", "b"))
    assert analysis.guessing(trials, two_images) is None


def test_overfitting_by_backbone_and_part(trials):
    table = analysis.overfitting(trials, "val_loss")
    assert list(zip(table["backbone"], table["unfrozen"], table["trials"], strict=True)) == [
        ("a", "head", 1),
        ("a", "part", 2),
        ("b", "all", 2),
    ]
    assert list(table["trial_id"]) == ["t0", "t1", "t3"]
    assert table["gap"].tolist() == pytest.approx([0.1, 0.2, 0.0])


def test_saved_counts_what_was_ended_early(trials):
    table = analysis.saved(trials, 4).set_index("status")
    assert table["epochs_saved"].to_dict() == {"completed": 0, "diverged": 2, "failed": 0, "running": 0, "stopped": 3}
    assert table["seconds_saved"].to_dict() == {"completed": 0, "diverged": 6, "failed": 0, "running": 0, "stopped": 6}


def epochs(*rows):
    frame = pd.DataFrame(rows, columns=["trial_id", "wall_s", "seconds"])
    parts = {
        f"{part}_seconds": frame["seconds"] * share for part, share in zip(PARTS, (0.1, 0.2, 0.4, 0.3), strict=True)
    }
    return frame.assign(**parts)


PARTS = ("data", "prefix", "train", "evaluate")


def test_where_the_time_went():
    found = analysis.spent(epochs(("a", 10, 10), ("b", 20, 10)))
    assert found == pytest.approx({"data": 2, "prefix": 4, "train": 8, "evaluate": 6})


def test_utilisation_counts_until_the_last_trial_begins():
    # Two slots from 2 s on: a trains for 10 s, then waits for 2; b for 20, of which c, the last, sees the start of 8.
    table = epochs(("a", 7, 5), ("b", 12, 10), ("a", 12, 5), ("b", 22, 10), ("c", 18, 4), ("c", 22, 4))
    assert analysis.utilisation(table, 2) == pytest.approx((10 + 12) / (2 * 12))


def test_utilisation_of_trials_that_all_began_at_once_is_unknown():
    assert analysis.utilisation(epochs(("a", 7, 5), ("b", 12, 9.5)), 2) is None


def test_best_so_far_counts_what_all_trials_took(trials):
    trials.loc[3, "origin"] = "probe"
    rows = [
        ("t0", 1, 5, 5, 0.9),
        ("t1", 1, 6, 6, None),
        ("t3", 1, 7, 1, 0.1),
        ("t0", 2, 10, 5, 0.5),
        ("t1", 2, 12, 6, 0.7),
    ]
    table = pd.DataFrame(rows, columns=["trial_id", "epoch", "wall_s", "seconds", "val_loss"])
    table = table.assign(seq=range(5), val_auroc=[0.5, 0.6, 0.9, 0.4, 0.7])
    found = analysis.best_so_far(trials, table, "val_loss")
    assert found.to_dict("list") == {
        "trial_id": ["t0", "t0"],
        "epoch": [1, 2],
        "wall_s": [5, 10],
        "epochs": [1, 3],
        "seconds": [5, 16],
        "value": [0.9, 0.5],
    }
    assert list(analysis.best_so_far(trials, table, "val_auroc")["value"]) == [0.5, 0.7]


def test_the_pareto_front_has_the_cheapest_and_the_best(trials):
    front = analysis.pareto(trials.assign(seconds=[8.0, 9.0, 1.0, 1.0, 8.0]), "seconds", "val_loss")
    assert list(front["trial_id"]) == ["t3", "t4", "t1"]
    assert list(analysis.pareto(trials, "seconds", "val_auroc")["trial_id"]) == ["t4", "t1", "t0"]


def test_backbones_by_depth(trials):
    table = analysis.by_depth(trials, "val_loss")
    assert list(zip(table["backbone"], table["depth"], table["trials"], table["trial_id"], strict=True)) == [
        ("a", 0, 1, "t0"),
        ("a", 1, 1, "t4"),
        ("a", 3, 1, "t1"),
        ("b", 5, 2, "t3"),
    ]


def test_ends_by_epoch_and_errors_by_their_last_line(trials):
    assert analysis.ends(trials)["trials"].sum() == 5
    told = trials.assign(error=[None, "a\nb: no\n", None, "c\nb: no", "d"])
    assert analysis.errors(told).to_dict("list") == {"error": ["b: no", "d"], "trials": [2, 1], "example": ["t1", "t4"]}


def test_what_decides_is_important(tmp_path):
    run = read(make_run(tmp_path / "run", trials=120, finalists=False))
    shares = analysis.importance(run.trials, run.space, "val_loss")
    assert shares["parameter"].iloc[0] == "learning_rate" and shares["importance"].sum() == pytest.approx(1)
    assert set(shares["parameter"]) == set(run.space.parameters)
    assert analysis.importance(run.trials.head(9), run.space, "val_loss").empty
