import csv
import io
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from shared import draw_folder

from tuning.model.folder import load_model, save_ensemble, save_model
from tuning.model_folder import main, named_images
from tuning.record import storage
from tuning.settings.config import InputError, TrialConfig
from tuning.training import backbones

CONFIG = TrialConfig(backbone="test_resnet", image_size=32, seed=5)


@pytest.fixture
def network():
    built = backbones.build("test_resnet", classes=2, image_size=32, head_dropout=0.3, seed=5, weights=None)
    with torch.no_grad():
        built.get_classifier()[1].weight.mul_(50)
    return built.eval()


def test_a_saved_model_predicts_the_same_from_anywhere(tmp_path, network):
    save_model(tmp_path / "model", network, CONFIG, ["dark", "light"], provenance={"trial_id": "t00001"})
    (tmp_path / "model").rename(tmp_path / "moved")
    files = sorted(draw_folder(tmp_path / "images", count=3).rglob("*.png"))
    model = load_model(tmp_path / "moved")
    assert model.classes == ("dark", "light") and model.config == CONFIG
    assert model.predict([]).shape == (0, 2)
    together = model.predict(files)
    assert together.shape == (6, 2)
    assert together.sum(axis=1) == pytest.approx(1.0)
    alone = np.concatenate([model.predict(file) for file in files])  # one of them may be given by itself
    assert np.allclose(together, alone, atol=1e-6)
    again = load_model(tmp_path / "moved")
    assert np.array_equal(again.predict(files), together)
    modes = {path.stat().st_mode for path in (tmp_path / "moved").iterdir()}
    assert len(modes) == 1  # whoever may read what the model is may read its weights


def test_a_model_predicts_with_the_fit_that_it_was_trained_with(tmp_path, network):
    rng = np.random.default_rng(0)
    wide = rng.integers(0, 256, (16, 32, 3), dtype=np.uint8)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    boxed = np.zeros((32, 32), np.uint8)
    boxed[8:24] = np.asarray(Image.fromarray(wide).convert("L"))
    Image.fromarray(boxed).save(tmp_path / "boxed.png")
    save_model(tmp_path / "plain", network, CONFIG, ["dark", "light"])
    save_model(tmp_path / "boxing", network, CONFIG, ["dark", "light"], fit="letterbox", drop_colour=True)
    plain, boxing = load_model(tmp_path / "plain"), load_model(tmp_path / "boxing")
    by_hand, itself = plain.predict([tmp_path / "boxed.png"]), boxing.predict([tmp_path / "wide.png"])
    assert np.allclose(by_hand, itself) and not np.allclose(plain.predict([tmp_path / "wide.png"]), itself)

    config = tmp_path / "boxing" / "config.yaml"
    config.write_text(config.read_text().replace("fit: letterbox", "fit: fold"))
    with pytest.raises(InputError, match="'squash', 'crop' or 'letterbox'"):
        load_model(tmp_path / "boxing")


def test_unreadable_images_are_named_together(tmp_path, network):
    save_model(tmp_path / "model", network, CONFIG, ["dark", "light"])
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(InputError) as caught:
        load_model(tmp_path / "model").predict([tmp_path / "text.png", tmp_path / "nowhere.png"])
    assert len(caught.value.faults) == 2


@pytest.mark.parametrize("name", ["..", ".", "../other", "/etc", "a/b", "a\\b", "", "C:", 3])
def test_an_ensemble_of_folders_elsewhere_is_refused(tmp_path, name):
    save_ensemble(tmp_path, {name: 1.0}, ["a", "b"], 1.0)
    with pytest.raises(InputError, match="must name subfolders of the model folder, got"):
        load_model(tmp_path)


def test_what_is_no_model_folder_is_refused(tmp_path):
    for document in (
        None,
        "[1, 2]",
        "config: {backbone: test_resnet, speed: 3}\nclasses: [a, b]",
        "a: [",
        "classes: 3",
    ):
        if document is not None:
            (tmp_path / "config.yaml").write_text(document)
        with pytest.raises(InputError):
            load_model(tmp_path)


def predict(monkeypatch, capfd, *words):
    """The command in this process: its exit code, what it printed, what it told."""
    monkeypatch.setattr("sys.argv", ["model_folder.py", "predict", *map(str, words)])
    code = main()
    sys.stdout.flush()
    return code, *capfd.readouterr()


NAMES = [
    "a \"quoted\", 'name'.png",
    "😷.png",
    "two\nlines.png",
    "-dash.png",
    "[1].png",
    "<script>1.png",
]
CLASSES = ["<script>alert(1)</script>", "a, \"b\" 'c'\nd 😷"]


@pytest.fixture
def named(tmp_path, network, monkeypatch):
    """A model whose classes, and images whose files, have names that need care; the working folder is theirs."""
    save_model(tmp_path / "model", network, CONFIG, CLASSES)
    (tmp_path / "films" / "more" / ".hidden").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (len(NAMES), 32, 32), dtype=np.uint8)
    for name, values in zip(NAMES, pixels, strict=True):
        Image.fromarray(values).save(tmp_path / "films" / name)
    for name in ("more/x.PNG", "more/IM0001", "more/.hidden/y.png", ".z.png"):
        Image.fromarray(pixels[0]).save(tmp_path / "films" / name, "PNG")
    (tmp_path / "films" / "notes.txt").write_text("no image")
    monkeypatch.chdir(tmp_path / "films")
    return tmp_path / "model"


@pytest.mark.parametrize("copies", [1, 2000])
def test_what_reads_the_rows_may_end_first(named, tmp_path, monkeypatch, capfd, copies):
    """As `predict ... | head`, whether the rows wait in a buffer or not."""
    for number in range(copies if copies > 1 else 0):
        os.link("[1].png", f"{number}.png")
    monkeypatch.setattr(
        "tuning.model_folder._predict_readable", lambda model, files, notes: ([(np.ones(2), False)] * len(files), [])
    )
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr("sys.argv", ["model_folder.py", "predict", str(named), "."])
        assert main() == 0
    assert "error" not in capfd.readouterr().err


def test_names_come_through_csv_and_parquet(named, tmp_path, monkeypatch, capfd):
    code, said, told = predict(monkeypatch, capfd, named, *NAMES)
    assert (code, told) == (0, "")
    rows = list(csv.DictReader(io.StringIO(said, newline="")))
    assert [row["path"] for row in rows] == NAMES
    assert list(rows[0]) == ["path", "predicted", *(f"probability_{name}" for name in CLASSES)]
    for suffix in ("csv", "parquet"):
        out = tmp_path / f"out.{suffix}"
        code, said, told = predict(monkeypatch, capfd, named, *NAMES, "--out", out)
        assert (code, said, told) == (0, f"written: {out}, 6 images\n", "")
        table = pd.read_csv(out) if suffix == "csv" else pd.read_parquet(out)
        assert list(table["path"]) == NAMES and list(table) == list(rows[0]) and set(table["predicted"]) <= set(CLASSES)
        assert np.allclose(table.iloc[:, 2:].sum(axis=1), 1, atol=1e-5)


def test_folders_and_globs(named, tmp_path, monkeypatch, capfd):
    def paths(*words):
        code, said, _ = predict(monkeypatch, capfd, named, *words)
        assert code == 0
        return [row["path"] for row in csv.DictReader(io.StringIO(said, newline=""))]

    everything = sorted([*NAMES, "more/x.PNG", "more/IM0001"])
    assert sorted(paths(".")) == everything
    assert sorted(paths(tmp_path / "films")) == [str(tmp_path / "films" / name) for name in everything]
    assert sorted(paths("*.png")) == sorted(NAMES)
    assert paths("more/*", "more") == ["more/IM0001", "more/x.PNG"] and paths("**/*.PNG") == ["more/x.PNG"]
    assert paths("[1].png", "--", "-dash.png") == ["[1].png", "-dash.png"]


def test_a_folder_is_read_as_one_of_training_images(named, tmp_path, monkeypatch, capfd):
    """Links are followed, and what training leaves out is left out, with a line."""
    films, inside = tmp_path / "films", tmp_path / "inside"
    for name in ("masks", "thumbnails"):
        (inside / name).mkdir(parents=True)
    for name in ("a.png", "a_mask.png", "masks/a.png", "thumbnails/a.png"):
        (inside / name).write_bytes((films / "[1].png").read_bytes())
    (inside / "patient").symlink_to(films / "more")
    (inside / "patient" / "again").symlink_to(inside)  # a circle
    code, said, told = predict(monkeypatch, capfd, named, inside)
    rows = list(csv.DictReader(io.StringIO(said, newline="")))
    assert code == 0 and [row["path"] for row in rows] == [
        f"{inside}/{name}" for name in ("a.png", "patient/IM0001", "patient/x.PNG")
    ]
    assert f"{inside}: left out: 2 files (masks), such as a_mask.png\n" in told
    assert f"{inside}: left out: 1 file (thumbnails), such as a.png\n" in told


def test_a_folder_that_cannot_be_listed_is_told(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root lists every folder")
    (tmp_path / "locked").mkdir(mode=0o000)
    _, faults = named_images([str(tmp_path)])
    assert any("locked: can't be listed" in fault for fault in faults)


def test_unreadable_files_are_told_and_the_rest_is_written(named, tmp_path, monkeypatch, capfd):
    for number in range(2):
        (tmp_path / "films" / f"broken{number}.png").write_text("no image")
    code, said, told = predict(
        monkeypatch, capfd, named, "broken0.png", ".", "nowhere.png", "no*match", "--out", "o.csv"
    )
    assert (code, said) == (2, "written: o.csv, 8 images\n")
    assert ".: left out: 1 file (no images), such as notes.txt\n" in told
    assert len(pd.read_csv("o.csv")) == len(NAMES) + 2
    for name in ("broken0.png", "broken1.png", "nowhere.png", "no*match"):
        assert told.count(f"error: {name}: ") == 1


@pytest.mark.slow
def test_a_model_and_images_in_a_storage(named, bucket, tmp_path, monkeypatch, capfd):
    """What train_final.py says to type next for a run in a storage."""
    for folder, place in ((named, f"{bucket}/xray/model"), (tmp_path / "films", f"{bucket}/films")):
        for file in folder.iterdir():
            if file.is_file() and "\n" not in file.name:  # S3 takes none
                storage.write_bytes(f"{place}/{file.name}", file.read_bytes())
    before = storage.files_below(bucket)
    _, here, _ = predict(monkeypatch, capfd, named, "[1].png", "😷.png")
    one, there = f"{bucket}/films/[1].png", f"{bucket}/xray/model"
    code, said, told = predict(monkeypatch, capfd, there, one, "😷.png")
    assert (code, told) == (0, "") and said == here.replace("[1].png", one)
    code, said, told = predict(monkeypatch, capfd, there, f"{bucket}/films/", f"{bucket}/nowhere")
    assert code == 2 and f"error: {bucket}/nowhere: is neither an image nor a folder of images" in told
    rows = list(csv.DictReader(io.StringIO(said, newline="")))
    assert sorted(row["path"] for row in rows) == sorted(f"{bucket}/films/{name}" for name in NAMES if "\n" not in name)
    code, _, told = predict(monkeypatch, capfd, f"{bucket}/xray/none", one)
    assert code == 2 and f"{bucket}/xray/none/config.yaml: can't be read" in told  # not the copy's name
    assert storage.files_below(bucket) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "at least one image"),
        (["nowhere"], "nowhere: no such file"),
        (["😷.png", "--out", "table.xlsx"], "--out: must end in"),
        (["😷.png", "--out", "nowhere/table.csv"], "can't be written"),
        (["😷.png", "--out", "nowhere/table.parquet"], "can't be written"),
    ],
)
def test_what_predict_refuses(named, monkeypatch, capfd, words, said):
    code, printed, told = predict(monkeypatch, capfd, named, *words)
    assert code == 2 and said in told and not printed


def test_a_name_that_is_not_unicode(named, monkeypatch, capfd):
    odd = os.fsdecode(b"caf\xe9.png")
    os.rename("😷.png", odd)
    assert predict(monkeypatch, capfd, named, odd, "--out", "t.csv")[0] == 0
    assert b"caf\xe9.png" in Path("t.csv").read_bytes()
    assert predict(monkeypatch, capfd, named, odd, "--out", "t.parquet")[0] == 0
    assert list(pd.read_parquet("t.parquet")["path"]) == ["caf\N{REPLACEMENT CHARACTER}.png"]
