"""The sheet says what the run knows, and leaves the rest to the author."""

import pytest
from test_train_final import Flags, make_best, run

from tuning.model.sheet import CLAIM, TRIPOD, YOURS


@pytest.mark.slow
def test_every_item_is_filled_or_left_to_the_author(tmp_path, folder):
    model = run(Flags(str(make_best(tmp_path / "run", folder))))
    lines = (model / "reporting.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ") and not line.startswith("| item")]
    assert [row[0] for row in rows] == [item[0] for item in (*CLAIM, *TRIPOD)]
    assert all(len(row) == 3 and row[2] for row in rows)
    said = {row[1]: row[2] for row in rows}
    assert said["ethical approval"] == YOURS and said["de-identification"] == YOURS
    assert "test_resnet" in said["the model: architecture, inputs, outputs"].replace("\\", "")
    assert "train 36 images; val 12 images; test 12 images" in said["flow of participants or examinations"]
    assert "accuracy" in said["performance with its uncertainty"] and "Shortcuts" in said["robustness"]
    assert "disjoint by images" in said["how images were assigned to sets, and at which level these are disjoint"]
