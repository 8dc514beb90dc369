"""From a best.yaml to a tested model, with the search's own tables beside it."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import draw_folder

from tuning.audit import load_checked
from tuning.config import InputError, SearchPlan, TrialConfig
from tuning.data import Data
from tuning.model_folder import load_model
from tuning.run_search import write_run
from tuning.space import parse
from tuning.train_final import Flags, measure, run

ROOT = Path(__file__).parent.parent
CONFIG = TrialConfig(
    backbone="test_resnet",
    unfreeze_depth=5,
    learning_rate=3e-3,
    image_size=32,
    batch_size=8,
    epochs=6,
    augmentation="none",
)


@pytest.fixture
def best(tmp_path, folder):
    """A run's folder as a search leaves it."""
    plan = SearchPlan(name="run", data=str(folder), weights="random")
    checked = load_checked(plan, [32])
    space = parse({"fixed": {"backbone": "test_resnet"}, "parameters": {}}, "test")
    write_run(tmp_path / "run", plan, space, checked)
    provenance = {"run": "run", "trial_id": "t00000", "fingerprint": checked.fingerprint, "settings": plan.model_dump()}
    (tmp_path / "run" / "best.yaml").write_text(yaml.safe_dump(CONFIG.model_dump() | {"provenance": provenance}))
    return tmp_path / "run"


def test_train_test_predict(best, folder, tmp_path):
    model = run(Flags(str(best)))
    assert {path.name for path in model.iterdir()} == {"model.safetensors", "config.yaml", "metrics.json"}
    metrics = json.loads((model / "metrics.json").read_text())
    tested = metrics["test"]
    assert tested["images"] == 12 and tested["accuracy"] > 0.9
    assert tested["accuracy_95"][0] < tested["accuracy"] <= tested["accuracy_95"][1]
    assert set(tested["classes"]) == {"dark", "light"}
    assert np.sum(tested["confusion"]["counts"]) == 12
    files = [str(folder / "dark" / "000.png"), str(folder / "light" / "000.png")]
    said = subprocess.run(
        [sys.executable, str(ROOT / "tuning" / "model_folder.py"), "predict", str(model), *files],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    rows = list(csv.DictReader(said.splitlines()))
    assert [row["predicted"] for row in rows] == ["dark", "light"]
    assert float(rows[0]["probability_dark"]) > 0.5

    with pytest.raises(InputError, match="the test set is read once"):
        run(Flags(str(best)))


def test_settings_can_be_changed(best):
    model = run(Flags(str(best / "best.yaml"), set=(("epochs=1", "unfreeze_depth=0"),)))
    document = yaml.safe_load((model / "config.yaml").read_text())
    assert (document["config"]["epochs"], document["config"]["unfreeze_depth"]) == (1, 0)
    assert document["classes"] == ["dark", "light"]
    assert document["preprocessing"]["fit"] == "squash" and document["preprocessing"]["drop_colour"] is False


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.unlink(), "best.yaml"),
        (lambda path: path.write_text("backbone: test_resnet"), "not a best.yaml"),
        (lambda path: path.write_text("[1"), "not a best.yaml"),
        (lambda path: path.write_text(path.read_text().replace("backbone: ", "backbon: ")), "backbon"),
        (lambda path: path.write_text(path.read_text().replace("fingerprint: ", "fingerprint: x")), "data has changed"),
    ],
)
def test_bad_input(best, change, said):
    change(best / "best.yaml")
    with pytest.raises(InputError, match=said):
        run(Flags(str(best)))
    assert not (best / "model").exists()


def test_other_data_in_another_shape(best, tmp_path):
    other = draw_folder(tmp_path / "other", count=15)
    model = run(Flags(str(best), data=str(other), set=(("epochs=1", "fit=letterbox", "drop_colour=true"),)))
    assert load_model(model).fit == "letterbox" and load_model(model).drop_colour


def test_measures_by_hand():
    labels = np.array([0, 0, 0, 1, 1])
    data = Data(np.zeros((5, 1, 1, 1), np.uint8), labels, labels[:0], labels[:0], np.arange(5), ("a", "b"))
    logits = np.array([[2, 0], [2, 0], [0, 2], [0, 2], [0, 1]], dtype=np.float32)
    found = measure(logits, data)
    assert found["accuracy"] == 0.8
    assert found["classes"]["a"]["sensitivity"] == pytest.approx(2 / 3)
    assert found["classes"]["a"]["specificity"] == 1.0
    assert found["confusion"]["counts"] == [[2, 1], [0, 2]]
    assert found["accuracy_95"] == pytest.approx([0.3755, 0.9638], abs=1e-3)  # Wilson's interval for 4 of 5
