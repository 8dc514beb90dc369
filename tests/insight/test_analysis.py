import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from runs import few_trials, make_run

from tuning.insight import analysis
from tuning.record.predictions import Predictions
from tuning.settings.config import InputError
from tuning.show.sections import read


@pytest.fixture
def trials():
    return few_trials()


def test_best_by_either_direction(trials):
    assert analysis.top(trials, "val_loss")["trial_id"] == "t1"
    assert analysis.top(trials, "val_auroc")["trial_id"] == "t0"
    assert analysis.top(trials[trials["val_loss"].isna()], "val_loss") is None


def test_a_probe_is_not_the_best(trials):
    trials.loc[1, "origin"] = "probe"
    assert analysis.top(trials, "val_loss")["trial_id"] == "t4"


def test_a_finalist_is_not_searched(trials):
    trials.loc[1, "origin"] = "finalist"
    trials.loc[4, "origin"] = "start"
    assert list(analysis.searched(trials)["trial_id"]) == ["t0", "t2", "t3", "t4"]
    assert analysis.top(trials, "val_loss")["trial_id"] == "t4"


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


def test_errors_by_their_last_line(trials):
    told = trials.assign(error=[None, "a\nb: no\n", None, "c\nb: no", "d"])
    assert analysis.errors(told).to_dict("list") == {"error": ["b: no", "d"], "trials": [2, 1], "example": ["t1", "t4"]}


def test_what_decides_is_important(tmp_path):
    run = read(make_run(tmp_path / "run", trials=120, finalists=False))
    shares = analysis.importance(run.trials, run.space, "val_loss")
    assert shares["parameter"].iloc[0] == "learning_rate" and shares["importance"].sum() == pytest.approx(1)
    assert set(shares["parameter"]) == set(run.space.parameters)
    assert analysis.importance(run.trials.head(9), run.space, "val_loss").empty


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two runs, the second of an older version, whose table has fewer columns and one that is unknown today."""
    folder = tmp_path_factory.mktemp("runs")
    first = make_run(folder / "first", trials=20)
    second = make_run(folder / "second", trials=12, backbones=("resnet18", "resnet50"), seed=1)
    table = pq.read_table(second / "trials.parquet")
    names = [name if name != "peak_memory_mb" else "config_retired" for name in table.column_names]
    older = table.rename_columns(names).drop_columns(["latency_ms", "parameters"])
    pq.write_table(older.replace_schema_metadata({"schema_version": "1"}), second / "trials.parquet")
    return first, second


def test_trials_of_several_runs_are_one_frame(folders):
    trials = analysis.load_trials(*folders)
    assert list(trials.columns[:2]) == ["run", "trial_id"] and list(trials.columns[-1:]) == ["config_retired"]
    assert trials["run"].value_counts().to_dict() == {"first": 20, "second": 12}
    assert set(trials["origin"]) == {"start", "suggested"} and list(trials.index) == list(range(32))
    told = trials.groupby("run")[["latency_ms", "config_retired"]].count()
    assert told.to_numpy().tolist() == [[20, 0], [0, 12]]
    everything = analysis.load_trials(*folders, everything=True)
    assert (everything["origin"] == "finalist").sum() == 30
    assert list(analysis.load_trials(str(folders[0]))["run"].unique()) == ["first"]


def test_runs_of_one_name_are_told_apart_and_none_is_no_run(folders, tmp_path):
    make_run(tmp_path / "first", trials=1)
    same = (folders[0], tmp_path / "first")
    assert set(analysis.load_trials(*same)["run"]) == {str(folder) for folder in same}
    with pytest.raises(InputError, match="which run"):
        analysis.load_trials()
    with pytest.raises(InputError, match="no such table"):
        analysis.load_trials(tmp_path)
    with pytest.raises(InputError, match=r"no plan\.yaml there"):
        analysis.load_space(tmp_path)


def test_the_best_of_each_run(folders):
    trials = analysis.load_trials(*folders)
    found = analysis.best(trials, count=3)
    assert found["run"].value_counts().to_dict() == {"first": 3, "second": 3}
    assert found["val_loss"].is_monotonic_increasing
    for run, rows in trials.groupby("run"):
        assert list(found.loc[found["run"] == run, "val_loss"]) == sorted(rows["val_loss"].dropna())[:3]
    assert len(analysis.best(trials.drop(columns="run"), "val_auroc", 5)) == 5


def test_runs_are_compared_by_what_they_spent_and_found(folders):
    trials = analysis.load_trials(*folders, everything=True)
    found = analysis.compare(trials).set_index("run")
    assert list(found["trials"]) == [20, 12] and list(found.index) == ["first", "second"]
    searched = analysis.searched(trials)
    assert found.loc["first", "epochs"] == searched.loc[searched["run"] == "first", "epochs"].sum()
    assert found.loc["second", "val_loss"] == searched.loc[searched["run"] == "second", "val_loss"].min()
    nothing = analysis.compare(trials.assign(val_loss=None), "val_auroc")
    assert len(nothing) == 2 and nothing["trial_id"].isna().all()


def test_in_what_runs_differ(folders):
    plans = {folder.name: analysis.load_plan(folder) for folder in folders}
    found = analysis.differences(plans)
    assert found.to_dict("list") == {
        "part": ["settings", "space"],
        "key": ["trials", "backbone"],
        "first": ["20", "resnet18, vgg16, densenet121"],
        "second": ["12", "resnet18, resnet50"],
    }
    assert analysis.differences({"a": plans["first"], "b": plans["first"]}).empty
    assert set(analysis.load_space(folders[0]).parameters) == set(plans["first"]["space"]["parameters"])
