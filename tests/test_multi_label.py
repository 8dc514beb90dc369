"""From a manifest with several labels to a tested model, and to another hospital's images."""

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import timm
import torch
import yaml
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch.nn import functional

from tuning import evaluate, train_final
from tuning.model.folder import load_model
from tuning.record.tables import read_table
from tuning.record.targets import encoded

ROOT = Path(__file__).parent.parent
LABELS = ("haze", "line", "spot")
SHARES = (0.4, 0.3, 0.2)
pytestmark = pytest.mark.slow


def planted(folder, count, *, seed=0, side=32, level=90.0):
    """Films with a spot, a line and haze on the left, each there or not by itself; returns which are there."""
    rng = np.random.default_rng(seed)
    truth = (rng.random((count, 3)) < SHARES).astype(int)
    rows, columns = np.mgrid[:side, :side] / side
    folder.mkdir(parents=True, exist_ok=True)
    for number, (haze, line, spot) in enumerate(truth):
        pixels = rng.normal(level, 28, (side, side)) + rng.normal(0, 8) * (columns < 0.5)
        pixels += 25 * haze * (columns < 0.5)
        pixels += 22 * line * (np.abs(rows - rng.uniform(0.2, 0.8)) < 0.07)
        x, y = rng.uniform(0.25, 0.75, 2)
        pixels += 45 * spot * ((rows - y) ** 2 + (columns - x) ** 2 < 0.012)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:04d}.png")
    return truth


def write_lists(folder, truth, *, header="path,label,patient"):
    lines = [header]
    for number, row in enumerate(truth):
        there = "|".join(name for name, yes in zip(LABELS, row, strict=True) if yes) or "No Finding"
        lines.append(f"{number:04d}.png,{there},p{number // 2}")
    (folder / "films.csv").write_text("\n".join(lines) + "\n")
    return folder / "films.csv"


SPACE = {
    "parameters": {"learning_rate": {"type": "float", "low": 1e-3, "high": 1e-2, "log": True}},
    "fixed": {"backbone": "test_resnet", "image_size": 32, "batch_size": 16, "unfreeze_depth": 5}
    | {"augmentation": "none"},
    "start": [{"learning_rate": 4e-3}],
    "search": {"trials": 2, "epochs": 12, "weights": "random", "finalists": 0, "patience": 12, "grace_epochs": 6},
}


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A finished search on films of three labels: its folder, its output, and the films."""
    place = tmp_path_factory.mktemp("several")
    truth = planted(place / "films", 900)
    write_lists(place / "films", truth)
    (place / "space.yaml").write_text(yaml.safe_dump(SPACE))
    arguments = ["--data", "films/films.csv", "--space", "space.yaml", "--name", "run"]
    pairs = ["multi_label=true", "group_column=patient"]
    command = [sys.executable, str(ROOT / "tuning" / "run_search.py"), *arguments, "--set", *pairs]
    ran = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return place / "results" / "run", ran.stdout, place / "films"


@pytest.fixture(scope="module")
def model(searched):
    return train_final.run(train_final.Flags(str(searched[0]), prevalence=("spot=0.05",)))


def plain_loop(config, samples, classes):
    """Test AUROC of each label by a plain PyTorch loop with a configuration of the search."""
    torch.manual_seed(0)
    pixels = np.stack([np.asarray(Image.open(file), dtype=np.float32) for file in samples["file"]]) / 255
    targets = torch.from_numpy(encoded(samples["label"], classes)).float()
    images = torch.from_numpy(pixels)[:, None].repeat(1, 3, 1, 1)
    train = np.flatnonzero(samples["split"] == "train")
    test = np.flatnonzero(samples["split"] == "test")
    network = timm.create_model(config["backbone"], num_classes=len(classes))
    mean, std = (torch.tensor(network.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    images = (images - mean) / std
    optimizer = torch.optim.AdamW(network.parameters(), lr=config["learning_rate"], weight_decay=0.01)
    size, epochs = config["batch_size"], config["epochs"]
    steps = epochs * (len(train) // size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        network.train()
        for batch in torch.from_numpy(np.random.default_rng(0).permutation(train)).split(size)[: len(train) // size]:
            optimizer.zero_grad()
            functional.binary_cross_entropy_with_logits(network(images[batch]), targets[batch]).backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        logits = network(images[test]).numpy()
    return np.array([roc_auc_score(targets[test, place], logits[:, place]) for place in range(len(classes))])


def test_the_search_and_its_model_see_each_label(searched, model):
    run, said, _ = searched
    trials = read_table(run / "trials.parquet")
    assert trials["val_auroc"].max() > 0.9 and "tells the classes apart" in said
    for line in ("spot:", "no label:", "'No Finding' means that no label applies", "mean probability of a label"):
        assert line in said
    metrics = json.loads((model / "metrics.json").read_text())
    tested = metrics["test"]
    assert set(tested["classes"]) == set(LABELS)
    assert len(metrics["temperature"]["value"]) == 3 and tested["auroc_95"][0] <= tested["auroc"]
    point = next(each for each in tested["operating_points"] if each["class"] == "spot")
    assert point["prevalence"] == 0.05 and point["npv"] > 0.9
    samples = read_table(run / "samples.parquet")
    config = yaml.safe_load((run / "best.yaml").read_text())
    plain = plain_loop(config, samples, LABELS)
    assert tested["auroc"] >= plain.mean() - 0.01
    card = (model / "README.md").read_text()
    assert "an image may have several, or none" in card and "| no label |" in card
    assert "no label" in (run / "report.html").read_text()
    for name in ("confusion.png", "roc.png", "calibration.png", "mistakes.html"):
        assert (model / name).stat().st_size > 1000


def test_the_model_predicts_each_label_by_itself_also_by_onnx(searched, model, tmp_path):
    films = sorted(searched[2].glob("*.png"))[:40]
    loaded = load_model(model)
    found = loaded.predict(films)
    assert loaded.multi_label and found.shape == (40, 3) and not np.allclose(found.sum(axis=1), 1)
    pixels = np.stack([np.asarray(Image.open(file), dtype=np.float32) for file in films]) / 255
    session = onnxruntime.InferenceSession(model / "model.onnx")
    (by_onnx,) = session.run(["probabilities"], {"images": np.repeat(pixels[:, None], 3, axis=1)})
    assert np.abs(by_onnx - found).max() < 1e-3
    table = tmp_path / "table.csv"
    command = [sys.executable, str(ROOT / "tuning" / "model_folder.py"), "predict", str(model), str(searched[2])]
    subprocess.run([*command, "--out", str(table)], check=True, capture_output=True)
    with table.open() as stream:
        rows = list(csv.DictReader(stream))
    for row in rows[:40]:
        assert row["predicted"] == "|".join(name for name in LABELS if float(row[f"probability_{name}"]) > 0.5)
    tested = read_table(model / "predictions.parquet")
    probabilities = tested[[f"probability_{name}" for name in LABELS]].to_numpy()
    targets = encoded(tested["label"], LABELS)
    metrics = json.loads((model / "metrics.json").read_text())["test"]
    areas = [roc_auc_score(targets[:, place], probabilities[:, place]) for place in range(3)]
    assert metrics["auroc"] == pytest.approx(np.mean(areas))


def test_another_hospital_with_fewer_labels_and_other_names(searched, model, tmp_path, capsys):
    truth = planted(tmp_path / "other", 120, seed=7, level=120.0)
    rows = [
        (f"{number:04d}.png", *marks[1:], -1 if number % 20 == 0 else marks[0]) for number, marks in enumerate(truth)
    ]
    pd.DataFrame(rows, columns=["path", "line", "nodule", "pneumothorax"]).to_csv(
        tmp_path / "other" / "films.csv", index=False
    )
    flags = evaluate.Flags(
        str(model), str(tmp_path / "other" / "films.csv"), out=str(tmp_path), rename=("nodule=spot",)
    )
    place = evaluate.run(flags)
    said = capsys.readouterr().out
    assert "not evaluated: labels that the model lacks: pneumothorax" in said
    assert "unknown in all images: haze" in said
    here = json.loads((place / "metrics.json").read_text())["evaluation"]
    assert here["classes"]["haze"]["unknown"] == 120 and here["classes"]["haze"]["auroc"] is None
    assert here["classes"]["spot"]["images"] == truth[:, 2].sum() and here["classes"]["spot"]["auroc"] > 0.8
    assert (place / "evaluation.html").stat().st_size > 1000
    single = tmp_path / "folders"
    for name in ("spot", "line"):
        planted(single / name, 4)
    with pytest.raises(evaluate.InputError, match="multi_label needs a manifest"):
        evaluate.run(evaluate.Flags(str(model), str(single), out=str(tmp_path)))


def test_unknown_labels_are_masked_in_training_and_figures(tmp_path):
    """A label that is unknown in all images of a set leaves its output as it was; the others are learnt."""
    from tuning.data.samples import load_samples
    from tuning.settings.config import TrialConfig
    from tuning.training import backbones
    from tuning.training.dataset import join
    from tuning.training.finetune import finetune

    truth = planted(tmp_path / "films", 120)
    unknown = np.random.default_rng(1).random(truth.shape) < 0.2
    cells = np.where(unknown, -1, truth)
    pd.DataFrame(cells, columns=list(LABELS)).assign(path=[f"{n:04d}.png" for n in range(120)]).to_csv(
        tmp_path / "films" / "films.csv", index=False
    )
    samples = load_samples(str(tmp_path / "films" / "films.csv"), multi_label=True)
    images = np.stack([np.asarray(Image.open(file))[..., None] for file in samples["file"]])
    data = join(samples, images)
    assert (data.labels == -1).mean() == pytest.approx(unknown.mean(), abs=0.02)
    config = TrialConfig(backbone="test_resnet", unfreeze_depth=1, image_size=32, batch_size=16, epochs=2)
    given = {"device": torch.device("cpu"), "weights": None}
    rows = [row for row, _ in finetune(config, data, **given)]
    assert all(0 < row["val_loss"] < 2 and row["val_auroc"] is not None for row in rows)
    hidden = data.labels.copy()
    hidden[data.train, 1] = -1
    for row, snapshot in finetune(config, dataclasses.replace(data, labels=hidden), **given):  # noqa: B007
        pass
    fresh = backbones.build("test_resnet", classes=3, image_size=32, head_dropout=0.0, seed=0, weights=None)
    name = f"{backbones.classifier_name(fresh)}.1.bias"
    change = (snapshot().tensors[f"model/{name}"] - fresh.state_dict()[name]).abs()
    assert change[1] == 0 and (change[[0, 2]] > 0).all()
    balanced = config.model_copy(update={"class_weighting": "balanced", "label_smoothing": 0.1})
    assert all(np.isfinite(row["train_loss"]) for row, _ in finetune(balanced, data, **given))
