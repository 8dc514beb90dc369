import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuning.record.predictions import predictions_file, read_predictions, write_predictions
from tuning.record.tables import SCHEMA_VERSION

CLASSES = ("a", "b")


@pytest.fixture
def samples():
    """Two images for training, three of two patients for validation."""
    rows = [("0.png", "a", "train", "p0"), ("1.png", "b", "train", "p0")]
    rows += [("2.png", "b", "val", "p1"), ("3.png", "a", "val", "p2"), ("4.png", "a", "val", "p1")]
    return pd.DataFrame(rows, columns=["path", "label", "split", "group"])


def trials(*rows):
    return pd.DataFrame(rows, columns=["trial_id", "best_epoch", "val_loss"])


def write(run, samples, trial_id, probabilities, **named):
    validation = samples[samples["split"] == "val"]
    write_predictions(predictions_file(run, trial_id), validation, CLASSES, np.array(probabilities), **named)


def test_predictions_are_read_back_the_best_first(tmp_path, samples):
    poor, good = [[0.5, 0.5], [0.4, 0.6], [1.0, 0.0]], [[0.1, 0.9], [0.8, 0.2], [1e-200, 1.0]]
    write(tmp_path, samples, "t0", poor, epoch=3, val_loss=0.7)
    write(tmp_path, samples, "t1", good, epoch=1, val_loss=0.1 + 0.2)
    found = read_predictions(tmp_path, trials(("t0", 3, 0.7), ("t1", 1, 0.1 + 0.2)), samples)
    assert found.trial_ids == ("t1", "t0") and found.classes == CLASSES
    assert np.array_equal(found.probabilities, [good, poor])
    assert list(found.targets) == [1, 0, 0] and list(found.groups) == [0, 1, 0]
    assert found.losses[0] == pytest.approx(-np.log([0.9, 0.8, 1e-200]))
    only = found.of({"t0"})
    assert only.trial_ids == ("t0",) and np.array_equal(only.probabilities, [poor])


def test_probability_columns_are_named_and_the_epoch_is_in_the_metadata(tmp_path, samples):
    write(tmp_path, samples, "t0", [[0.5, 0.5]] * 3, epoch=3, val_loss=0.7)
    table = pq.read_table(tmp_path / "predictions" / "t0.parquet")
    assert table.column_names == ["path", "label", "probability_a", "probability_b"]
    assert table["label"].to_pylist() == ["b", "a", "a"]
    facts = {"schema_version": str(SCHEMA_VERSION), "best_epoch": "3", "val_loss": "0.7"}
    assert {key.decode(): value.decode() for key, value in table.schema.metadata.items()} == facts


def test_files_that_do_not_fit_the_tables_are_left_out(tmp_path, samples):
    for name in ("stale", "again", "moved", "good"):
        write(tmp_path, samples, name, [[0.5, 0.5]] * 3, epoch=2, val_loss=0.7)
    write(tmp_path, samples.replace("4.png", "5.png"), "moved", [[0.5, 0.5]] * 3, epoch=2, val_loss=0.7)
    predictions_file(tmp_path, "half").write_bytes(predictions_file(tmp_path, "good").read_bytes()[:200])
    pq.write_table(pa.table({"path": ["2.png", "3.png", "4.png"]}), predictions_file(tmp_path, "foreign"))
    rows = [("stale", 3, 0.7), ("again", 2, 0.7000001), ("half", 2, 0.7), ("foreign", 2, 0.7), ("missing", 2, 0.7)]
    rows += [("moved", 2, 0.7), ("good", 2, 0.7), ("lost", None, None)]
    assert read_predictions(tmp_path, trials(*rows), samples).trial_ids == ("good",)


def test_files_of_an_older_version_are_read(tmp_path, samples):
    write(tmp_path, samples, "t0", [[0.5, 0.5]] * 3, epoch=2, val_loss=0.7)
    path = predictions_file(tmp_path, "t0")
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata(table.schema.metadata | {b"schema_version": b"1"}), path)
    assert read_predictions(tmp_path, trials(("t0", 2, 0.7)), samples).trial_ids == ("t0",)


def test_without_groups_each_image_is_its_own_and_without_files_there_are_no_predictions(tmp_path, samples):
    found = read_predictions(tmp_path, trials(("t0", 1, 0.5)), samples.assign(group=None))
    assert list(found.groups) == [0, 1, 2] and found.probabilities.shape == (0, 3, 2) and found.trial_ids == ()
