"""The commands in Python, in a notebook: search, final model, evaluation, prediction."""

import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from shared import draw_folder

from tuning import api, run_search
from tuning.settings.config import InputError

ROOT = Path(__file__).parent.parent
CELLS = [
    "from tuning import evaluate, load_model, search, train_final",
    """space = {"parameters": {"learning_rate": {"type": "float", "low": 1e-3, "high": 1e-2, "log": True}},
         "fixed": {"backbone": "test_resnet", "image_size": 32, "batch_size": 8, "unfreeze_depth": 5}}
import yaml
from pathlib import Path
Path("space.yaml").write_text(yaml.safe_dump(space))
run = search("images", space="space.yaml", trials=3, epochs=4, weights="random", finalists=0, name="book")
run""",
    "assert run.trials['val_tempered_loss'].is_monotonic_increasing and len(run.trials) == 3\n"
    "run.best['backbone'], run.verdict",
    "model = train_final(run, prevalence={'dark': 0.1}, ensemble=False)\nmodel",
    "model.predict(sorted(Path('images/dark').glob('*.png'))[:3]).shape",
    "evaluate(model, 'other', rename={'black': 'dark'}, skip_unreadable=True)",
    "load_model(model.folder).classes",
]


@pytest.mark.slow
def test_a_notebook(tmp_path, monkeypatch):
    draw_folder(tmp_path / "images")
    draw_folder(tmp_path / "other", classes=("black", "light"), count=12, side=48)
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    client = NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    shown = [
        "".join(output.get("text", "") + "".join(output.get("data", {}).values()) for output in cell.outputs)
        for cell in book.cells
    ]
    assert "3 trials of up to 4 epochs" in shown[1] and "best" in shown[1]  # progress, and the result
    assert "<table" in shown[1] and "report.html" in shown[1]
    assert "test_resnet" in shown[2] and "<table" in shown[3] and "(3, 2)" in shown[4]
    assert "<td>light</td>" in shown[5] and "('dark', 'light')" in shown[6]
    assert (tmp_path / "results" / "book" / "model" / "model.onnx").exists()
    assert list((tmp_path / "results" / "book").glob("evaluation-other/evaluation.html"))


def test_arguments_are_flags_and_settings():
    given = {"data": Path("x"), "trials": 3, "image_size": 64, "label_columns": ["a", "b"], "drop_colour": True}
    flags = run_search.Flags(**api._arguments(run_search.Flags, given | {"space": None}))
    assert flags.data == "x" and flags.trials == 3 and flags.space is None
    assert flags.set == (("image_size=64", 'label_columns=["a", "b"]', "drop_colour=true"),)
    assert api._flag({"pneumonia": 0.02}) == ("pneumonia=0.02",)


def test_wrong_arguments_are_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no such setting; did you mean image_size\?"):
        api.search("images", imagesize=3)
    with pytest.raises(InputError, match="no such file"):
        api.train_final(tmp_path / "nothing")
    assert sys.modules["tuning.search"].__class__ is api.CommandModule
