"""Training on several devices: two processes on a CPU, by gloo."""

import subprocess
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from shared import CPU, losses, make_data

from tuning.model import final
from tuning.settings.config import TrialConfig
from tuning.training.distributed import finetune_on_all
from tuning.training.features import HeldOutputs
from tuning.training.finetune import finetune
from tuning.training.ranks import Ranks

pytestmark = pytest.mark.slow


def config(**values):
    # Batch norms keep their statistics: a CPU computes none over the batch of several processes.
    given = {"backbone": "test_resnet", "unfreeze_depth": 5, "image_size": 32, "batch_size": 17, "epochs": 6}
    return TrialConfig(**given | {"learning_rate": 3e-3, "augmentation": "medium", "batch_norm": "frozen"} | values)


def on_two(plan, data, **values):
    """Train on two devices, however little they save."""
    given = {"weights": None, "metric": "val_loss", "features": HeldOutputs(CPU)}
    return finetune_on_all([CPU, CPU], plan, data, **given | {"least_seconds": 0.0, "least_gain": 0.0} | values)


@pytest.fixture
def started(monkeypatch):
    """The processes that are started."""
    processes, start = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **b: processes.append(start(*a, **b)) or processes[-1])
    return processes


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        ({}, 2),
        (
            {"unfreeze_depth": 2, "optimizer": "sgd", "class_weighting": "balanced", "augmentation": "light mixup=0.5"},
            3,
        ),
        ({"unfreeze_depth": 0, "augmentation": "none", "label_smoothing": 0.1, "batch_size": 32}, 2),
    ],
)
def test_two_processes_train_what_one_does(values, classes, started, tmp_path):
    plan, data = config(**values), make_data(classes=classes)
    np.save(tmp_path / "images.npy", data.images)
    mapped = replace(data, images=np.load(tmp_path / "images.npy", mmap_mode="r"))
    found = list(on_two(plan, mapped))
    alone = list(finetune(plan, data, device=CPU, weights=None))
    np.testing.assert_allclose(losses(found), losses(alone), rtol=1e-3)
    same = ("epoch", "learning_rate", "images", "ends", "trained_parameters")
    assert [[row[name] for name in same] for row, _ in found] == [[row[name] for name in same] for row, _ in alone]
    assert len(started) == 2 and all(process.poll() is not None for process in started)


def test_several_labels_of_which_some_are_unknown(started):
    data = make_data()
    labels = np.stack([data.labels, np.where(np.arange(48) % 5 == 0, -1, np.arange(48) // 2 % 2)], axis=1)
    plan, data = config(class_weighting="balanced"), replace(data, labels=labels)
    found = list(on_two(plan, data))
    np.testing.assert_allclose(losses(found), losses(finetune(plan, data, device=CPU, weights=None)), rtol=1e-3)
    assert len(started) == 2


def test_where_all_are_slower_the_first_goes_on(started, capsys):
    plan, data = config(), make_data()
    epochs, running = [], []
    for each in on_two(plan, data, least_gain=np.inf):
        epochs.append(each)
        running.append(sum(process.poll() is None for process in started))
    assert running == [0, 0, 2, 2, 0, 0]
    np.testing.assert_allclose(losses(epochs), losses(finetune(plan, data, device=CPU, weights=None)), rtol=1e-3)
    assert "s on 2 GPUs, " in capsys.readouterr().out


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_costs_its_epochs_alone(killed, started, capsys):
    plan, data = config(), make_data()
    epochs = []
    for each in on_two(plan, data):
        epochs.append(each)
        if [row["epoch"] for row, _ in epochs] == [1, 2, 3, 4]:
            started[killed].kill()
    assert [row["epoch"] for row, _ in epochs] == [1, 2, 3, 4, 3, 4, 5, 6]
    again = epochs[:2] + epochs[4:]
    np.testing.assert_array_equal(losses(again), losses(finetune(plan, data, device=CPU, weights=None)))
    said = capsys.readouterr().err  # by the process that is missed, or by the one that misses it
    assert said.startswith("training on 2 GPUs failed: ") and "; it continues on one" in said


def test_what_fails_in_a_process_is_told(started, capsys):
    data = make_data()
    broken = replace(data, labels=data.labels.copy())
    rows = on_two(config(), broken)
    epochs = [next(rows) for _ in range(2)]
    broken.labels[data.train[0]] = 7  # of no class
    with pytest.raises(IndexError):  # on one device too
        epochs += rows
    assert [row["epoch"] for row, _ in epochs] == [1, 2]
    assert "training on 2 GPUs failed: IndexError" in capsys.readouterr().err


def test_the_last_state_is_there_even_if_the_processes_are_not(started):
    plan, data = config(), make_data()
    for row, snapshot in on_two(plan, data):
        if row["ends"] is not None:
            for process in started:
                process.kill()
            assert len(snapshot().history) == plan.epochs
    assert len(started) == 2


@pytest.mark.parametrize(("values", "least_seconds"), [({}, 120.0), ({"batch_size": 8}, 0.0)])
def test_without_need_no_process_is_started(values, least_seconds, started):
    plan, data = config(**values), make_data()
    found = list(on_two(plan, data, least_seconds=least_seconds))
    assert losses(found) == losses(finetune(plan, data, device=CPU, weights=None))
    assert not started


@pytest.mark.parametrize("last", [None, 4])
def test_the_final_model_is_trained_on_all(last, started, monkeypatch):
    monkeypatch.setattr(final, "finetune_on_all", partial(finetune_on_all, least_seconds=0.0, least_gain=0.0))
    plan, data, rows = config(), make_data(), []
    given = {"weights": None, "metric": "val_loss", "features": HeldOutputs(CPU)}
    given |= {"last": last, "on_epoch": rows.append}
    found = [final.train(plan, data, devices=devices, **given) for devices in ([CPU, CPU], [CPU])]
    assert len(started) == 2 and all(process.poll() is not None for process in started)
    assert [row["epoch"] for row in rows] == [*range(1, (last or 6) + 1)] * 2
    logits = [model.logits({32: data}, "test", CPU) for model in found]
    np.testing.assert_allclose(*logits, atol=1e-3)
    assert found[0].metrics["epochs"] == found[1].metrics["epochs"]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 8, 17])
def test_every_item_is_one_ranks_own(size, count):
    parts = [range(count)[Ranks(rank, size).own(count)] for rank in range(size)]
    assert [item for part in parts for item in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
