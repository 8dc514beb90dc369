"""From a best.yaml to a tested model, with the search's own tables beside it."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from runs import given_by_ray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shared import draw_folder

from tuning import train_final
from tuning.checks.audit import load_checked
from tuning.data import phantoms
from tuning.insight.best import config_digest
from tuning.insight.ensemble import Offer
from tuning.model.folder import Ensemble, load_model
from tuning.model_folder import Predict
from tuning.model_folder import run as predict
from tuning.record.journal import Journal, best_epoch, read_journal, read_record
from tuning.record.predictions import read_predictions
from tuning.record.tables import SAMPLES, make_tables, read_table, write_tables
from tuning.record.temperature import logarithms, tempered
from tuning.search.plans import write_run
from tuning.search.trainable import FinetuneTrial
from tuning.settings.config import InputError, SearchPlan, TrialConfig
from tuning.settings.space_file import parse
from tuning.show.plots import PLOTS
from tuning.train_final import Flags

run = partial(train_final.run, onnx=False)  # which takes five seconds of a core
WRITTEN = {"config.yaml", "metrics.json", "predictions.parquet", "known_images.parquet", "README.md"}
WRITTEN |= {"familiar.npz", "conformal.parquet", "reporting.md"}
WRITTEN |= {"mistakes.html", *PLOTS}
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


def make_best(run, folder):
    """A run's folder with nothing but what a search begins with, and a best.yaml."""
    plan = SearchPlan(name="run", data=None if folder is None else str(folder), weights="random")
    checked = load_checked(plan, [32])
    space = parse({"fixed": {"backbone": "test_resnet"}, "parameters": {}}, "test")
    write_run(run, plan, space, checked.samples, checked.audit, checked.fingerprint)
    provenance = {"run": "run", "trial_id": "t00000", "fingerprint": checked.fingerprint, "settings": plan.model_dump()}
    provenance["config_sha256"] = config_digest(CONFIG.model_dump())
    (run / "best.yaml").write_text(yaml.safe_dump(CONFIG.model_dump() | {"provenance": provenance}))
    return run


@pytest.fixture
def best(tmp_path, folder):
    return make_best(tmp_path / "run", folder)


def test_train_test_predict(best, folder, tmp_path):
    model = run(Flags(str(best)))
    assert {path.name for path in model.iterdir()} == {"model.safetensors", *WRITTEN}
    metrics = json.loads((model / "metrics.json").read_text())
    tested = metrics["test"]
    assert tested["images"] == 12 and tested["accuracy"] > 0.9
    assert tested["accuracy_95"][0] < tested["accuracy"] <= tested["accuracy_95"][1]
    assert metrics["trained_on"] == "train" and metrics["test_reading"]["number"] == 1
    temperature = metrics["temperature"]
    assert temperature["fitted_on"] == "validation" and temperature["value"] != 1
    assert yaml.safe_load((model / "config.yaml").read_text())["temperature"] == temperature["value"]
    assert set(tested["classes"]) == {"dark", "light"}
    assert np.sum(tested["confusion"]["counts"]) == 12
    table = read_table(model / "predictions.parquet")
    assert list(table) == ["path", "label", "split", "probability_dark", "probability_light"]
    assert set(table["split"]) == {"test"} and len(table) == 12
    right = (table["probability_dark"] > 0.5) == (table["label"] == "dark")
    assert right.mean() == tested["accuracy"]
    card = (model / "README.md").read_text()
    assert f"| accuracy | {tested['accuracy']:.3f} |" in card.replace("| 1 |", "| 1.000 |") and "Not a medical" in card
    with pytest.raises(InputError, match="the test set is to be read once"):
        run(Flags(str(best)))


def test_classes_that_can_not_be_ruled_out_and_images_unlike_all_others(best, folder, tmp_path, capsys):
    model = run(Flags(str(best)))
    stripes = np.zeros((40, 40, 3), dtype=np.uint8)
    stripes[::2, :, 0] = stripes[:, ::3, 1] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    out = tmp_path / "table.parquet"
    predict(Predict(str(model), (str(folder), str(tmp_path / "stripes.png")), out=str(out), sets=0.9))
    table = pd.read_parquet(out)
    assert list(table)[-2:] == ["set", "unlike_training"] and len(table) == 61
    films = table[:-1]
    labels = [Path(path).parent.name for path in films["path"]]
    assert np.mean([label in row.split("|") for label, row in zip(labels, films["set"], strict=True)]) >= 0.9
    assert table["unlike_training"].iloc[-1] and films["unlike_training"].mean() < 0.25
    assert "unlike those that the model was made from" in capsys.readouterr().err
    with pytest.raises(InputError, match="--sets 2: must be a share"):
        predict(Predict(str(model), (str(folder),), sets=2.0))
    (model / "conformal.parquet").unlink()
    with pytest.raises(InputError, match=r"has no conformal\.parquet"):
        predict(Predict(str(model), (str(folder),), sets=0.9))


@pytest.mark.slow
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
        (lambda path: path.write_text("backbone: test_resnet"), "provenance must be a mapping"),
        (lambda path: path.write_text("[1"), "best.yaml: line 1, column 3: not valid YAML"),
        (lambda path: path.write_text(path.read_text().replace("backbone: ", "backbon: ")), "backbon"),
        (lambda path: path.write_text(path.read_text().replace("fingerprint: ", "fingerprint: x")), "data has changed"),
    ],
)
def test_bad_input(best, change, said):
    change(best / "best.yaml")
    with pytest.raises(InputError, match=said):
        run(Flags(str(best)))
    assert not (best / "model").exists()


def metrics_of(model):
    return json.loads((model / "metrics.json").read_text())


TRIALS = ({}, {"unfreeze_depth": 3, "augmentation": "light"}, {"learning_rate": 1e-3, "augmentation": "medium"})


@pytest.fixture(scope="module")
def whole(tmp_path_factory, folder):
    """A run as a search of three trials leaves it, with two finalists of the first; best.yaml names the first."""
    best = make_best(tmp_path_factory.mktemp("whole") / "run", folder)
    provenance = yaml.safe_load((best / "best.yaml").read_text())["provenance"]
    plan = SearchPlan(**provenance["settings"])
    _, folders, *_ = load_checked(plan, [32])
    journal = Journal(best / "journal.jsonl")
    configs = {f"t0000{number}": CONFIG.model_copy(update=values) for number, values in enumerate(TRIALS)}
    configs |= {f"f0000{number}": CONFIG.model_copy(update={"seed": 1 + number}) for number in range(2)}
    trial = None
    for number, (trial_id, config) in enumerate(configs.items()):
        origin = "finalist" if trial_id.startswith("f") else "suggested"
        named = {"trial_id": trial_id, "origin": origin, "config": config.model_dump()}
        named |= {"number": None if origin == "finalist" else number}
        given = given_by_ray(best, folders[32], early_loss_epochs=[])
        journal.append("asked", params={}, **named)
        journal.append("started", trial_id=trial_id, gpus=0.0)
        if trial is None:
            trial = FinetuneTrial(given | named)
        else:
            trial.reset_config(given | named)
        for _ in range(config.epochs):
            row = json.loads(trial.step()["row"])
            row.pop("checkpoint")
            journal.append("epoch", trial_id=trial_id, **row)
        journal.append("ended", trial_id=trial_id, status="completed", reason="all epochs", error=None)
    trial.cleanup()
    journal.close()
    record = read_record(best / "journal.jsonl")
    write_tables(make_tables(record, "val_loss"), best)
    chosen = {"trial_id": "t00000", "best_epoch": dict(best_epoch(record.trials["t00000"].rows, "val_loss"))}
    chosen |= {"verdict": "winner", "best_epochs": [2, 4]}
    document = CONFIG.model_dump() | {"provenance": provenance | chosen}
    (best / "best.yaml").write_text(yaml.safe_dump(document))
    return best


@pytest.fixture
def searched(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.mark.slow
def test_a_second_evaluation_on_the_test_set_is_marked(best, capsys):
    first = metrics_of(run(Flags(str(best), set=(("epochs=1",),))))
    assert "evaluation number" not in capsys.readouterr().out
    (best / "model").rename(best / "before")
    second = metrics_of(run(Flags(str(best), set=(("epochs=1",),))))
    assert second["test_reading"]["number"] == 2 and second["test_reading"]["first_at"] == first["test_reading"]["at"]
    assert "evaluation number 2 on this test set" in capsys.readouterr().out
    assert first["test"] == second["test"]


@pytest.mark.slow
def test_generated_images_are_drawn_anew_where_they_are_not(tmp_path, cache):
    """As for results/example, whose samples name no place on a disk."""
    plan = SearchPlan(name="run", weights="random")
    checked = load_checked(plan, [32])
    best = make_best(tmp_path / "run", None)
    samples = checked.samples.assign(file=checked.samples["path"])
    write_tables({"samples": pa.Table.from_pandas(samples, schema=SAMPLES, preserve_index=False)}, best)
    model = run(Flags(str(best), set=(("epochs=1",),)))
    assert metrics_of(model)["test"]["images"] == 96 and (model / "mistakes.html").exists()
    (best / "model").rename(best / "before")
    document = yaml.safe_load((best / "best.yaml").read_text())
    document["provenance"]["fingerprint"] = "other"
    (best / "best.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(InputError, match=f"generated here by --data {cache}/phantoms-{phantoms.VERSION}$"):
        run(Flags(str(best)))


@pytest.mark.slow
def test_images_that_were_moved_are_the_same_data_and_weights_that_changed_are_refused(tmp_path):
    images = draw_folder(tmp_path / "images", count=15)
    best = make_best(tmp_path / "run", images)
    images.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"is missing; .* moved to by --data"):
        run(Flags(str(best)))
    path = best / "best.yaml"
    document = yaml.safe_load(path.read_text())
    document["provenance"] |= {"weights": {"test_resnet": "0" * 64}, "packages": {"timm": "0.9.0"}}
    path.write_text(yaml.safe_dump(document))
    moved = {"data": str(tmp_path / "moved")}
    with pytest.raises(InputError, match="the pretrained weights of test_resnet have changed since the search"):
        run(Flags(str(best), **moved, set=(("epochs=1",),)))
    run(Flags(str(best), **moved, set=(("epochs=1", "weights=random"),)))
    splits = read_table(best / "samples.parquet").set_index("path")["split"]
    tested = read_table(best / "model" / "predictions.parquet")
    assert set(tested["path"]) == set(splits.index[splits == "test"])


@pytest.mark.slow
def test_data_that_says_otherwise_of_the_searchs_images_is_other_data(tmp_path, capsys):
    images = draw_folder(tmp_path / "images", count=15)
    best = make_best(tmp_path / "run", images)
    more = draw_folder(tmp_path / "more", count=25)
    model = run(Flags(str(best), data=str(more), set=(("epochs=1",),)))
    said = capsys.readouterr().out
    assert "--data is used as other data, with splits of its own: " in said and " further images (" in said
    assert (
        metrics_of(model)["test"]["images"] > 6 and "configuration or data differs" in (model / "README.md").read_text()
    )
    first, second, *_ = sorted(images.iterdir())
    moved = next(first.iterdir())
    moved.rename(second / f"relabelled-{moved.name}")
    (best / "model").rename(best / "before")
    with pytest.raises(InputError, match=r"has changed since .*: 1 further image"):
        run(Flags(str(best)))


@pytest.mark.slow
def test_other_data_in_another_shape_is_another_test_set(best, tmp_path):
    run(Flags(str(best), set=(("epochs=1",),)))
    (best / "model").rename(best / "before")
    other = draw_folder(tmp_path / "other", count=15, side=44)
    model = run(Flags(str(best), data=str(other), set=(("epochs=1", "fit=letterbox", "drop_colour=true"),)))
    assert load_model(model).fit == "letterbox" and load_model(model).drop_colour
    assert metrics_of(model)["test_reading"]["number"] == 1


@pytest.mark.slow
def test_training_on_validation_too(searched, capsys):
    model = run(Flags(str(searched), set=(("final_data=train+val",),)))
    metrics = metrics_of(model)
    assert metrics["trained_on"] == "train+val" and metrics["validation"] is None and metrics["verdict"] == "winner"
    assert metrics["epochs"] == 3  # the median of 2 and 4
    assert "\n  final_data: train+val\n" in (model / "README.md").read_text()
    said = capsys.readouterr().out
    assert "epoch 3/6" in said and "epoch 4/6" not in said and "  val_loss" not in said
    fitted_on = metrics["temperature"]["fitted_on"]
    assert all(trial_id in fitted_on for trial_id in ("t00000", "f00000", "f00001")) and "t00001" not in fitted_on
    assert metrics["temperature"]["value"] != 1 and metrics["test"]["accuracy"] > 0.9


@pytest.mark.slow
def test_training_on_both_without_finalists_goes_to_the_trials_own_epoch(searched):
    document = yaml.safe_load((searched / "best.yaml").read_text())
    del document["provenance"]["best_epochs"]
    document["provenance"]["best_epoch"]["epoch"] = 2
    (searched / "best.yaml").write_text(yaml.safe_dump(document))
    metrics = metrics_of(run(Flags(str(searched), set=(("final_data=train+val", "learning_rate=1e-3"),))))
    assert metrics["epochs"] == 2
    assert metrics["temperature"] == {
        "value": 1.0,
        "fitted_on": None,
        "images": 0,
    }  # the search had no such learning rate


def test_training_on_both_to_no_known_epoch_is_refused(best):
    with pytest.raises(InputError, match="names no best epoch"):
        run(Flags(str(best), set=(("final_data=train+val",),)))


@pytest.mark.slow
def test_an_ensemble_of_kept_trials(searched, folder, capsys):
    model = run(Flags(str(searched), set=(("ensemble=true",),)))
    metrics = metrics_of(model)
    shares = metrics["ensemble"]
    assert sum(shares.values()) == pytest.approx(1) and 2 <= len(shares) <= 5 and len(set(shares.values())) == 1
    assert {path.name for path in model.iterdir()} == {*WRITTEN, *shares} - {"familiar.npz"}
    assert [(model / name / "familiar.npz").exists() for name in shares] == [True] + [False] * (len(shares) - 1)
    assert metrics["test"]["accuracy"] > 0.9 and metrics["test_reading"]["number"] == 1
    loaded = load_model(model)
    assert isinstance(loaded, Ensemble) and loaded.classes == ("dark", "light")
    samples = read_table(searched / "samples.parquet")
    validation = samples[samples["split"] == "val"]
    stored = read_predictions(searched, read_table(searched / "trials.parquet"), samples)
    wanted = sum(share * stored.of({name}).probabilities[0] for name, share in shares.items()) ** (
        1 / loaded.temperature
    )
    wanted /= wanted.sum(axis=1, keepdims=True)
    probabilities, unlike = loaded.look(list(validation["file"]))
    assert np.allclose(probabilities, wanted, atol=1e-5) and (unlike <= 1.001).all()
    member = load_model(model / next(iter(shares)))
    assert member.temperature == 1 and np.allclose(
        member.predict(list(validation["file"])), stored.of({next(iter(shares))}).probabilities[0], atol=1e-5
    )
    assert "ensemble: " in capsys.readouterr().out


@pytest.mark.slow
def test_what_was_chosen_is_what_is_deployed(searched, capsys):
    """The best trial's weights are taken from the search, and give its numbers everywhere."""
    row = read_table(searched / "trials.parquet").set_index("trial_id").loc["t00000"]
    model = train_final.run(Flags(str(searched), set=(("ensemble=false",),)))
    metrics, said = metrics_of(model), capsys.readouterr().out
    assert "t00000 as the search has trained it" in said and "epoch 1/" not in said
    assert metrics["taken_from"] == "t00000" and metrics["epochs"] == row["best_epoch"]
    for name in ("val_loss", "val_tempered_loss", "val_auroc", "val_balanced_accuracy"):
        assert metrics["validation"][name] == row[name]
    samples = read_table(searched / "samples.parquet")
    validation = samples[samples["split"] == "val"]
    (stored,) = (
        read_predictions(searched, read_table(searched / "trials.parquet"), samples).of({"t00000"}).probabilities
    )
    loaded = load_model(model)
    files = list(validation["file"])
    wanted = tempered(logarithms(stored), loaded.temperature)
    assert np.abs(loaded.predict(files) - wanted).max() < 1e-4
    assert metrics["onnx"]["largest_difference"] < 1e-4
    targets = validation["label"].map({name: place for place, name in enumerate(loaded.classes)}).to_numpy()
    assert -np.log(wanted[np.arange(len(targets)), targets]).mean() == pytest.approx(row["val_tempered_loss"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["document", "metric", "content"])
def test_what_asks_for_another_training_is_trained(searched, folder, tmp_path, capsys, change):
    given = {}
    if change == "document":
        text = (searched / "best.yaml").read_text()
        (searched / "best.yaml").write_text(text.replace("learning_rate: 0.003", "learning_rate: 0.004", 1))
    elif change == "metric":
        given = {"set": (("metric=val_auroc",),)}
    else:
        other = Path(shutil.copytree(folder, tmp_path / "other"))
        trained = read_table(searched / "samples.parquet").query("split == 'train'")["path"].iloc[0]
        Image.fromarray(np.full((40, 40), 90, np.uint8)).save(other / trained)
        given = {"data": str(other)}
    metrics, said = metrics_of(run(Flags(str(searched), **given))), capsys.readouterr().out
    assert "taken_from" not in metrics and "epoch 1/6" in said
    card = (searched / "model" / "README.md").read_text()
    assert ("search and verdict describe another model" in card) == (change != "metric")
    if change == "document":
        assert "t00000 is trained anew: " in said and "has another configuration" in said
    if change == "content":
        assert "used as other data" in said and "not all have their content" in said
        assert "as the search has trained it" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gain", "settings", "several"),
    [
        (0.1, (), True),
        (-0.1, (), False),
        (0.1, ("ensemble=false", "epochs=1"), False),
        (0.1, ("epochs=1",), False),
        (0.1, ("final_data=train+val",), False),
    ],
)
def test_the_mean_of_several_trials_is_handed_over_if_it_is_clearly_better(
    searched, monkeypatch, capsys, gain, settings, several
):
    found = Offer(("t00000", "t00002"), 0.3, 0.3 + gain, gain, (gain - 0.05, gain + 0.05))
    monkeypatch.setattr(train_final, "offer", lambda predictions, chosen, least: found)
    metrics = metrics_of(run(Flags(str(searched), set=(settings,) if settings else ())))
    assert ("ensemble" in metrics) == several
    said = capsys.readouterr().out
    assert ("the mean of 2 trials of the search has a val_tempered_loss 0.1000 lower" in said) == several
    assert ("--set ensemble=false takes t00000 alone" in said) == several


@pytest.mark.slow
def test_an_ensemble_that_the_metric_does_not_judge_is_not_taken_in_silence(searched, monkeypatch, capsys):
    for name in ("best.yaml", "plan.yaml"):
        text = (searched / name).read_text()
        (searched / name).write_text(text.replace("metric: val_tempered_loss", "metric: val_auroc"))
    found = Offer(("t00000", "t00002"), 0.3, 0.4, 0.1, (0.05, 0.15))
    monkeypatch.setattr(train_final, "offer", lambda predictions, chosen, least: found)
    assert "ensemble" not in metrics_of(run(Flags(str(searched))))
    said = capsys.readouterr().out
    why = "the gain is one of val_tempered_loss, and metric=val_auroc; --set ensemble=true builds it"
    assert re.search(rf"the mean of \d trials would be significantly better, but is not taken: {why}", said)
    assert "t00000 as the search has trained it" in said


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (("ensemble=true", "learning_rate=1e-3"), "leave it out, or"),
        (("ensemble=true", "final_data=train+val"), "leave it out, or"),
        (("ensemble=true",), "trials.parquet: no such table"),
    ],
)
def test_an_ensemble_that_cannot_be(best, values, said):
    with pytest.raises(InputError, match=said):
        run(Flags(str(best), set=(values,)))
    assert not (best / "test_readings.jsonl").exists()


def edit(best):
    text = (best / "best.yaml").read_text()
    (best / "best.yaml").write_text(re.sub(r"(?m)^learning_rate: .*", "learning_rate: 0.5", text))


def test_an_edited_configuration_is_no_ensemble_of_trials(best):
    edit(best)
    with pytest.raises(InputError, match="is no longer it; leave it out"):
        run(Flags(str(best), set=(("ensemble=true",),)))


@pytest.mark.slow
@pytest.mark.parametrize("edited", [False, True])
def test_an_edited_configuration_has_no_temperature_of_the_trial_as_it_was(searched, capsys, edited):
    if edited:
        edit(searched)
    found = metrics_of(run(Flags(str(searched), set=(("final_data=train+val",),)), onnx=False))
    assert (found["temperature"]["fitted_on"] is None) == edited
    assert ("the best of t00000, which was trained otherwise" in capsys.readouterr().out) == edited


@given(
    values=st.dictionaries(st.sampled_from(["learning_rate", "weight_decay"]), st.floats(1e-6, 1e-2), min_size=1),
    seed=st.integers(0, 9),
)
def test_a_configuration_has_one_digest_however_it_is_written(values, seed):
    config = {"backbone": "test_resnet", "epochs": 3} | values
    written = yaml.safe_load("\n".join(f"{name}: {value:.17e}" for name, value in values.items()))
    written = dict(reversed((config | written).items()))
    assert config_digest(config | {"seed": seed}) == config_digest(written)
    assert config_digest(config) != config_digest(config | {"learning_rate": 0.5})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (("patience=3", "trials=4"), "patience: has no effect on the final model; leave it out"),
        (
            ("val_fraction=0.4", "on_leak=move"),
            "on_leak: has no effect on the search's data; leave it out, or give --data",
        ),
    ],
)
def test_settings_without_an_effect_are_refused(best, values, said):
    with pytest.raises(InputError) as error:
        run(Flags(str(best), set=(values,)))
    assert len(error.value.faults) == 2 and any(fault.startswith(said) for fault in error.value.faults)


@pytest.mark.slow
def test_kept_weights_that_are_not_of_the_best_epoch_are_left_out(searched):
    """As after a power cut between a trial's end and the writing of its last best weights."""
    journal = Journal(searched / "journal.jsonl")
    last = next(event for event in read_journal(searched / "journal.jsonl") if event["event"] == "epoch")
    row = {key: value for key, value in last.items() if key not in ("seq", "event", "wall_s", "time")}
    for number in (1, 2):
        journal.append("epoch", **row | {"trial_id": f"t0000{number}", "epoch": 7, "val_loss": 1e-9})
    journal.close()
    write_tables(make_tables(read_record(searched / "journal.jsonl"), "val_loss"), searched)
    metrics = metrics_of(run(Flags(str(searched), set=(("ensemble=true",),))))
    assert set(metrics["ensemble"]) <= {"t00000", "f00000", "f00001"}


@pytest.mark.slow
def test_weights_that_do_not_reproduce_the_trials_probabilities_are_refused(searched, tmp_path):
    for path in searched.glob("checkpoints/[tf]*.best.safetensors"):
        with safe_open(path, "pt") as file:
            described = file.metadata()
        save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}, path, described)
    with pytest.raises(InputError, match=r"[tf]0000\d: its kept weights do not reproduce"):
        run(Flags(str(searched), set=(("ensemble=true",),)))
    assert not (searched / "test_readings.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("ensemble", [False, True])
def test_a_model_folder_works_alone(searched, folder, tmp_path, ensemble):
    """Moved elsewhere, the run deleted, in a process of its own; and so does its ONNX file."""
    model = train_final.run(Flags(str(searched), set=((f"ensemble={str(ensemble).lower()}",),)))
    assert metrics_of(model)["onnx"]["largest_difference"] < 1e-5 and metrics_of(model)["onnx"]["images"] == 12
    moved, elsewhere = tmp_path / "moved" / "m", tmp_path / "elsewhere"
    moved.parent.mkdir()
    elsewhere.mkdir()
    model.rename(moved)
    shutil.rmtree(searched)
    out = elsewhere / "predictions.parquet"
    command = [sys.executable, str(ROOT / "tuning" / "model_folder.py"), "predict", str(moved), str(folder)]
    done = subprocess.run([*command, "--out", str(out)], cwd=elsewhere, capture_output=True, text=True, check=True)
    assert done.stdout == f"written: {out}, 60 images\n"
    table = pd.read_parquet(out)
    assert len(table) == 60 and (table["predicted"] == [Path(path).parent.name for path in table["path"]]).mean() > 0.9

    # The card's own Python, as it stands there.
    told = (moved / "README.md").read_text()
    (code,) = (part.partition("```")[0] for part in told.split("```python\n") if part.startswith("import os"))
    shutil.copy(table["path"][0], moved / "film.png")
    said = subprocess.run([sys.executable, "-c", code], cwd=moved, capture_output=True, text=True, check=True).stdout
    found = [float(word.strip("[]")) for word in said.split('"light"]')[1].split()]
    assert found == pytest.approx(table[["probability_dark", "probability_light"]].iloc[0].to_list(), abs=1e-4)


def test_without_test_images_the_rest_is_there(best, folder, tmp_path):
    rows = [
        f"{folder}/{name}/{i:03d}.png,{name},{'val' if i % 3 else 'train'}"
        for name in ("dark", "light")
        for i in range(30)
    ]
    (tmp_path / "data.csv").write_text("path,label,split\n" + "\n".join(rows))
    model = run(Flags(str(best), data=str(tmp_path / "data.csv"), set=(("epochs=1",),)))
    written = {"model.safetensors", "config.yaml", "metrics.json", "known_images.parquet", "README.md"}
    written |= {"familiar.npz", "conformal.parquet", "reporting.md"}
    assert {path.name for path in model.iterdir()} == written
    assert "There were no test images" in (model / "README.md").read_text()


@pytest.mark.slow
def test_names_of_any_kind_are_text_everywhere(best, tmp_path):
    labels = ["<script>alert(1)</script>", "a, \"b\" 'c'\n😷"]
    names = ["a \"quoted\" 'name' {}.png", "😷 {}.png", "two\nlines {}.png", "<script>{}.png"]
    rng = np.random.default_rng(0)
    (tmp_path / "films").mkdir()
    rows = []
    for number in range(48):
        path = names[number % 4].format(number)
        Image.fromarray(rng.integers(0, 256, (32, 32), dtype=np.uint8)).save(tmp_path / "films" / path)
        split = ("train", "val", "test")[number % 3]
        rows.append({"path": f"films/{path}", "label": labels[number // 4 % 2], "split": split})
    pd.DataFrame(rows).to_parquet(tmp_path / "data.parquet")
    model = run(Flags(str(best), data=str(tmp_path / "data.parquet"), set=(("epochs=1",),)))
    assert load_model(model).classes == tuple(labels)
    table = read_table(model / "predictions.parquet")
    assert set(table["label"]) == set(labels) and list(table)[3:] == [f"probability_{name}" for name in labels]
    assert set(table["path"]) == {row["path"] for row in rows if row["split"] == "test"}
    page, card = (model / "mistakes.html").read_text(), (model / "README.md").read_text()
    assert "<script" not in page and "<script" not in card
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in card
    assert "two\\nlines" in page or "😷" in page
