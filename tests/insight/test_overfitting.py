import pandas as pd
import pytest
from runs import few_trials

from tuning.insight import overfitting


@pytest.fixture
def trials():
    return few_trials()


def test_gaps_by_part_and_augmentation(trials):
    table = overfitting.gaps(trials.assign(config_augmentation=["none", "none", "light", "light", "light"], epochs=3))
    assert table.values.tolist() == [
        ["head", "none", 1, pytest.approx(0.1), 0.5],
        ["part", "none", 1, pytest.approx(0.2), 0.3],
        ["part", "light", 1, 0.0, 0.4],
        ["all", "light", 1, 0.0, 0.9],
    ]
    assert overfitting.gaps(trials.assign(config_augmentation="none", epochs=1)).empty


def test_how_much_worse_the_last_epoch_is_than_the_best(trials):
    curves = {"t0": [0.6, 0.5, 0.7], "t1": [0.3], "t2": [None, None], "t3": [0.9, 0.95], "t4": [0.5, 0.4]}
    rows = [(name, epoch, loss) for name, curve in curves.items() for epoch, loss in enumerate(curve, 1)]
    curves = pd.DataFrame(rows, columns=["trial_id", "epoch", "val_loss"])
    trials = trials.assign(epochs=[3, 1, 2, 2, 2], best_epoch=[2, 1, None, 1, 2])
    table = overfitting.best_and_last(trials, curves)
    assert list(table["unfrozen"]) == [
        "head",
        "part",
        "all",
    ]  # t1 ran one, t2 has no losses
    assert list(table["trials"]) == [1, 1, 1] and list(table["earlier"]) == [1, 0, 1]
    assert table["rise"].tolist() == pytest.approx([0.2, 0.0, 0.05])
    assert table["last"].tolist() == pytest.approx([0.7, 0.4, 0.95])


def test_overfitting_by_backbone_and_part(trials):
    table = overfitting.overfitting(trials, "val_loss")
    assert list(zip(table["backbone"], table["unfrozen"], table["trials"], strict=True)) == [
        ("a", "head", 1),
        ("a", "part", 2),
        ("b", "all", 2),
    ]
    assert list(table["trial_id"]) == ["t0", "t1", "t3"]
    assert table["gap"].tolist() == pytest.approx([0.1, 0.2, 0.0])
