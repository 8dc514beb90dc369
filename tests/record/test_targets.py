"""Labels as texts and as targets: one class each, or several labels."""

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from tuning.record.targets import (
    by_class,
    class_names,
    constant_loss,
    counted,
    encoded,
    is_multi_label,
    named,
    one_row_per_label,
    shown,
    written,
)

NAMES = ("edema", "mass?x", "no finding", "x ray")
said = st.lists(st.dictionaries(st.sampled_from(NAMES), st.sampled_from([True, False, None])), min_size=1, max_size=9)


@given(said)
def test_what_is_written_of_labels_is_read_again(rows):
    labels = [written(row) for row in rows]
    assert is_multi_label(labels)
    assert [named(label) for label in labels] == [
        {name: known for name, known in row.items() if known is not False} for row in rows
    ]
    targets = encoded(labels, NAMES)
    assert targets.shape == (len(rows), len(NAMES))
    for row, cells in zip(rows, targets.tolist(), strict=True):
        assert cells == [{True: 1, False: 0, None: -1}[row.get(name, False)] for name in NAMES]


def test_classes_are_their_own_text():
    labels = ["b", "a", "b"]
    assert not is_multi_label(labels) and class_names(labels) == ("a", "b")
    assert encoded(labels, ("a", "b")).tolist() == [1, 0, 1]
    assert by_class(encoded(labels, ("a", "b")), 2).tolist() == [[0, 1], [1, 0], [0, 1]]
    assert shown("b") == "b"
    assert shown("|") == "no label" and shown("|edema|mass?") == "edema, mass (unknown)"


def test_images_are_counted_by_label():
    samples = pd.DataFrame({"label": ["|a|b", "|", "|b?", "|a"], "split": ["train", "train", "val", "val"]})
    assert counted(samples).to_dict("index") == {
        "a": {"train": 1, "val": 1},
        "b": {"train": 1, "val": 0},
        "no label": {"train": 1, "val": 1},
    }
    assert one_row_per_label(samples)["label"].tolist() == ["a", "b", "a"]
    single = pd.DataFrame({"label": ["a", "b", "a"], "split": ["train", "train", "val"]})
    assert counted(single).to_dict("index") == {"a": {"train": 1, "val": 1}, "b": {"train": 1, "val": 0}}


def test_the_loss_of_constant_predictions_is_the_entropy():
    assert constant_loss(np.array([0, 0, 0, 1]), 2) == -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    targets = np.array([[1, 0], [0, -1], [0, 0], [0, 0]])
    of_first = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    np.testing.assert_allclose(constant_loss(targets, 2), 4 * of_first / 7)
