import pandas as pd
import pytest
from runs import few_trials

from tuning.insight import spending


@pytest.fixture
def trials():
    return few_trials()


def test_saved_counts_what_was_ended_early(trials):
    table = spending.saved(trials, 4).set_index("status")
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
    found = spending.spent(epochs(("a", 10, 10), ("b", 20, 10)))
    assert found == pytest.approx({"data": 2, "prefix": 4, "train": 8, "evaluate": 6})


def test_utilisation_counts_until_the_last_trial_begins():
    # Two slots from 2 s on: a trains for 10 s, then waits for 2; b for 20, of which c, the last, sees the start of 8.
    table = epochs(("a", 7, 5), ("b", 12, 10), ("a", 12, 5), ("b", 22, 10), ("c", 18, 4), ("c", 22, 4))
    assert spending.utilisation(table, 2) == pytest.approx((10 + 12) / (2 * 12))


def test_utilisation_of_trials_that_all_began_at_once_is_unknown():
    assert spending.utilisation(epochs(("a", 7, 5), ("b", 12, 9.5)), 2) is None


def test_utilisation_of_a_search_that_went_on_with_other_slots_is_that_of_its_last_start():
    before = [("a", 7, 5), ("b", 12, 9), ("b", 13, 1)]  # the last one reported as the search went on
    after = [("c", 25, 5), ("d", 30, 5), ("e", 36, 6)]
    assert spending.utilisation(epochs(*before, *after), 1, since=12.5) == pytest.approx(1.0)
    assert spending.utilisation(epochs(*before, *after), 1) < 0.9
    assert spending.utilisation(epochs(*before), 1, since=12.5) is None


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
    found = spending.best_so_far(trials, table, "val_loss")
    assert found.to_dict("list") == {
        "trial_id": ["t0", "t0"],
        "epoch": [1, 2],
        "wall_s": [5, 10],
        "epochs": [1, 3],
        "seconds": [5, 16],
        "value": [0.9, 0.5],
    }
    assert list(spending.best_so_far(trials, table, "val_auroc")["value"]) == [0.5, 0.7]


def test_ends_by_epoch_and_what_a_backbone_costs(trials):
    assert spending.ends(trials)["trials"].sum() == 5
    costs = spending.cost(trials)
    assert costs.to_dict("list") == {"backbone": ["a", "b"], "trials": [3, 2], "epochs": [5, 3], "seconds": [10.0, 7.0]}
