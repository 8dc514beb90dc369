"""The model card says what is known, says what isn't, and shows names as text."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from runs import make_audit, make_run

from tuning.data.decoding import decode
from tuning.model.card import _onnx_code, card, plain
from tuning.record.tables import read_table
from tuning.settings.config import SearchPlan

ODD = "<script>alert(1)</script>"
INTERVAL = [0.5, 0.9]


def figures(*names):
    return {name: 0.75 for name in names} | {f"{name}_95": INTERVAL for name in names}


def make_model(folder, classes, **changes):
    """A model folder's two documents, as train_final.py writes them."""
    folder.mkdir(exist_ok=True)
    config = {
        "config": {"backbone": "test_resnet", "image_size": 32},
        "classes": list(classes),
        "temperature": 1.2,
        "preprocessing": {"fit": "squash", "drop_colour": False},
        "provenance": {"fingerprint": "f" * 64},
        "onnx": {"inputs": {"images": ["batch", 3, 32, 32]}},
    }
    tested = figures("accuracy", "balanced_accuracy", "auroc") | {"loss": 0.6, "images": 40, "groups": 20}
    tested |= {"calibration_error": 0.04, "calibration_error_untempered": 0.09}
    tested["classes"] = {name: figures("sensitivity", "specificity", "auroc", "auprc", "f1") for name in classes}
    metrics = {
        "trained_on": "train",
        "verdict": "winner",
        "temperature": {"value": 1.2, "fitted_on": "validation"},
        "test_reading": {"number": 1},
        "test": tested,
        "onnx": {"largest_difference": 3e-7, "images": 40},
    } | changes
    (folder / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def provenance(**more):
    return {"run": "run", "settings": SearchPlan(name="run").model_dump(), "fingerprint": "f" * 64} | more


def test_a_whole_run(tmp_path):
    run = make_run(tmp_path / "run", trials=12)
    make_audit(run, ("secret/patient 1.png", "secret/patient 2.png"), rows=3)
    model = make_model(run / "model", ["normal", "pneumonia"])
    known = provenance(verdict="winner", why="it beats the default t00000")
    told = card(model, run, known, read_table(run / "samples.parquet"), read_table(run / "audit.parquet"))
    assert "winner: it beats the default t00000." in told and "12 trials (" in told
    assert "| normal | 12 | 4 | 4 |" in told and "| all | 24 | 8 | 8 |" in told
    assert "- stop: exact\\_duplicate: 3" in told.replace("duplicate\\_across\\_splits", "exact\\_duplicate")
    moved = read_table(run / "audit.parquet").assign(detail="the same pixels; moved: a.png from train to test")
    assert ": 3, of which 3 were resolved by" in card(model, run, known, read_table(run / "samples.parquet"), moved)
    assert "fine-tuned on 24 images" in told and "secret" not in told  # no file's name
    assert "| accuracy | 0.750 | 0.500 to 0.900 |" in told and "0.040 (0.090 without temperature scaling)" in told
    assert "`learning_rate`: 1e-05 to 0.1, log" in told and "Not a medical device" in told
    assert "with each group as one observation" in told
    assert "The test set is small (20 groups)" in told and "was evaluated before" not in told


def test_without_a_run_it_says_what_is_not_known(tmp_path):
    samples = read_table(make_run(tmp_path / "run", trials=3) / "samples.parquet")
    model = make_model(tmp_path / "model", ["normal", "pneumonia"], test=None, test_reading=None, verdict=None)
    told = card(model, tmp_path / "nowhere", provenance(), samples, None)
    for words in ("What was run is unknown", "## Verdict\n\nUnknown.", "have no audit", "no test images"):
        assert words in told
    model = make_model(tmp_path / "model", ["a", "b"], test_reading={"number": 3}, onnx={"error": "ValueError: <b>"})
    final_settings = {"final_data": "train+val", "epochs": 3}
    told = card(model, tmp_path / "nowhere", provenance(changed=True, final_settings=final_settings), samples, None)
    assert "\nsettings:\n  final_data: train+val\n`" in told and "trials of up to 10 epochs" in told
    assert "differs from the search's" in told
    assert "`model.onnx` was not exported: ValueError: &lt;b&gt;." in told and "was evaluated before" in told


def test_names_are_text(tmp_path):
    classes = [ODD, "a | b\n# c", "`d` *e* [f](g) 😷"]
    run = make_run(tmp_path / "run", trials=3, classes=tuple(classes))
    told = card(make_model(run / "model", classes), run, provenance(), read_table(run / "samples.parquet"), None)
    assert "<script" not in told and told.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 3
    (row,) = (line for line in told.splitlines() if line.startswith("| a \\| b\\\\n# c | 12"))
    assert row.replace("\\|", "").count("|") == 5
    assert "\\`d\\` \\*e\\* \\[f\\](g) 😷" in told


def test_many_classes_are_counted(tmp_path):
    classes = [f"class {number}" for number in range(40)]
    run = make_run(tmp_path / "run", trials=3, classes=tuple(classes))
    told = card(make_model(run / "model", classes), run, provenance(), read_table(run / "samples.parquet"), None)
    assert "Image classifier (40 classes)" in told and "class 7" not in told and len(told) < 9000


@given(st.text())
def test_plain_text_is_one_line_without_signs_that_act(value):
    told = plain(value)
    assert len((told + ".").splitlines()) == 1 or not told.isprintable()
    assert "<" not in told and ">" not in told
    for sign in "`*_[]|~$":
        assert told.count(sign) == told.count("\\" + sign)


@pytest.mark.parametrize("empty", [True, False])
def test_an_audit_that_found_nothing(tmp_path, empty):
    run = make_run(tmp_path / "run", trials=3)
    rows = pd.DataFrame(columns=["finding", "severity", "path_a", "path_b", "value", "p_value", "detail"])
    if not empty:
        rows.loc[0] = ["shortcut_shape", "warn", None, None, 0.99, 0.005, "a non-square shape predicts covid"]
    model = make_model(run / "model", ["normal", "pneumonia"])
    told = card(model, run, provenance(), read_table(run / "samples.parquet"), rows)
    assert ("No findings" in told) is empty
    assert ("The class can be predicted from shape alone" in told) is not empty


@pytest.mark.parametrize("drop_colour", [False, True])
@pytest.mark.parametrize("fit", ["squash", "crop", "letterbox"])
def test_the_code_for_the_onnx_file_sees_what_predict_sees(tmp_path, fit, drop_colour):
    shaping = {"preprocessing": {"fit": fit, "drop_colour": drop_colour}}
    code = _onnx_code(shaping | {"onnx": {"inputs": {"images": ["batch", 3, 32, 32]}}})
    found = {}
    exec(code.partition("\n\n\ninputs = ")[0].replace("import onnxruntime", ""), found)
    rng = np.random.default_rng(0)
    grey = np.repeat(rng.integers(0, 250, (45, 67, 1), dtype=np.uint8), 3, axis=2)
    colour = np.kron(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8), np.ones((20, 15, 1), np.uint8))
    for name, array, mode in (
        ("colour.jpg", colour, "RGB"),  # large enough to be decoded smaller
        ("film.jpg", colour[..., 0], "L"),
        ("tall.png", colour.transpose(1, 0, 2), "RGB"),
        ("rounded.png", grey + rng.integers(0, 4, grey.shape, dtype=np.uint8), "RGB"),
        ("opaque.png", grey, "RGBA"),
        ("palette.png", colour, "P"),
    ):
        Image.fromarray(array).convert(mode).save(tmp_path / name)
        seen, _ = decode(str(tmp_path / name), 32, fit=fit, drop_colour=drop_colour)
        expected = np.repeat(seen[..., None], 3, axis=2) if seen.ndim == 2 else seen
        given = found["pixels"](tmp_path / name, 32)
        assert given.shape == (1, 3, 32, 32) and given.dtype == np.float32
        assert np.array_equal(np.round(given[0].transpose(1, 2, 0) * 255), expected), name
