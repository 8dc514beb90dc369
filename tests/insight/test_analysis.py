import pandas as pd
import pyarrow.parquet as pq
import pytest
from runs import few_trials, make_run

from tuning.insight import analysis
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


def test_a_parameter_that_one_trial_had_is_ranked_without_a_warning(tmp_path):
    run = read(make_run(tmp_path / "run", trials=120, finalists=False))
    without = run.trials["config_unfreeze_depth"] <= 1
    trials = run.trials[without | (run.trials.index == run.trials.index[~without][0])]
    assert 10 <= len(trials) < 120
    assert "stage_lr_decay" in set(analysis.importance(trials, run.space, "val_loss")["parameter"])


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
    assert list(table["unfrozen"]) == ["head", "part", "all"]  # t1 ran one epoch, t2 has no losses
    assert list(table["trials"]) == [1, 1, 1] and list(table["earlier"]) == [1, 0, 1]
    assert table["rise"].tolist() == pytest.approx([0.2, 0.0, 0.05])
    assert table["last"].tolist() == pytest.approx([0.7, 0.4, 0.95])


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
    table = analysis.savings(trials, 4).set_index("status")
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
    found = analysis.time_spent(epochs(("a", 10, 10), ("b", 20, 10)))
    assert found == pytest.approx({"data": 2, "prefix": 4, "train": 8, "evaluate": 6})


def test_utilisation_counts_until_the_last_trial_begins():
    # Two slots from 2 s on: a trains for 10 s, then waits for 2; b for 20, of which c, the last, sees the start of 8.
    table = epochs(("a", 7, 5), ("b", 12, 10), ("a", 12, 5), ("b", 22, 10), ("c", 18, 4), ("c", 22, 4))
    assert analysis.utilisation(table, 2) == pytest.approx((10 + 12) / (2 * 12))


def test_utilisation_of_trials_that_all_began_at_once_is_unknown():
    assert analysis.utilisation(epochs(("a", 7, 5), ("b", 12, 9.5)), 2) is None


def test_utilisation_of_a_search_that_went_on_with_other_slots_is_that_of_its_last_start():
    before = [("a", 7, 5), ("b", 12, 9), ("b", 13, 1)]  # the last one reported as the search went on
    after = [("c", 25, 5), ("d", 30, 5), ("e", 36, 6)]
    assert analysis.utilisation(epochs(*before, *after), 1, since=12.5) == pytest.approx(1.0)
    assert analysis.utilisation(epochs(*before, *after), 1) < 0.9
    assert analysis.utilisation(epochs(*before), 1, since=12.5) is None


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


def test_ends_by_epoch_and_what_a_backbone_costs(trials):
    assert analysis.ends(trials)["trials"].sum() == 5
    costs = analysis.backbone_cost(trials)
    assert costs.to_dict("list") == {"backbone": ["a", "b"], "trials": [3, 2], "epochs": [5, 3], "seconds": [10.0, 7.0]}


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
    with pytest.raises(InputError, match=r"has no plan\.yaml"):
        analysis.load_space(tmp_path)


def test_the_best_of_each_run(folders):
    trials = analysis.load_trials(*folders)
    found = analysis.best(trials, count=3)
    assert found["run"].value_counts().to_dict() == {"first": 3, "second": 3}
    assert found["val_tempered_loss"].is_monotonic_increasing  # as the searches chose
    for _, rows in trials.groupby("run"):
        for metric in ("val_tempered_loss", "val_loss"):
            chosen = analysis.best(rows, metric, 3)
            assert list(chosen[metric]) == sorted(rows[metric].dropna())[:3]
        assert analysis.best(rows, count=3).equals(analysis.best(rows, "val_tempered_loss", 3))
        older = rows.drop(columns="val_tempered_loss")
        assert list(analysis.best(older, count=3)["trial_id"]) == list(analysis.best(rows, "val_loss", 3)["trial_id"])
    assert len(analysis.best(trials.drop(columns="run"), "val_auroc", 5)) == 5


def test_runs_are_compared_by_what_they_spent_and_found(folders):
    trials = analysis.load_trials(*folders, everything=True)
    found = analysis.compare(trials).set_index("run")
    assert list(found["trials"]) == [20, 12] and list(found.index) == ["first", "second"]
    searched = analysis.searched(trials)
    assert found.loc["first", "epochs"] == searched.loc[searched["run"] == "first", "epochs"].sum()
    losses = searched.loc[searched["run"] == "second", "val_tempered_loss"]
    assert found.loc["second", "val_tempered_loss"] == losses.min()
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


def test_parameters_in_words():
    assert analysis.described({"type": "int", "low": 0, "high": "all"}) == "0 to all"
    assert analysis.described({"type": "float", "low": 1e-4, "high": 0.1, "log": True, "when": "a > 1"}) == (
        "0.0001 to 0.1, log (when a > 1)"
    )
    assert analysis.described({"type": "int", "low": 1, "high": 9, "step": 2}) == "1 to 9, step 2"
    assert analysis.described({"type": "categorical", "choices": ["none", 2]}) == "none, 2"
