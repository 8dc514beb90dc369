"""From a run to a ranked list of its labels, and a page that shows them."""

import shutil

import numpy as np
import pytest
from test_train_final import make_best

from tuning import label_issues
from tuning.label_issues import Flags, run
from tuning.record.tables import read_table
from tuning.settings.config import InputError


@pytest.fixture
def mislabelled(tmp_path, folder):
    """A run on images two of which lie in the wrong folder."""
    shutil.copytree(folder, tmp_path / "images")
    for number, (here, there) in {25: ("dark", "light"), 26: ("light", "dark")}.items():
        shutil.move(tmp_path / "images" / here / f"{number:03d}.png", tmp_path / "images" / there / f"x{number}.png")
    return make_best(tmp_path / "run", tmp_path / "images")


@pytest.mark.slow
def test_wrong_labels_are_found_and_shown(mislabelled, capsys, monkeypatch):
    table = run(Flags(str(mislabelled), folds=3))
    samples = read_table(mislabelled / "samples.parquet").set_index("path")
    inside = samples[samples["split"] != "test"]
    assert sorted(table["path"]) == sorted(inside.index)
    wrong = {path for path in inside.index if "/x" in path}
    assert wrong and set(table["path"][: len(wrong)]) == wrong and table["issue"][: len(wrong)].all()
    said = capsys.readouterr().out
    assert "part 3 of 3" in said and "rather" in said and "label_issues.html shows them" in said
    page = (mislabelled / "label_issues.html").read_text()
    assert page.count("<figure>") >= len(wrong) + 20 and "Images unlike all others" in page
    written = read_table(mislabelled / "label_issues.parquet")
    assert written["own_probability"].is_monotonic_increasing and np.isfinite(written["unlike_others"]).all()
    monkeypatch.setattr(label_issues, "LISTED", 0)
    assert (run(Flags(str(mislabelled), folds=3))["path"] == table["path"]).all()  # the same again


def test_wrong_input_is_one_clear_error(mislabelled, tmp_path):
    for flags, said in (
        (Flags(str(tmp_path)), "has no best.yaml"),
        (Flags(str(mislabelled), folds=1), "--folds 1: must be at least 2"),
        (Flags(str(mislabelled), folds=1000), "--folds 1000: there are 48 groups of images; give fewer"),
    ):
        with pytest.raises(InputError, match=said):
            run(flags)
    next((tmp_path / "images" / "dark").iterdir()).unlink()
    with pytest.raises(InputError, match=r"missing|changed|can't be read"):
        run(Flags(str(mislabelled)))
