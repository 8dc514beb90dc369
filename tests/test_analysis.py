import pandas as pd
import pytest

from tuning import analysis


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
    ).assign(gap=lambda frame: frame["val_loss"] - frame["train_eval_loss"], val_auroc=[0.9, 0.8, None, 0.5, 0.7])


def test_best_by_either_direction(trials):
    assert analysis.best(trials, "val_loss")["trial_id"] == "t1"
    assert analysis.best(trials, "val_auroc")["trial_id"] == "t0"
    assert analysis.best(trials[trials["val_loss"].isna()], "val_loss") is None


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
